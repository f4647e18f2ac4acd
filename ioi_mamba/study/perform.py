"""Settings carried out: one run, or the cells of a study one after the other."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ioi_mamba import analyses, tasks
from ioi_mamba.errors import InputError, Submitted
from ioi_mamba.experiments.experiment import Experiment
from ioi_mamba.experiments.needs import Need
from ioi_mamba.experiments.options import made, options_of, read_option
from ioi_mamba.files import written_whole
from ioi_mamba.model.jobs import close
from ioi_mamba.model.opening import open_model
from ioi_mamba.model.threads import use_threads
from ioi_mamba.remote.workers import Workers
from ioi_mamba.results.lock import only_run
from ioi_mamba.results.study import FILE
from ioi_mamba.study import runs
from ioi_mamba.study.plan import check_options
from ioi_mamba.study.settings import Cell, Settings, Study
from ioi_mamba.tasks.base import Pairs

logger = logging.getLogger(__name__)

ALL = ("all",)


@dataclass(frozen=True)
class Request:
    """One run before its model is opened. everything: whether what the model cannot do is left out, and not refused."""

    experiments: tuple[Experiment, ...]
    settings: Settings
    options: Mapping[str, Any]
    everything: bool

    @property
    def any_architecture(self) -> bool:
        """Whether a model without sites inside will do."""
        return not any(Need.SITES in experiment.needs for experiment in self.experiments)


def requested(names: Sequence[str], settings: Settings, options: Mapping[str, Any]) -> Request:
    """A run whose names, options and files are known to be there.

    Args:
        names: Of experiments, or of files that hold one; ("all",) for every one that the task allows.
        settings: What a user says of the run.
        options: By name; a text is read as the option's type has it.

    Raises:
        InputError: For an unknown name, task or option, and a file that is not there.
    """
    task, everything = tasks.known(settings.task), tuple(names) == ALL
    found = [analyses.load(name) for name in (analyses.available() if everything else dict.fromkeys(names))]
    if everything and task is not tasks.ioi.TASK:
        found = [experiment for experiment in found if Need.NAMES not in experiment.needs]
    for flag, path in (("--pairs", settings.pairs), ("--held-out", settings.held_out)):
        if path is not None and not path.is_file():
            raise InputError(f"There is no file {str(path)!r} to read pairs from: give {flag} an existing one.")
    check_options(found, options)
    values = {key: _value(found, key, value) for key, value in options.items()}
    if settings.no_resume_points:
        if not any("resume" in options_of(experiment.options) for experiment in found):
            raise InputError("None of these experiments starts passes midway: leave out --no-resume-points.")
        values |= {"resume": False}
    return Request(tuple(found), settings, values, everything)


def _value(experiments: Sequence[Experiment], key: str, value: Any) -> Any:
    experiment = next(each for each in experiments if key in options_of(each.options))
    option = options_of(experiment.options)[key]
    if isinstance(value, str):
        return read_option(option, value)
    made(experiment.options, {key: value}, experiment.name)
    return value


def opened(settings: Settings, any_architecture: bool) -> Any:
    """The model of a run, to be ended by `jobs.close`. Raises InputError as `open_model`."""
    shared = settings.backend == "ray"
    # What is left to do here of a run by workers is little.
    use_threads(1 if shared else settings.threads)
    model = open_model(
        settings.model,
        device=settings.device,
        dtype=settings.dtype,
        backend=settings.backend,
        host=settings.host,
        workers=Workers(settings.address, settings.workers, settings.threads or 1) if shared else None,
        any_architecture=any_architecture,
    )
    if settings.backend == "ndif":
        model.jobs.limit(settings.max_upload, settings.max_download, settings.retries)
        model.jobs.in_flight = settings.jobs
    return model


def run(model: Any, request: Request, out: Path, **others: Any) -> Path:
    """Carry a request out on its model; gives the page's path. others: as of `runs.run_study`, which says what is raised."""
    settings, experiments = request.settings, request.experiments
    if request.everything:
        reasons = {experiment.name: experiment.unavailable(model) for experiment in experiments}
        for why in filter(None, reasons.values()):
            logger.warning("Left out: %s", why)
        experiments = tuple(experiment for experiment in experiments if reasons[experiment.name] is None)
    given = [
        None if path is None else Pairs.from_jsonl(path, model.tokenizer)
        for path in (settings.pairs, settings.held_out)
    ]
    return runs.run_study(
        model,
        experiments,
        out,
        task=settings.task,
        pairs=given[0],
        held_out=given[1],
        n_pairs=settings.n_pairs,
        seed=settings.seed,
        options=request.options,
        model_id=settings.model,
        chunks=settings.chunks,
        bound=settings.bound,
        **others,
    )


def run_cells(
    study: Study,
    out: Path,
    *,
    overwrite: bool = False,
    progress: bool = True,
    finished: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, str]:
    """Every cell of a study, each in a directory of its own below `out`; cells that are done are kept.

    Args:
        study: The study.
        out: Its directory.
        overwrite: Replace finished tables of another question; without it their cells fail.
        progress: Whether to show it on stderr.
        finished: Called with the manifest of each experiment whose table is there, made or kept, and its "cell".

    Returns:
        What failed: a sentence by "CELL" or "CELL/EXPERIMENT". The others are done.

    Raises:
        InputError: Before anything is written, for an experiment, a task, an option or a file that is not there, and for
            a directory that cannot be written or is in use.
    """
    runs.check_out_dir(out)
    requests = {cell.name: requested(study.experiments, cell.settings, cell.options) for cell in study.cells}
    failures: dict[str, str] = {}
    held: tuple[Any, Any] | None = None
    with only_run(out):
        _write_cells(study, out)
        # Cells of one model follow one another, so that it is opened once.
        for cell in sorted(study.cells, key=_of_model):
            logger.info("%s", cell.name)
            request = requests[cell.name]

            def failed(name: str, error: Exception, cell: Cell = cell) -> None:
                failures[f"{cell.name}/{name}"] = _said(error)
                logger.error("%s, %s failed: %s", cell.name, name, _said(error), exc_info=_trace(error))

            try:
                if held is None or held[0] != _of_model(cell):
                    if held is not None:
                        close(held[1])
                    held = None  # before the next one is opened, so that two never take memory at once
                    held = (_of_model(cell), opened(cell.settings, request.any_architecture))
                run(
                    held[1],
                    request,
                    out / cell.name,
                    resume=True,
                    overwrite=overwrite,
                    progress=progress,
                    finished=None if finished is None else partial(_with_cell, finished, cell.name),
                    failed=failed,
                )
            except Submitted:
                raise
            except Exception as error:  # whatever is wrong with one cell, the others go on
                failures[cell.name] = _said(error)
                logger.error("%s failed: %s", cell.name, _said(error), exc_info=_trace(error))
        if held is not None:
            close(held[1])
    return failures


def _with_cell(finished: Callable[[dict[str, Any]], None], cell: str, manifest: dict[str, Any]) -> None:
    finished({"cell": cell} | manifest)


def _of_model(cell: Cell) -> tuple[str, ...]:
    settings = cell.settings
    names = ("model", "dtype", "device", "backend", "host", "address", "workers", "threads")
    return tuple(str(getattr(settings, name)) for name in names)


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError) and text else f"{type(error).__name__}: {text}"


def _trace(error: Exception) -> Exception | None:
    """What to show of where it was raised: nothing of bad input, whose sentence says all."""
    return None if isinstance(error, InputError) else error


def _write_cells(study: Study, out: Path) -> None:
    about = {
        "study": study.name,
        "experiments": list(study.experiments),
        "cells": [{"directory": cell.name} | cell.question for cell in study.cells],
    }
    with written_whole(out / FILE) as path:
        path.write_text(json.dumps(about, indent=2, default=str) + "\n", encoding="utf-8")
