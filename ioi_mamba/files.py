"""Files are written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from pyarrow import parquet

from ioi_mamba.errors import InputError

MINI = Path(__file__).parent / "mini"
EMBEDDED = {"mini": MINI, "mini-mamba2": MINI / "mamba2", "mini-hybrid": MINI / "hybrid"}
"""Where config.json, model.safetensors and tokenizer.json of the embedded model are."""

_PART = ".part"

# Packed and dictionary-coded, a small file can hold more than memory does.
MAX_BYTES = 1 << 30
MAX_CELLS = 50_000_000


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses inside the block (a full disk, a quota, a lost right) as InputError naming `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        reason = os.strerror(error.errno)
        raise InputError(f"{str(path)!r} cannot be written ({reason}): make room, or choose another place.") from error


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name on success and vanishes on failure.

    Raises InputError where the system does not let it be written.
    """
    with writing(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_PART, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            # mkstemp makes files private; a report is for others to read.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def sha256_of(path: Path) -> str:
    """SHA-256, in hex, of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_parts(directory: Path) -> None:
    """Remove what a killed process left of files it was writing. Only for who holds the directory (`lock.py`)."""
    for part in directory.glob(f".*{_PART}"):
        part.unlink(missing_ok=True)


def read_table(path: Path) -> pd.DataFrame:
    """A table of a parquet file; ValueError, before it is unpacked, where it holds more than a run ever writes."""
    about = parquet.read_metadata(path)
    size = sum(about.row_group(k).total_byte_size for k in range(about.num_row_groups))
    if size > MAX_BYTES or about.num_rows * about.num_columns > MAX_CELLS:
        raise ValueError(f"{about.num_rows} rows of {about.num_columns} columns, {size} bytes unpacked, are too many")
    return pd.read_parquet(path)
