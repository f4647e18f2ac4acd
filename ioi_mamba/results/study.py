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
from scipy import special

from ioi_mamba import analyses
from ioi_mamba.errors import InputError
from ioi_mamba.experiments.experiment import Experiment
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


_COUNTS = frozenset({"n", "rank", "left_out"})
"""Columns that say how many or in which place, and so neither what a row is about nor what was measured."""


def keys_of(experiment: Experiment) -> list[str]:
    """The columns that say what a row of its table is about."""
    return [each.name for each in experiment.columns if each.kind in ("int", "text") and each.name not in _COUNTS]


def measures_of(experiment: Experiment) -> list[str]:
    """The columns that were measured, without the ends of intervals; of one that is true or false, how often it is."""
    kinds = [each.name for each in experiment.columns if each.kind in ("float", "bool")]
    return [name for name in kinds if not name.endswith(("low", "high"))]


def over_seeds(study: Study, name: str) -> pd.DataFrame:
    """Every number of an experiment, over the seeds of cells that differ in nothing else.

    Args:
        study: As `read_study` gives it.
        name: Of the experiment.

    Returns:
        One row for each setting (model, task, dtype, ..., options), row of the table and measured column: the setting, the
        row's own columns, quantity, mean, low, high, n_seeds. low and high: the 95 % Student's t interval of the mean over
        seeds, with n_seeds - 1 degrees of freedom; NaN for one seed. Rows that a table has twice are one, their mean.
    """
    experiment = analyses.load(name)
    pieces = []
    for cell in study.cells:
        if name not in cell.results:
            continue
        table = cell.results[name].table
        keys = [key for key in keys_of(experiment) if key in table]
        measured = [measure for measure in measures_of(experiment) if measure in table]
        numbers = table[measured].apply(pd.to_numeric).astype("Float64")
        # As texts, so that an empty cell of one table is that of another, whatever type each column has.
        row = table[keys].astype("string").fillna("")
        if {"what", "size"} <= set(keys):
            # An item's row has the size of the circuit that was chosen: an item is the same in circuits of any size.
            row.loc[row["what"] == "item", "size"] = ""
        own = pd.concat([row, numbers], axis=1).groupby(keys, sort=False)[measured].mean().reset_index()
        own = own.melt(keys, measured, "quantity", "in_cell").dropna(subset="in_cell")
        pieces.append(own.assign(**{key: str(value) for key, value in settings_of(cell).items()}))
    whole = pd.concat(pieces, ignore_index=True)
    by = [column for column in whole if column != "in_cell"]
    whole["in_cell"] = whole["in_cell"].astype(float)
    whole[by] = whole[by].fillna("")
    found = whole.groupby(by, sort=False)["in_cell"].agg(mean="mean", spread="std", n_seeds="count").reset_index()
    half = (
        special.stdtrit((found["n_seeds"] - 1).where(found["n_seeds"] > 1), 0.975)
        * found["spread"]
        / found["n_seeds"] ** 0.5
    )
    found = found.assign(low=found["mean"] - half, high=found["mean"] + half).drop(columns="spread")
    settings = [column for column in found if column not in (*keys_of(experiment), *_FOUND)]
    rest = [column for column in found if column in keys_of(experiment)]
    return found[[*settings, *rest, *_FOUND]]


_FOUND = ["quantity", "mean", "low", "high", "n_seeds"]


def settings_of(cell: Cell) -> dict[str, Any]:
    """What the study says of a cell, without its seed."""
    return {key: value for key, value in cell.about.items() if key != "seed"}


def stable_core(study: Study, name: str) -> pd.DataFrame:
    """What the circuits of an experiment have in common over seeds.

    Args:
        study: As `read_study` gives it.
        name: Of an experiment whose table has the column "kept".

    Returns:
        One row for each setting and each item that is in the circuit of some seed: the setting, the item's own columns,
        share (of the seeds whose circuit has it, 0..1), n_seeds and core, whether all have it.
    """
    numbers = over_seeds(study, name)
    kept = numbers[(numbers["quantity"] == "kept") & (numbers["mean"] > 0)].drop(columns=["quantity", "low", "high"])
    kept = kept.rename(columns={"mean": "share"})
    seeds = {tuple(map(str, settings_of(cell).values())): 0 for cell in study.cells}
    for cell in study.cells:
        seeds[tuple(map(str, settings_of(cell).values()))] += name in cell.results
    of_setting = kept[list(settings_of(study.cells[0]))].apply(lambda row: seeds.get(tuple(row), 1), axis=1)
    # A seed whose table has no such item has it in no circuit.
    share = kept["share"] * kept["n_seeds"] / of_setting
    return kept.assign(share=share, n_seeds=of_setting, core=share == 1).reset_index(drop=True)


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
        One row for each row of a table: cell, model, task, seed, dtype and what else the study says of a cell, options as
        "option.NAME"; experiment; then the columns of all tables, empty in rows of tables that do not have them.

    Raises:
        InputError: For a directory that is none of a study or holds no finished table, a cell whose tables are not of the
            question that the study says, and one model's name with two weights.
    """
    return read_study(directory).frame()


def _flat(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What a study says of a cell, an option under its own name; what no cell asked for is left out."""
    told = {key: value for key, value in entry.items() if key not in ("directory", "option")}
    # Tables have columns of such names.
    named = {f"option.{key}": value for key, value in entry["option"].items()}
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
