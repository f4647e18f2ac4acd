"""The options of experiments: a dataclass each, from which the command line, the docs and the manifest are made."""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ioi_mamba.errors import InputError
from ioi_mamba.passes.ablations import ABLATIONS, RESAMPLE


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
        # None is said last: what an option is comes before that it may be left open.
        kinds = sorted(_kinds(self), key=lambda kind: kind is type(None))
        words = [_WORDS.get(typing.get_origin(kind) or kind, str(kind)) for kind in kinds]
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


def ablation_option(kinds: Iterable[str] = ABLATIONS) -> Any:
    """The field, to be called `ablation`, of an experiment that overwrites values; kinds: those that it can be done with.

    The texts of the experiment say `{written}` where they name what is written.
    """
    return option(RESAMPLE.name, "what is written in a value's place: `ioi_mamba.passes.ablations`", choices=kinds)


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
    """The value that a text of the command line means.

    Commas separate the items of a list, "none" is None. Raises InputError where the option's type does not read it.
    """
    value: Any = text
    if type(None) in _kinds(option) and text.lower() == "none":
        value = None
    elif any(map(_is_list, _kinds(option))):
        value = [part.strip() for part in text.split(",") if part.strip()]
    try:
        return _validated(option, value, strict=False)
    except ValidationError:
        raise InputError(
            f"--option {option.name}={text} cannot be used: {option.name} takes {option.described}."
        ) from None


_ANY_CLASS = ConfigDict(arbitrary_types_allowed=True)


def _kinds(option: Option) -> list[Any]:
    """The types of an option."""
    hint = option.hint
    return list(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]


def _is_list(kind: Any) -> bool:
    return typing.get_origin(kind) in (list, tuple, Sequence)


def _validated(option: Option, value: Any, *, strict: bool) -> Any:
    """The value as the option's type has it; strict: only what is of that type already. Raises pydantic's ValidationError."""
    if option.choices:
        return TypeAdapter(Literal[option.choices]).validate_python(value, strict=strict)
    # Whether items stand in a list or in a tuple is all the same.
    items = [next((each for each in typing.get_args(kind) if each is not Ellipsis), str) for kind in _kinds(option)]
    kinds: list[Any] = [
        Sequence[item] if _is_list(kind) else kind for kind, item in zip(_kinds(option), items, strict=True)
    ]
    ends = Field(ge=option.at_least, le=option.at_most)
    whole: Any = functools.reduce(operator.or_, kinds)
    wanted: TypeAdapter[Any] = TypeAdapter(Annotated.__class_getitem__((whole, ends)), config=_ANY_CLASS)
    return wanted.validate_python(value, strict=strict)


def _fits(value: Any, option: Option) -> bool:
    try:
        _validated(option, value, strict=True)
    except ValidationError:
        return False
    return True
