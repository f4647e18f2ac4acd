"""Where records of one kind are found: our own, those of installed packages, of files, and of a notebook."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from ioi_mamba.errors import InputError

Record = TypeVar("Record")


def named(kind: str, record: str | Record, records: Mapping[str, Record], type: type[Record]) -> Record:
    """The record of that name among ours, or the record itself.

    Raises:
        InputError: For a name that none of them has, with the nearest one.
    """
    if isinstance(record, type):
        return record
    if record not in records:
        nearest = difflib.get_close_matches(str(record), records, n=1, cutoff=0.0)[0]
        raise InputError(
            f"{kind} {record!r} is unknown: did you mean {nearest!r}? There are {', '.join(records)}; one of your own "
            f"is given as {_an(type.__name__)}."
        )
    return records[record]  # type: ignore[index]  # what is no record is a name


class Registry(Generic[Record]):
    """Finds the records of one kind by their name, or by the file that holds one.

    A record is an instance of a class that has a `name`. Our own modules are imported when they are asked for.

    Args:
        kind: What a record is, in a word, for messages.
        type: The class of the records.
        group: The entry points by which installed packages offer theirs.
        modules: Of our own records, the module of each name.
        attribute: What these modules call the record.
    """

    def __init__(self, kind: str, type: type[Record], *, group: str, modules: Mapping[str, str], attribute: str):
        self.kind, self.type, self.group = kind, type, group
        self.modules, self.attribute = dict(modules), attribute
        self._registered: dict[str, Record] = {}

    def names(self) -> tuple[str, ...]:
        """All names: our own in their order, then those that were registered, then those of installed packages."""
        return tuple(dict.fromkeys((*self.modules, *self._registered, *sorted(self._offered()))))

    def load(self, name: str | Path) -> Record:
        """The record of that name, or the one that a file holds; this one is registered.

        Raises:
            InputError: For an unknown name, with the nearest one; for a file that is not there, cannot be imported, or
                does not hold just one record of this kind; for an entry point that does not work.
        """
        if isinstance(name, Path) or (isinstance(name, str) and name.endswith(".py")):
            return self.register(self._from_file(Path(name)))
        if name in self._registered:
            return self._registered[name]
        if name in self.modules:
            return getattr(import_module(self.modules[name]), self.attribute)
        offered = self._offered()
        if name in offered:
            return self._from_entry_point(offered[name])
        names = self.names()
        nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)[0]
        raise InputError(
            f"Unknown {self.kind} {name!r}: did you mean {nearest!r}? There are {', '.join(names)}; a file that holds "
            "one is named by its path, ending in .py."
        )

    def register(self, record: Record) -> Record:
        """Make a record known under its name for as long as this process runs; gives it back.

        A record that was registered before under the same name is replaced, as when a cell of a notebook runs again.

        Raises:
            InputError: For what is no such record, and for a name that is one of our own.
        """
        if not isinstance(record, self.type):
            raise InputError(f"{record!r} is no {self.type.__name__}: register an ioi_mamba.{self.type.__name__}.")
        name = record.name  # type: ignore[attr-defined]
        if name in self.modules and self.load(name) is not record:
            raise InputError(f"There is {_an(self.kind)} {name!r} already: give this one another name.")
        if name not in self.modules:
            self._registered[name] = record
        return record

    def known(self, record: str | Path | Record) -> Record:
        """As `load`, also of a record itself, which is registered by that."""
        return self.load(record) if isinstance(record, str | Path) else self.register(record)

    def _offered(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}

    def _from_entry_point(self, point: EntryPoint) -> Record:
        try:
            record = point.load()
        except Exception as error:  # whatever another package does wrong, say whose fault it is
            raise InputError(
                f"The {self.kind} {point.name!r} of {_package(point)} cannot be loaded ({_reason(error)}): mend or "
                "remove that package."
            ) from error
        if not isinstance(record, self.type):
            raise InputError(
                f"The {self.kind} {point.name!r} of {_package(point)} is {type(record).__name__}, not "
                f"{self.type.__name__}: mend its entry point {point.value}."
            )
        if record.name != point.name:  # type: ignore[attr-defined]
            raise InputError(
                f"The entry point {point.name!r} of {_package(point)} gives the {self.kind} "
                f"{record.name!r}: give both one name."  # type: ignore[attr-defined]
            )
        return record

    def _from_file(self, path: Path) -> Record:
        if not path.is_file():
            raise InputError(f"There is no file {str(path)!r} that could hold {_an(self.kind)}: give an existing one.")
        # Under a name of its own, so that it neither hides another module nor is taken for one; the same in every process
        # while the file stays as it is, since what a server gave is kept under it.
        name = f"_ioi_mamba_{self.kind}_{path.stem}_{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            line = _line_of(error, path)
            raise InputError(f"{str(path)!r} cannot be imported{line} ({_reason(error)}): mend the file.") from error
        found: dict[int, Any] = {id(value): value for value in vars(module).values() if isinstance(value, self.type)}
        own = [value for value in found.values() if value.name not in self.modules]
        if len(own) != 1:
            what = "holds no" if not own else f"holds {len(own)} records of the kind"
            raise InputError(
                f"{str(path)!r} {what} {self.type.__name__}: it must hold one, in a variable of the module."
            )
        return own[0]


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


def _line_of(error: Exception, path: Path) -> str:
    """Where in the file it went wrong, as far as that is known."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    lines += [error.lineno] if isinstance(error, SyntaxError) else []
    return f", line {lines[-1]}" if lines else ""


def _package(point: EntryPoint) -> str:
    return "a package" if point.dist is None else f"the package {point.dist.name}"


def _an(word: str) -> str:
    return f"an {word}" if word[0].lower() in "aeiou" else f"a {word}"
