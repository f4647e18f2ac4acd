"""`ioi-mamba run`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Group, Parameter

from ioi_mamba.cli.listing import experiment_names, run_help
from ioi_mamba.cli.log import Logging, listen, quieten
from ioi_mamba.cli.wrapped import Wrapped
from ioi_mamba.errors import InputError
from ioi_mamba.study.settings import SUFFIXES, Settings, Study, read_study

_SERVER = Group("Server", sort_key=8)


run = App(name="run", help_epilogue=run_help(), help_format="plaintext", help_formatter=Wrapped())


@run.default
def _run(
    *experiments: Annotated[str, Parameter(name="ANALYSIS", completer=experiment_names)],
    settings: Annotated[Settings, Parameter(name="*")] = Settings(),  # noqa: B008  immutable
    out: Path | None = None,
    resume: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    overwrite: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    option: Annotated[list[str] | None, Parameter(negative=())] = None,
    json_: Annotated[bool, Parameter(name="--json", negative=(), show_default=False)] = False,
    submit: Annotated[bool, Parameter(negative=(), show_default=False, group=_SERVER)] = False,
    collect: Annotated[bool, Parameter(negative=(), show_default=False, group=_SERVER)] = False,
    log: Annotated[Logging, Parameter(name="*")] = Logging(),  # noqa: B008  immutable
) -> int:
    """Run experiments and write a report; or run a study, whose file names several runs.

    Parameters
    ----------
    experiments
        Names such as layer-ablation, files that hold an experiment, or 'all'; or one study file (.yaml).
    out
        The directory to write (default: reports/MODEL-DATE-TIME, reports/STUDY of a study).
    resume
        Keep the finished tables in --out; a study always does.
    overwrite
        Replace finished tables in --out.
    option
        KEY=VALUE, an option of an experiment, such as layer=3; may be given again.
    json_
        Print one JSON object for each finished experiment, and nothing else, on stdout.
    submit
        Hand requests to the server and do not wait for them.
    collect
        Fetch what was submitted, wait for it, and go on.
    """
    studies = [name for name in experiments if name.endswith(SUFFIXES)]
    if not experiments:
        raise InputError("No experiment is named: give at least one, `ioi-mamba run --help` lists them.")
    options = _options(option or ())
    with listen(log):
        if studies:
            if len(experiments) > 1:
                raise InputError(f"{studies[0]} is a study file and names its experiments itself: give it alone.")
            if submit or collect or resume:
                raise InputError(
                    "--submit, --collect and --resume are for one run: a study waits, and keeps what is done."
                )
            study = read_study(Path(studies[0]), settings.given | {"option": options})
            return _run_study(study, out, overwrite, json_, log.quiet)
        for flag, given in (("resume", resume), ("overwrite", overwrite), ("submit", submit), ("collect", collect)):
            if given and out is None:
                raise InputError(f"--{flag} needs --out: name the directory of the run.")
        if submit and collect:
            raise InputError("--submit and --collect do not go together: submit first, collect later.")
        if (submit or collect) and settings.backend != "ndif":
            raise InputError("--submit and --collect are for --backend ndif: leave them out.")
        place = out or default_out(settings.model, settings.task)

        from ioi_mamba.model.jobs import close
        from ioi_mamba.study import perform, runs

        request = perform.requested(experiments, settings, options)
        runs.check_out_dir(place)
        quieten()
        model = perform.opened(settings, request.any_architecture)
        if settings.backend == "ndif":
            model.jobs.wait = not submit
        try:
            page = perform.run(
                model,
                request,
                place,
                resume=resume or collect,
                overwrite=overwrite,
                progress=not log.quiet,
                finished=_printed if json_ else None,
            )
        finally:
            close(model)
        if not json_:
            print(f"Report: {page}")
        return 0


def _run_study(study: Study, out: Path | None, overwrite: bool, as_json: bool, quiet: bool) -> int:
    place = out or study.out or Path("reports") / study.name

    from ioi_mamba.report.comparison import write_comparison
    from ioi_mamba.study import perform

    quieten()
    failures = perform.run_cells(
        study, place, overwrite=overwrite, progress=not quiet, finished=_printed if as_json else None
    )
    for name, why in failures.items():
        print(f"Failed: {name}: {why}", file=sys.stderr)
    try:
        page = write_comparison(place)
        if not as_json:
            print(f"Report: {page}")
    except InputError:
        if not failures:
            raise
        # Nothing is finished, and what failed was said.
    return 1 if failures else 0


def _printed(manifest: dict[str, Any]) -> None:
    print(json.dumps(manifest, ensure_ascii=False, allow_nan=False), flush=True)


def _options(texts: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE texts by key. Raises InputError for one that is none."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"--option {text!r} has no value: write it as KEY=VALUE.")
        found[key] = value
    return found


def default_out(model: str, task: str) -> Path:
    """Where a run is written that names no directory: under reports/, whatever the model's name is."""
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(model).name).strip(".") or "model"
    name += "" if task == "ioi" else f"-{task}"
    return Path("reports") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
