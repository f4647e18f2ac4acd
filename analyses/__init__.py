"""The experiments, one module each, and the registry that finds them and those of others.

A module holds its experiment as EXPERIMENT, a record (`ioi_mamba.experiments.experiment.Experiment`). Another package
offers its own by entry points (group "ioi_mamba.experiments"); a file that holds one is loaded by its path; in a
notebook `ioi_mamba.register` adds one. `docs/extending.md` shows how.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ioi_mamba import tasks
from ioi_mamba.experiments.experiment import Experiment
from ioi_mamba.registry import Registry

PAPERS = (
    "layer-ablation",
    "layer-removal",
    "cross-talk",
    "state-similarity",
    "conv-shift",
    "name-steering",
    "state-ablation",
    "output-ablation",
    "edge-attribution",
    "circuit-search",
    "positional-attribution",
)
"""Every experiment of the paper, in the paper's order."""
OPEN = ("ablation-kinds", "circuit-stability", "token-flow", "decoding", "features")
"""Those on the questions that the paper left open."""
ORDER = (*PAPERS, *OPEN)

EXPERIMENTS = Registry(
    "analysis",
    Experiment,
    group="ioi_mamba.experiments",
    modules={name: f"{__name__}.{name.replace('-', '_')}" for name in ORDER},
    attribute="EXPERIMENT",
)


def available() -> tuple[str, ...]:
    """The names of all experiments: the paper's in its order, then others."""
    return EXPERIMENTS.names()


def known(experiment: str | Path | Experiment) -> Experiment:
    """As `load`, also of a record, which is registered by that: a report of its table then finds it."""
    return EXPERIMENTS.known(experiment)


def register(record: Any) -> Any:
    """Make an experiment or a task known under its name for as long as this process runs; gives it back.

    Args:
        record: An `ioi_mamba.Experiment` or an `ioi_mamba.Task`.

    Raises:
        InputError: For what is neither, and for a name that one of our own has.
    """
    return (tasks.TASKS if isinstance(record, tasks.Task) else EXPERIMENTS).register(record)


def load(name: str | Path) -> Experiment:
    """An experiment by its name, or from the file that holds it.

    Raises InputError, with the nearest name, for one that is not there, and for a file that holds none.
    """
    return EXPERIMENTS.load(name)
