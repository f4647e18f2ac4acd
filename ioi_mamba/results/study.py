"""A study read again: the tables of all its cells as one tidy frame.

A study is a directory with a directory for each of its cells, which are runs, and `study.json`, which lists them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ioi_mamba.errors import InputError
from ioi_mamba.results.stored import Result, open_results, read_manifest

FILE = "study.json"


@dataclass(frozen=True)
class Cell:
    """One cell of a study. about: model, seed, ... as the study names them; results: by experiment, what is finished."""

    name: str
    about: dict[str, Any]
    results: Mapping[str, Result] = field(repr=False)


@dataclass(frozen=True)
class Study:
    """Cells with something finished, in the order of the study; n_cells: how many there are to be."""

    name: str
    cells: list[Cell]
    n_cells: int

    @property
    def experiments(self) -> list[str]:
        """The names of those that some cell finished, in the order in which a page shows them."""
        return list(dict.fromkeys(name for cell in self.cells for name in cell.results))

    def frame(self) -> pd.DataFrame:
        """One row for each row of a table: cell, model, seed, ..., experiment, then the columns of the tables.

        What is the same in all cells stands there too. A column that a table does not have is empty in its rows.
        """
        tables = [
            result.to_frame().assign(**cell.about, cell=cell.name, experiment=name)
            for cell in self.cells
            for name, result in cell.results.items()
        ]
        keys = ["cell", *dict.fromkeys(key for cell in self.cells for key in cell.about), "experiment"]
        whole = pd.concat([table.astype(object) for table in tables], ignore_index=True).infer_objects()
        return whole.reindex(columns=[*keys, *(column for column in whole if column not in keys)])


def is_study(directory: Path) -> bool:
    """Whether a directory is a study's and not a run's."""
    return (directory / FILE).is_file()


def read_study(directory: str | Path) -> Study:
    """What the cells of a study left.

    Raises:
        InputError: For a directory that is none of a study or holds no finished table, a cell whose tables are not of the
            question that the study says, and one model's name with two weights.
    """
    directory = Path(directory)
    try:
        about = json.loads((directory / FILE).read_text(encoding="utf-8"))
        entries = [(str(entry["directory"]), _flat(entry)) for entry in about["cells"]]
        name = str(about["study"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{str(directory)!r} is no study's directory, {FILE} cannot be read there: give the --out of `ioi-mamba run "
            "STUDY.yaml`."
        ) from None
    cells = []
    for cell, told in entries:
        place = directory / cell
        if place.parent != directory or not any(read_manifest(path) is not None for path in place.glob("*.json")):
            continue
        results = open_results(place)
        for result in results.values():
            _check(place, told, result.manifest)
        cells.append(Cell(cell, told, results))
    if not cells:
        raise InputError(f"{str(directory)!r} holds no finished cell: `ioi-mamba run STUDY.yaml --out {directory}`.")
    _check_weights(directory, cells)
    return Study(name, cells, len(entries))


def open_study(directory: str | Path) -> pd.DataFrame:
    """The finished tables of all cells of a study as one tidy frame.

    Args:
        directory: The --out of `ioi-mamba run STUDY.yaml`.

    Returns:
        One row for each row of a table: cell, model, task, seed, dtype and what else the study says of a cell, option by
        option; experiment; then the columns of all tables, empty in rows of tables that do not have them.

    Raises:
        InputError: For a directory that is none of a study or holds no finished table, a cell whose tables are not of the
            question that the study says, and one model's name with two weights.
    """
    return read_study(directory).frame()


def _flat(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What a study says of a cell, an option under its own name; what no cell asked for is left out."""
    told = {key: value for key, value in entry.items() if key not in ("directory", "option")}
    named = {key if key not in told else f"option_{key}": value for key, value in entry["option"].items()}
    return {key: value for key, value in told.items() if value not in (None, False)} | named


def _check(place: Path, told: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    found = {"seed": manifest.get("seed"), "task": manifest.get("task"), "model": manifest["model"].get("id")}
    found["n_pairs"] = (manifest.get("asked") or {}).get("n_pairs")
    for key, value in found.items():
        if key == "task" and str(told.get(key, "")).endswith(".py"):
            continue  # the file's name, and the task's own
        if value != told.get(key):
            raise InputError(
                f"{place} holds {manifest['analysis']}.json with {key} {value}, and the study says {told.get(key)} there: "
                "move what is not of the study elsewhere."
            )


def _check_weights(directory: Path, cells: list[Cell]) -> None:
    first: dict[tuple[Any, Any], tuple[str, Any]] = {}
    for cell in cells:
        for result in cell.results.values():
            model = (cell.about["model"], cell.about.get("dtype"))
            weights = result.manifest["model"].get("weights_sha256")
            other, same = first.setdefault(model, (cell.name, weights))
            if same != weights:
                raise InputError(
                    f"{str(directory)!r} holds two models of the name {model[0]}: {other} has the weights {str(same)[:8]}, "
                    f"{cell.name} has {str(weights)[:8]}; run the study into another directory."
                )
