"""Reading what a run left: each experiment's manifest and table, with the chart and findings that are made of them.

In a notebook, `open_result("out", "layer-ablation").chart()` draws what the report shows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ioi_mamba import analyses
from ioi_mamba.charts.theme import themed
from ioi_mamba.errors import InputError
from ioi_mamba.files import read_table, sha256_of
from ioi_mamba.results.origin import check_one_run


def read_manifest(path: Path) -> dict[str, Any] | None:
    """A run's manifest, or None if there is none there that can be read."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return manifest if {"analysis", "model", "table_sha256"} <= manifest.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


@dataclass(frozen=True)
class Result:
    """A finished experiment of a run. manifest: what was run on what, as `DIR/NAME.json` has it."""

    name: str
    manifest: dict[str, Any] = field(repr=False)
    table: pd.DataFrame = field(repr=False)

    def chart(self) -> Any:
        """The chart of the report, an Altair chart; `.save("x.svg")` or `.save("x.png")` writes it."""
        return themed(analyses.load(self.name).chart(self.table))

    def findings(self) -> list[str]:
        """What the table says, in the sentences of the report."""
        return list(analyses.load(self.name).findings(self.table))

    def to_frame(self) -> pd.DataFrame:
        """The table, a copy that can be changed."""
        return self.table.copy()


def open_result(directory: str | Path, name: str) -> Result:
    """What the experiment `name` left in the --out directory of a run.

    Raises InputError for an unknown name, a directory without its finished table, a table that cannot be read, and
    one that is not the table its manifest vouches for.
    """
    analyses.load(name)
    result = read_result(Path(directory), name)
    if result is None:
        others = ", ".join(read_results(Path(directory)))
        raise InputError(f"{str(directory)!r} holds no finished table of {name}, only of {others}.")
    return result


def open_results(directory: str | Path) -> dict[str, Result]:
    """What every finished experiment left in the --out directory of a run, by name, in the paper's order.

    Raises InputError as `open_result`, and for tables that are not of one run.
    """
    results = read_results(Path(directory))
    check_one_run(Path(directory), {name: result.manifest for name, result in results.items()})
    return results


def read_results(directory: Path) -> dict[str, Result]:
    """As `open_results`, of one run or of several."""
    if not directory.is_dir():
        raise InputError(f"{str(directory)!r} is not a directory: give the --out directory of a run.")
    known = analyses.available()
    found = {name: result for name in known if (result := read_result(directory, name)) is not None}
    finished = [path.stem for path in sorted(directory.glob("*.parquet")) if read_manifest(path.with_suffix(".json"))]
    others = [name for name in finished if name not in known]
    if not found and others:
        raise InputError(
            f"{str(directory)!r} holds tables of {', '.join(others)} alone, which are not known here: name their files "
            "(`ioi-mamba report DIR --experiment FILE`), or register them first (`im.register`)."
        )
    if not found:
        raise InputError(f"{str(directory)!r} holds no finished table: run an analysis with --out {directory} first.")
    return found


def read_result(directory: Path, name: str) -> Result | None:
    """A finished experiment, None for one that is not: a table without manifest is unfinished.

    Raises InputError for a table that cannot be read, and for one that is not the table its manifest vouches for.
    """
    manifest = read_manifest(directory / f"{name}.json")
    path = directory / f"{name}.parquet"
    if manifest is None or not path.is_file():
        return None
    try:
        result = Result(name, manifest, read_table(path))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as parquet ({str(error).splitlines()[0]}): run {name} again."
        ) from None
    if isinstance(manifest["table_sha256"], str) and not _vouches(manifest, path):
        raise InputError(f"{path} is not the table that {name}.json is of: run {name} again.")
    return result


def finished(directory: Path, name: str) -> dict[str, Any] | None:
    """The manifest of an experiment whose table is there and whole, None where it is not."""
    manifest, path = read_manifest(directory / f"{name}.json"), directory / f"{name}.parquet"
    return manifest if manifest is not None and path.is_file() and _vouches(manifest, path) else None


def _vouches(manifest: Mapping[str, Any], table: Path) -> bool:
    return manifest["table_sha256"] == sha256_of(table)
