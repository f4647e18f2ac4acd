"""`ioi-mamba report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ioi_mamba.cli.log import Logging, listen
from ioi_mamba.errors import InputError


def report(
    directory: Path,
    /,
    *,
    charts: str | None = None,
    experiment: Annotated[list[Path] | None, Parameter(negative=())] = None,
    log: Annotated[Logging, Parameter(name="*")] = Logging(),  # noqa: B008  immutable
) -> int:
    """Write the report of finished tables again; of a study's directory, the page that compares its cells.

    Parameters
    ----------
    directory
        The --out of a run or of a study.
    charts
        Also write DIR/charts/NAME-of-MODEL.FORM: svg or png.
    experiment
        A file that holds an experiment whose table is there; may be given again.
    """
    with listen(log):
        from ioi_mamba import analyses
        from ioi_mamba.report.comparison import write_comparison
        from ioi_mamba.report.pages import save_charts, write_report
        from ioi_mamba.results.study import is_study

        for path in experiment or ():
            analyses.load(path)
        if is_study(directory):
            if charts is not None:
                raise InputError(f"{str(directory)!r} is a study's: --charts is for the directory of one of its cells.")
            print(f"Report: {write_comparison(directory)}")
            return 0
        if charts is not None:
            for path in save_charts(directory, charts):
                print(f"Chart: {path}")
        print(f"Report: {write_report(directory)}")
        return 0
