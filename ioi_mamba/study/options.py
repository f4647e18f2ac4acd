"""The options of experiments, and the texts of `--option KEY=VALUE` as the values that these take."""

from __future__ import annotations

import ast
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from ioi_mamba.errors import InputError

# Arguments of an experiment's `run` that a study gives it and that are not the user's to set.
_SUPPLIED = ("progress", "held_out", "seed")


def options_of(module: ModuleType) -> dict[str, inspect.Parameter]:
    """The options a user may set: the keyword arguments of the experiment's `run`."""
    parameters = inspect.signature(module.run).parameters
    return {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in _SUPPLIED
    }


def check_options(modules: Sequence[ModuleType], options: Mapping[str, Any]) -> None:
    """Raise InputError for an option that none of the experiments takes."""
    for key in options:
        if not any(key in options_of(module) for module in modules):
            known = [f"{module.NAME}: {', '.join(options_of(module)) or 'none'}" for module in modules]
            raise InputError(f"Unknown option {key!r}: the options are {'; '.join(known)}.")


def parse_options(modules: Sequence[ModuleType], texts: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE texts as the values that the experiments' `run` asks for. Raises InputError for a bad one."""
    pieces = [text.partition("=") for text in texts]
    for key, equals, _ in pieces:
        if not equals or not key:
            raise InputError(f"--option {key!r} has no value: write it as KEY=VALUE.")
    check_options(modules, {key: None for key, _, _ in pieces})
    options = {}
    for key, _, value in pieces:
        module = next(module for module in modules if key in options_of(module))
        options[key] = _coerce(key, value, typing.get_type_hints(module.run).get(key, str))
    return options


def _coerce(key: str, text: str, hint: Any) -> Any:
    """A text as the first of the hint's types that reads it; commas separate the items of a sequence."""
    kinds = list(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]
    for kind in sorted(kinds, key=lambda kind: kind is str):
        origin: Any = typing.get_origin(kind) or kind
        if kind is type(None) and text.lower() == "none":
            return None
        if origin is typing.Literal and text in typing.get_args(kind):
            return text
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind is str:
            return text
        if kind in (int, float):
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                continue
            if type(value) is kind or (kind is float and type(value) is int):
                return kind(value)
        if origin in (list, tuple, Sequence):
            items = next((item for item in typing.get_args(kind) if item is not Ellipsis), str)
            return [_coerce(key, part.strip(), items) for part in text.split(",") if part.strip()]
    wanted = " or ".join(getattr(kind, "__name__", str(kind)).replace("NoneType", "none") for kind in kinds)
    raise InputError(f"--option {key}={text} cannot be used: {key} takes {wanted}.")
