"""One run at a time in a directory: the kernel holds the lock, so a killed run leaves none behind."""

from __future__ import annotations

import errno
import json
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from ioi_mamba.errors import InputError
from ioi_mamba.files import remove_parts, writing

try:
    import fcntl
except ImportError:  # Windows has msvcrt's locks instead
    fcntl = None
    try:
        import msvcrt
    except ImportError:
        msvcrt = None

NAME = ".lock"
_FAR = 2**30


@contextmanager
def only_run(directory: Path) -> Iterator[None]:
    """Hold `directory` (made if need be) for this process; what a killed run left half-written there is removed.

    The lock is one of the kernel's on `DIR/.lock`, which ends with its process however that ends; no clock and no
    process number decides anything, they are only told. A directory that was made here and stayed empty is removed.
    Raises InputError, with the owner and since when, where another run holds the directory. A file system that
    keeps no locks gets a warning.
    """
    made = [place for place in (directory, *directory.parents) if not place.exists()]
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        handle = _acquire(directory)
    try:
        with writing(directory):
            os.write(handle, json.dumps(_ourselves()).encode())
            remove_parts(directory)
        yield
    finally:
        # Removed while it is held, and `_acquire` looks again: nobody can hold a lock that is no longer there.
        removed = _remove(directory / NAME)
        os.close(handle)
        if not removed:
            _remove(directory / NAME)
        for place in made:
            with suppress(OSError):
                place.rmdir()


def _remove(path: Path) -> bool:
    """Whether the file is gone: Windows removes none that is open, and so neither one that the next run holds already."""
    try:
        path.unlink(missing_ok=True)
    except PermissionError:
        return False
    return True


def _acquire(directory: Path) -> int:
    """A handle of the locked file, emptied of what another process said there."""
    path = directory / NAME
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            _lock(handle, directory)
            # The owner before us may have removed the file between our opening it and our locking it.
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                os.ftruncate(handle, 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int, directory: Path) -> None:
    try:
        _lock_of_the_system(handle)
    except BlockingIOError:
        raise InputError(
            f"{str(directory)!r} is in use by {_owner(handle)}: wait for that run, or choose another out directory."
        ) from None
    except OSError as error:
        warnings.warn(
            f"The file system of {str(directory)!r} keeps no locks ({error.strerror}): see that no other run is there.",
            stacklevel=2,
        )


def _lock_of_the_system(handle: int) -> None:
    """Lock the open file until it is closed. Raises BlockingIOError where another process holds it, OSError where there are no locks."""
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    if msvcrt is None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    # Nobody else may read what is locked here: one byte far beyond what the file tells of its owner.
    os.lseek(handle, _FAR, os.SEEK_SET)
    try:
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    except PermissionError as error:
        raise BlockingIOError(*error.args) from error
    finally:
        os.lseek(handle, 0, os.SEEK_SET)


def _ourselves() -> dict[str, str | int]:
    return {"pid": os.getpid(), "host": platform.node(), "since": datetime.now(UTC).isoformat(timespec="seconds")}


def _owner(handle: int) -> str:
    """Process, host and age as the lock file tells them; a run that has just begun may not have written them yet."""
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        told = json.loads(os.read(handle, 1000))
        age = datetime.now(UTC) - datetime.fromisoformat(told["since"])
        # The clock may have been set back since.
        return f"process {told['pid']} on {told['host']}, for {max(0, int(age.total_seconds()))} s"
    except (ValueError, KeyError, TypeError):
        return "a run that has just begun"
