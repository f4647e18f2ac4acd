"""The texts of `--option KEY=VALUE` as the values that experiments take."""

from __future__ import annotations

import ast
import types
import typing
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from .errors import InputError


def parse_options(modules: Sequence[ModuleType], texts: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE texts as the values that the experiments' `run` asks for. Raises InputError for a bad one."""
    from . import study

    pieces = [text.partition("=") for text in texts]
    for key, equals, _ in pieces:
        if not equals or not key:
            raise InputError(f"--option {key!r} has no value: write it as KEY=VALUE.")
    study.check_options(modules, {key: None for key, _, _ in pieces})
    options = {}
    for key, _, value in pieces:
        module = next(module for module in modules if key in study.options_of(module))
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
