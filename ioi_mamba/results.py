"""Reading what a run left: an experiment's manifest and its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from pyarrow import parquet

from .errors import InputError

# Packed and dictionary-coded, a small file can hold more than memory does.
MAX_BYTES = 1 << 30
MAX_CELLS = 50_000_000


def read_manifest(path: Path) -> dict[str, Any] | None:
    """A run's manifest, or None if there is none there that can be read."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return manifest if {"analysis", "model", "table_sha256"} <= manifest.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def read_result(directory: Path, name: str) -> tuple[dict[str, Any], pd.DataFrame] | None:
    """(manifest, table) of a finished experiment, None of one that is not: a table without manifest is unfinished.

    Raises InputError for a table that cannot be read.
    """
    manifest = read_manifest(directory / f"{name}.json")
    path = directory / f"{name}.parquet"
    if manifest is None or not path.is_file():
        return None
    try:
        return manifest, read_table(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as parquet ({str(error).splitlines()[0]}): run {name} again."
        ) from None


def read_table(path: Path) -> pd.DataFrame:
    """A table of a parquet file; ValueError, before it is unpacked, where it holds more than a run ever writes."""
    about = parquet.read_metadata(path)
    size = sum(about.row_group(k).total_byte_size for k in range(about.num_row_groups))
    if size > MAX_BYTES or about.num_rows * about.num_columns > MAX_CELLS:
        raise ValueError(f"{about.num_rows} rows of {about.num_columns} columns, {size} bytes unpacked, are too many")
    return pd.read_parquet(path)
