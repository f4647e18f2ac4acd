"""The experiments, one module each, and the registry that finds them.

A module is named after its experiment (`layer_removal` for "layer-removal") and offers NAME, TITLE, PAPER,
QUESTION, LOOK_FOR, METHOD, NEEDS_MAMBA, COLUMNS, `default_pairs`, `run`, `chart` and `findings`; NEEDS_NAMES = True
says that it only makes sense for prompts with names, NEEDS_TASK = False that its figure also means something of a model
that cannot do the task. Adding an experiment is adding a module and its name to ORDER.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from ioi_mamba.errors import InputError

ORDER = (
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


def _module_name(name: str) -> str:
    return f"{__name__}.{name.replace('-', '_')}"


def available() -> tuple[str, ...]:
    """The names of ORDER whose module is there."""
    return tuple(name for name in ORDER if find_spec(_module_name(name)) is not None)


def load(name: str) -> ModuleType:
    """The module of an experiment. Raises InputError, with the nearest name, for one that is not there."""
    names = available()
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise InputError(
            f"Unknown analysis {name!r}: did you mean {nearest!r}? There are {', '.join(names)}, or 'all'."
        )
    return import_module(_module_name(name))
