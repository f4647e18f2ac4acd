"""Classes that can be sent to a server which runs another Python.

nnsight sends functions as source. The methods that `dataclass` and `NamedTuple` generate have none, so they would
travel as bytecode, and calling that under another Python version ends the server's process.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)


def portable(cls: Class) -> Class:
    """Give a dataclass or NamedTuple a constructor with a source; it does what the generated one did.

    A field's `default_factory` must be a builtin type, such as `dict`.
    """
    generated = cls.__new__ if issubclass(cls, tuple) else cls.__init__
    parameters = list(inspect.signature(generated).parameters.values())[1:]
    # Plain tables: what `dataclasses` keeps of its fields is told apart by identity, which is lost on the way.
    if issubclass(cls, tuple):
        defaults, factories = dict(cls._field_defaults), {}  # type: ignore[attr-defined]
    else:
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        missing = dataclasses.MISSING
        defaults = {name: field.default for name, field in fields.items() if field.default is not missing}
        factories = {
            name: field.default_factory for name, field in fields.items() if field.default_factory is not missing
        }
    cls.__construction__ = (tuple(each.name for each in parameters), defaults, factories)  # type: ignore[attr-defined]
    cls.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what editors show
    if issubclass(cls, tuple):
        cls.__new__ = _new  # type: ignore[assignment]
    else:
        cls.__init__ = _init  # type: ignore[misc]
    return cls


def _arguments(cls: Any, values: tuple, named: dict[str, Any]) -> list[Any]:
    """The value of each field, in order. Raises TypeError for arguments that the class does not take."""
    names, defaults, factories = cls.__construction__
    if len(values) > len(names):
        raise TypeError(f"{cls.__name__} takes {len(names)} arguments, not {len(values)}")
    given = dict(zip(names, values, strict=False))
    for name in named:
        if name not in names or name in given:
            raise TypeError(f"{cls.__name__} got {name!r} {'twice' if name in given else 'and has no such argument'}")
    given |= named
    for name in names:
        if name not in given:
            if name not in defaults and name not in factories:
                raise TypeError(f"{cls.__name__} lacks the argument {name!r}")
            given[name] = defaults[name] if name in defaults else factories[name]()
    return [given[name] for name in names]


def _init(self: Any, *values: Any, **named: Any) -> None:
    for name, value in zip(type(self).__construction__[0], _arguments(type(self), values, named), strict=True):
        object.__setattr__(self, name, value)
    if hasattr(self, "__post_init__"):
        self.__post_init__()


def _new(cls: Any, *values: Any, **named: Any) -> Any:
    return tuple.__new__(cls, _arguments(cls, values, named))
