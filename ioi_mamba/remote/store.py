"""Finished chunks of an experiment, kept on disk until its table is written.

A chunk is found again by its content alone: the work, the code, the arguments, and what they were computed with. So a
run with another seed, other pairs, options or weights never takes the chunks of this one.
"""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ioi_mamba.files import remove_parts, written_whole

PACKAGE = "ioi_mamba"
SUFFIX = ".chunk"


class Scratch(dict):
    """What a work keeps from one call to the next: no part of what it computes. It stays in its process."""

    def __reduce__(self):
        """None: whoever computes elsewhere begins without it."""
        return type(None), ()


class Store:
    """The finished chunks in one directory.

    Args:
        directory: Made with the first chunk.
        surroundings: What the chunks depend on beside their work and arguments, such as the hash of the weights.
    """

    def __init__(self, directory: Path, surroundings: Mapping[str, Any]):
        self.directory = directory
        self._begin = hashlib.sha256()
        _feed(self._begin, [surroundings, code_hash()])

    def key(self, work: Callable, args: tuple) -> str | None:
        """The name of what `work` gives of these arguments; None for arguments that have no content to hash."""
        digest = self._begin.copy()
        try:
            _feed(digest, [work, *args])
        except TypeError:
            return None
        return digest.hexdigest()[:24]

    def get(self, key: str | None) -> Any:
        """The result of that name; None where there is none, or one that is not as it was written."""
        try:
            content = self._path(key).read_bytes() if key else b""
        except FileNotFoundError:
            return None
        digest, content = content[:32], content[32:]
        if not content or hashlib.sha256(content).digest() != digest:
            return None
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    def put(self, key: str | None, result: Any) -> None:
        """Keep a result of tensors and plain values. Raises InputError where it cannot be written."""
        if key is None:
            return
        buffer = io.BytesIO()
        torch.save(result, buffer)
        self.directory.mkdir(parents=True, exist_ok=True)
        with written_whole(self._path(key)) as path:
            path.write_bytes(hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())
        self.ticket(key).unlink(missing_ok=True)

    def ticket(self, key: str) -> Path:
        """Where the id of a request is kept that was handed to a server and whose result is not here yet."""
        return self.directory / f"{key}.job"

    def forget(self) -> None:
        """Delete everything: chunks of an experiment whose table is written are not needed again."""
        if not self.directory.is_dir():
            return
        remove_parts(self.directory)
        for path in [*self.directory.glob(f"*{SUFFIX}"), *self.directory.glob("*.job")]:
            path.unlink()
        self.directory.rmdir()

    def _path(self, key: str | None) -> Path:
        return self.directory / f"{key}{SUFFIX}"


@cache
def code_hash() -> str:
    """SHA-256, in hex, of the package's sources."""
    digest = hashlib.sha256()
    root = Path(sys.modules[PACKAGE].__file__ or "").parent
    # Each room by itself: from the sources, that of the experiments is a link, which `rglob` from above does not follow.
    rooms = [room for room in root.iterdir() if room.is_dir()]
    for path in sorted([*root.glob("*.py"), *(file for room in rooms for file in room.rglob("*.py"))]):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def weights_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256, in hex, of a state dict's names, dtypes, shapes and values; of mamba-370m in float32 about a second."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().reshape(-1)
        # A piece at a time, so that a model on a GPU is not copied to memory whole.
        for piece in flat.split(1 << 24):
            digest.update(piece.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _feed(digest, item: Any) -> None:
    """Add a value to a hash. Raises TypeError for one that has no content to hash, such as a function made in another."""
    if isinstance(item, Scratch):
        return
    if isinstance(item, Tensor):
        digest.update(f"{item.dtype}{tuple(item.shape)}".encode())
        digest.update(item.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif hasattr(item, "hash"):
        digest.update(item.hash().encode())
    elif item is None or isinstance(item, bool | int | float | str):
        digest.update(f"{type(item).__name__}:{item!r};".encode())
    elif isinstance(item, Mapping):
        digest.update(f"{{{len(item)}".encode())
        for name in sorted(item):
            _feed(digest, name)
            _feed(digest, item[name])
    elif isinstance(item, list | tuple | range | frozenset):
        digest.update(f"[{len(item)}".encode())
        for one in sorted(item) if isinstance(item, frozenset) else item:
            _feed(digest, one)
    elif hasattr(item, "__dataclass_fields__"):
        for name in item.__dataclass_fields__:
            _feed(digest, getattr(item, name))
    elif hasattr(item, "__qualname__") and "<" not in item.__qualname__:
        digest.update(f"{item.__module__}.{item.__qualname__}:{_source_hash(item.__module__)};".encode())
    else:
        raise TypeError(f"{type(item).__name__} has no content to hash")


def _source_hash(module: str) -> str:
    """Of a module outside of the package, such as an experiment from a file."""
    if module.split(".")[0] == PACKAGE:
        return ""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        raise TypeError(f"{module} has no source to hash")
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
