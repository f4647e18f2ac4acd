"""Reading what a run left: an experiment's manifest and its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from .errors import InputError


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
        return manifest, pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as parquet ({str(error).splitlines()[0]}): run {name} again."
        ) from None
