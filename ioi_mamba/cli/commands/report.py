"""`ioi-mamba report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ioi_mamba.cli.log import Logging, listen


def report(
    directory: Path,
    /,
    *,
    charts: str | None = None,
    experiment: Annotated[list[Path] | None, Parameter(negative=())] = None,
    log: Annotated[Logging, Parameter(name="*")] = Logging(),  # noqa: B008  immutable
) -> int:
    """Write the report of finished tables again.

    Parameters
    ----------
    directory
        The --out of a run.
    charts
        Also write DIR/charts/NAME-of-MODEL.FORM: svg or png.
    experiment
        A file that holds an experiment whose table is there; may be given again.
    """
    with listen(log):
        from ioi_mamba import analyses
        from ioi_mamba.report.pages import save_charts, write_report

        for path in experiment or ():
            analyses.load(path)
        if charts is not None:
            for path in save_charts(directory, charts):
                print(f"Chart: {path}")
        print(f"Report: {write_report(directory)}")
        return 0
