"""Tasks: what a model is asked. `base` holds the pairs of prompts every analysis takes; each task is one module.

A task's module offers TASK (its name), TITLE (the line over a report), VARIES (what differs between the prompts of a pair) and
`generate(tokenizer, n_pairs, seed)`. A task other than `ioi` also has DEFAULT_PAIRS, how many every experiment draws,
and may have
`measures(logits, pairs, tokenizer)`, values of each pair, of the unpatched model, whose means a run keeps. A module here that has TASK and
`generate` is a task; nothing else has to be told of it.
"""

from __future__ import annotations

import difflib
import pkgutil
from importlib import import_module
from types import ModuleType

from ioi_mamba.errors import InputError
from ioi_mamba.tasks import greater_than, ioi
from ioi_mamba.tasks.base import Pairs

__all__ = ["Pairs", "available", "greater_than", "ioi", "load"]


def available() -> dict[str, ModuleType]:
    """The modules of all tasks, by name; `ioi`, which the others are not like, comes first."""
    modules = [import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    tasks = [module for module in modules if hasattr(module, "TASK") and hasattr(module, "generate")]
    return {module.TASK: module for module in sorted(tasks, key=lambda module: (module is not ioi, module.TASK))}


def load(name: str) -> ModuleType:
    """The module of a task. Raises InputError, with the nearest name, for one that is not there."""
    tasks = available()
    if name not in tasks:
        nearest = difflib.get_close_matches(name, tasks, n=1, cutoff=0.0)[0]
        raise InputError(f"Unknown task {name!r}: did you mean {nearest!r}? There are {', '.join(tasks)}.")
    return tasks[name]
