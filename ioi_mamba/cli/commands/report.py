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
    markdown: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    graph: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    draw_anyway: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
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
    markdown
        Also write DIR/summary.md and its figure DIR/story.svg.
    graph
        Also write the circuit as DIR/circuit-graph.json, for circuit-tracer's front end.
    draw_anyway
        Draw also what a model does that guesses; the charts say so across them.
    experiment
        A file that holds an experiment whose table is there; may be given again.
    """
    with listen(log):
        from ioi_mamba import analyses
        from ioi_mamba.report import exports
        from ioi_mamba.report.comparison import write_comparison
        from ioi_mamba.report.pages import save_charts, write_report
        from ioi_mamba.results.study import is_study

        for path in experiment or ():
            analyses.load(path)
        if is_study(directory):
            asked = {
                "--charts": charts is not None,
                "--markdown": markdown,
                "--graph": graph,
                "--draw-anyway": draw_anyway,
            }
            if flags := [flag for flag, given in asked.items() if given]:
                raise InputError(
                    f"{str(directory)!r} is a study's: {', '.join(flags)} is for the directory of one of its cells."
                )
            print(f"Report: {write_comparison(directory)}")
            return 0
        if charts is not None:
            for path in save_charts(directory, charts, draw_anyway=draw_anyway):
                print(f"Chart: {path}")
        if markdown:
            for path in exports.write_markdown(directory):
                print(f"Summary: {path}")
        if graph:
            print(f"Graph: {exports.write_graph(directory)}")
        print(f"Report: {write_report(directory, draw_anyway=draw_anyway)}")
        return 0
