"""Classes that can be sent to a server which runs another Python.

nnsight sends functions as source. The methods that `dataclass` and `NamedTuple` generate have none, so they would
travel as bytecode, and calling that under another Python version ends the server's process.
"""

from __future__ import annotations

import dataclasses
import inspect
import linecache
from typing import TypeVar

Class = TypeVar("Class", bound=type)


def portable(cls: Class) -> Class:
    """Give a dataclass or NamedTuple a constructor with a source; it does what the generated one did.

    A field's `default_factory` must be a builtin type, such as `dict`.
    """
    named_tuple = issubclass(cls, tuple)
    generated = cls.__new__ if named_tuple else cls.__init__
    parameters = list(inspect.signature(generated).parameters)[1:]
    factories = {}
    if named_tuple:
        name, first = "__new__", "cls"
        body = [f"return tuple.__new__(cls, ({', '.join(parameters)},))"]
        defaults = dict(cls._field_defaults)  # type: ignore[attr-defined]
    else:
        name, first = "__init__", "self"
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        factories = {
            key: field.default_factory
            for key, field in fields.items()
            if field.default_factory is not dataclasses.MISSING
        }
        defaults = {key: field.default for key, field in fields.items() if field.default is not dataclasses.MISSING}
        body = [f"if {key} is None: {key} = {factory.__name__}()" for key, factory in factories.items()]
        body += [f"object.__setattr__(self, {key!r}, {key})" for key in parameters]
        body += ["self.__post_init__()"] if hasattr(cls, "__post_init__") else []
    defaults |= dict.fromkeys(factories)
    source = f"def {name}({', '.join([first, *parameters])}):\n" + "".join(f"    {line}\n" for line in body)
    filename = f"<{cls.__module__}.{cls.__qualname__}.{name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict = {}
    exec(compile(source, filename, "exec"), namespace)
    constructor = namespace[name]
    constructor.__defaults__ = tuple(defaults[key] for key in parameters if key in defaults)
    constructor.__module__, constructor.__qualname__ = cls.__module__, f"{cls.__qualname__}.{name}"
    constructor.__annotations__ = generated.__annotations__
    setattr(cls, name, constructor)
    return cls
