"""The options of experiments: a dataclass each, from which the command line, the docs and the manifest are made."""

from __future__ import annotations

import ast
import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ioi_mamba.errors import InputError


@dataclass(frozen=True)
class NoOptions:
    """Of an experiment that has none."""


class Option(NamedTuple):
    """One option of an experiment, as `option` declares it.

    hint: its type. at_least, at_most: the ends of its range, None for none; choices: all that it may be, empty for
    whatever fits the type.
    """

    name: str
    hint: Any
    default: Any
    help: str
    at_least: float | None
    at_most: float | None
    choices: tuple[str, ...]

    @property
    def described(self) -> str:
        """Its values in words, such as "a whole number of at least 1, or none"."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        ends = (self.at_least is not None, self.at_most is not None)
        if all(ends):
            span = f" from {self.at_least:g} to {self.at_most:g}"
        else:
            span = f" of at least {self.at_least:g}" if ends[0] else f" of at most {self.at_most:g}" if ends[1] else ""
        words = [_WORDS.get(typing.get_origin(kind) or kind, str(kind)) for kind in _kinds(self)]
        return f"{words[0]}{span}" + "".join(f", or {word}" for word in words[1:])


_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    type(None): "none",
    list: "a list",
    tuple: "a list",
    Sequence: "a list",
}


def option(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    choices: Iterable[str] = (),
) -> Any:
    """A field of an options dataclass.

    Args:
        default: What it is where the user says nothing.
        help: What it does, in words; the command line and the docs show it.
        at_least: The least it may be, in the option's own unit; None for no such end.
        at_most: The most it may be.
        choices: All that it may be.
    """
    metadata = {"help": help, "at_least": at_least, "at_most": at_most, "choices": tuple(choices)}
    return dataclasses.field(default=default, metadata=metadata)


def options_of(kind: type) -> dict[str, Option]:
    """The options that a dataclass declares, by name."""
    hints = typing.get_type_hints(kind)
    return {
        field.name: Option(field.name, hints[field.name], field.default, **field.metadata)
        for field in dataclasses.fields(kind)
    }


def made(kind: type, values: Mapping[str, Any], experiment: str) -> Any:
    """An instance of the options dataclass with these values.

    Raises InputError, naming the experiment, for an option that it does not have, of another type or out of range.
    """
    known = options_of(kind)
    for name, value in values.items():
        if name not in known:
            raise InputError(f"{experiment} has no option {name!r}: it has {', '.join(known) or 'none'}.")
        if not _fits(value, known[name]):
            raise InputError(f"{name} is {value!r}: {experiment} takes {known[name].described}.")
    return kind(**values)


def read_option(option: Option, text: str) -> Any:
    """The value that a text of the command line means, as the first of the option's types that reads it.

    Commas separate the items of a list. Raises InputError where none reads it.
    """
    value = _read(_kinds(option), text)
    if value is _UNREAD or not _fits(value, option):
        raise InputError(f"--option {option.name}={text} cannot be used: {option.name} takes {option.described}.")
    return value


_UNREAD = object()


def _kinds(option: Option) -> list[Any]:
    """The types of an option; text last, which reads everything."""
    hint = option.hint
    kinds = list(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]
    return sorted(kinds, key=lambda kind: kind is str)


def _fits(value: Any, option: Option) -> bool:
    if option.choices:
        return value in option.choices
    if not any(_is(value, kind) for kind in _kinds(option)):
        return False
    if isinstance(value, int | float) and not isinstance(value, bool):
        low = option.at_least is None or value >= option.at_least
        return low and (option.at_most is None or value <= option.at_most)
    return True


def _is(value: Any, kind: Any) -> bool:
    if kind is type(None):
        return value is None
    if kind in (bool, str):
        return isinstance(value, kind)
    if kind in (int, float):
        return type(value) is int or (kind is float and type(value) is float)
    if typing.get_origin(kind) in (list, tuple, Sequence):
        return isinstance(value, list | tuple) and all(_is(item, _item(kind)) for item in value)
    return True


def _item(kind: Any) -> Any:
    return next((item for item in typing.get_args(kind) if item is not Ellipsis), str)


def _read(kinds: Sequence[Any], text: str) -> Any:
    for kind in kinds:
        if kind is type(None) and text.lower() == "none":
            return None
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind is str:
            return text
        if kind in (int, float):
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                continue
            if _is(value, kind):
                return kind(value)
        if typing.get_origin(kind) in (list, tuple, Sequence):
            items = [_read([_item(kind)], part.strip()) for part in text.split(",") if part.strip()]
            return _UNREAD if _UNREAD in items else items
    return _UNREAD
