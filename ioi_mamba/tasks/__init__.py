"""Tasks: what a model is asked. `base` holds the pairs of prompts that every experiment takes.

A module holds its task as TASK, a record (`task.Task`). Another package offers its own by entry points (group
"ioi_mamba.tasks"); a file that holds one is loaded by its path; in a notebook `ioi_mamba.register` adds one.
`docs/extending.md` shows how.
"""

from __future__ import annotations

from pathlib import Path

from ioi_mamba.registry import Registry
from ioi_mamba.tasks import greater_than, ioi
from ioi_mamba.tasks.base import Pairs
from ioi_mamba.tasks.task import Task

__all__ = ["TASKS", "Pairs", "Task", "available", "greater_than", "ioi", "known", "load"]

TASKS = Registry(
    "task",
    Task,
    group="ioi_mamba.tasks",
    modules={"ioi": f"{__name__}.ioi", "greater-than": f"{__name__}.greater_than"},
    attribute="TASK",
)


def available() -> tuple[str, ...]:
    """The names of all tasks."""
    return TASKS.names()


def load(name: str | Path) -> Task:
    """A task by its name, or from the file that holds it.

    Raises InputError, with the nearest name, for one that is not there, and for a file that holds none.
    """
    return TASKS.load(name)


def known(task: str | Path | Task) -> Task:
    """As `load`, also of a record, which is registered by that."""
    return TASKS.known(task)
