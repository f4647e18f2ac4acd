"""The page of a study: its cells side by side, each figure once for every setting, every number over the seeds."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ioi_mamba import analyses
from ioi_mamba.charts.theme import themed
from ioi_mamba.experiments.experiment import Experiment
from ioi_mamba.files import EMBEDDED, written_whole
from ioi_mamba.report.pages import template
from ioi_mamba.results import baseline
from ioi_mamba.results import study as studies
from ioi_mamba.results.study import Cell, Study

PAGE = "index.html"
NUMBERS = "comparison.parquet"
SHOWN_ROWS = 15
PANEL_SCALE = 0.75
MAX_PANELS = 12


@dataclass(frozen=True)
class Panel:
    """One figure of a row of small multiples. image: PNG in base64; trouble: why there is none."""

    setting: str
    cell: Cell
    image: str
    trouble: str


@dataclass(frozen=True)
class Section:
    """What the page shows of one experiment. core: of its circuits, or None where it finds none."""

    experiment: Experiment
    panels: list[Panel]
    left_out: int
    header: list[str]
    rows: list[list[str]]
    n_rows: int
    core: list[list[str]] | None


def write_comparison(directory: str | Path) -> Path:
    """Write `index.html` and `comparison.parquet` of a study's directory from the tables of its cells; gives the page's path.

    Raises InputError as `ioi_mamba.results.study.read_study`.
    """
    directory = Path(directory)
    study = studies.read_study(directory)
    numbers = {name: studies.over_seeds(study, name) for name in study.experiments}
    sections = [_section(study, name, numbers[name]) for name in study.experiments]
    models = {str(cell.about["model"]) for cell in study.cells}
    page = template("comparison.html.j2").render(
        study=study,
        sections=sections,
        cells=[_line(cell) for cell in study.cells],
        keys=list(dict.fromkeys(key for cell in study.cells for key in cell.about)),
        embedded=sorted(models & set(EMBEDDED)),
        code='import ioi_mamba as im\n\nframe = im.open_study(".")  # the folder of this page: all tables as one',
    )
    whole = pd.concat([table.assign(experiment=name) for name, table in numbers.items()], ignore_index=True)
    with written_whole(directory / NUMBERS) as path:
        whole.to_parquet(path, index=False)
    with written_whole(directory / PAGE) as path:
        path.write_text(page, encoding="utf-8")
    return directory / PAGE


def _line(cell: Cell) -> dict[str, Any]:
    """One cell of the list at the top: what was asked, what is finished, and what the unpatched model does."""
    told = (result.manifest.get("clean") for result in cell.results.values())
    clean = next((each["accuracy"] for each in told if each is not None), None)
    return {"cell": cell, "accuracy": "–" if clean is None else f"{clean:.3f}", "experiments": ", ".join(cell.results)}


def _section(study: Study, name: str, numbers: pd.DataFrame) -> Section:
    experiment = analyses.load(name)
    first: dict[str, Cell] = {}
    for cell in study.cells:
        if name in cell.results:
            first.setdefault(_setting(study, cell), cell)
    shown = list(first.items())[:MAX_PANELS]
    header, rows, n_rows = _numbers(study, experiment, numbers)
    return Section(
        experiment=experiment,
        panels=[_panel(experiment, setting, cell) for setting, cell in shown],
        left_out=len(first) - len(shown),
        header=header,
        rows=rows,
        n_rows=n_rows,
        core=_core(study, name) if "kept" in studies.measures_of(experiment) else None,
    )


def _setting(study: Study, cell: Cell) -> str:
    """What tells a cell's setting from others of the study, in words; the seed aside."""
    told = [studies.settings_of(each) for each in study.cells]
    varying = [
        key for key in dict.fromkeys(key for each in told for key in each) if len({str(t.get(key)) for t in told}) > 1
    ]
    own = studies.settings_of(cell)
    said = [str(own.get(key, "–")) if key == "model" else f"{key}={own.get(key, '–')}" for key in varying]
    return ", ".join(said) or str(own["model"])


def _panel(experiment: Experiment, setting: str, cell: Cell) -> Panel:
    result = cell.results[experiment.name]
    if baseline.means_nothing(experiment, result.manifest):
        return Panel(setting, cell, "", baseline.note(result.manifest))
    try:
        buffer = io.BytesIO()
        chart = themed(experiment.chart(result.table)).properties(background="white")
        chart.save(buffer, format="png", scale_factor=PANEL_SCALE)
    except Exception as error:  # one figure must not cost the page
        return Panel(setting, cell, "", f"The figure could not be drawn. {type(error).__name__}: {error}"[:300])
    return Panel(setting, cell, base64.b64encode(buffer.getvalue()).decode(), "")


def _numbers(study: Study, experiment: Experiment, numbers: pd.DataFrame) -> tuple[list[str], list[list[str]], int]:
    """(head, rows, how many there are) of the rows whose numbers are largest in some setting, a column a setting."""
    settings = {tuple(map(str, studies.settings_of(cell).values())): _setting(study, cell) for cell in study.cells}
    told = list(studies.settings_of(study.cells[0]))
    said = numbers[told].apply(lambda row: settings.get(tuple(row), ", ".join(row)), axis=1)
    keys = [column for column in studies.keys_of(experiment) if column in numbers]
    # Under names that no table has.
    numbers = numbers.assign(
        _setting=said, _text=[_text(row) for row in numbers.itertuples()], _size=numbers["mean"].abs()
    )
    wide = numbers.pivot_table(
        index=[*keys, "quantity"], columns="_setting", values="_text", aggfunc="first", sort=False
    )
    sizes = numbers.groupby([*keys, "quantity"], sort=False)["_size"].max()
    largest = sizes.sort_values(ascending=False, kind="stable").index[:SHOWN_ROWS]
    columns = [setting for setting in dict.fromkeys(settings.values()) if setting in wide]
    rows = [
        [*map(str, row), *(str(wide.loc[row, each]) if pd.notna(wide.loc[row, each]) else "–" for each in columns)]
        for row in largest
    ]
    return [*keys, "quantity", *columns], rows, len(sizes)


def _text(row: Any) -> str:
    interval = "" if pd.isna(row.low) else f" [{row.low:.3g}, {row.high:.3g}]"
    return f"{row.mean:.3g}{interval} ({row.n_seeds})"


def _core(study: Study, name: str) -> list[list[str]]:
    """By setting: seeds, items that some and that every circuit has, and which these are."""
    core, found = studies.stable_core(study, name), []
    told = list(studies.settings_of(study.cells[0]))
    for values, items in core.groupby(told, sort=False):
        cell = next(each for each in study.cells if tuple(map(str, studies.settings_of(each).values())) == values)
        stable = items[items["core"]]
        names = [_item(row) for row in stable.itertuples()]
        shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        found.append(
            [
                _setting(study, cell),
                str(int(items["n_seeds"].iloc[0])),
                str(len(items)),
                str(len(stable)),
                shown or "none",
            ]
        )
    return found


def _item(row: Any) -> str:
    name = f"{row.source} → {row.target}"
    name = f"{row.source} {row.part}" if getattr(row, "part", "") else name
    label = getattr(row, "label", "")
    return f"{name} at {label}" if label else name
