"""What a run is going to do: its experiments with their pairs and options, checked before anything runs."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd

from ioi_mamba import analyses, tasks
from ioi_mamba.errors import InputError
from ioi_mamba.model.jobs import config_of
from ioi_mamba.study.options import check_options, options_of
from ioi_mamba.tasks.base import Pairs
from ioi_mamba.tasks.prompts import is_name


@dataclass(frozen=True)
class Plan:
    """One experiment, ready to run. held_out: what it is to judge on, if it asks for that."""

    module: ModuleType
    pairs: Pairs
    held_out: Pairs | None
    options: dict[str, Any]


def plans_of(
    model,
    names,
    task: ModuleType,
    pairs: Pairs | None,
    held_out: Pairs | None,
    n_pairs: int | None,
    seed: int,
    options: dict[str, Any],
) -> list[Plan]:
    """One plan an experiment, in the paper's order; arguments and errors as those of `study.run_study`."""
    modules = {name: analyses.load(name) for name in names}
    check_options(list(modules.values()), options)
    for given in (pairs, held_out):
        if given is not None:
            given.check_vocab(config_of(model).vocab_size)
    plans = []
    for name in sorted(modules, key=analyses.ORDER.index):
        module = modules[name]
        judges = "held_out" in inspect.signature(module.run).parameters
        if pairs is None:
            chosen = _draw(module, task, model.tokenizer, n_pairs, seed)
            other = _draw(module, task, model.tokenizer, n_pairs, seed + 1) if judges else None
        elif judges and held_out is None:
            chosen, other = _halves(pairs, name)
        else:
            chosen, other = pairs, held_out if judges else None
        if getattr(module, "NEEDS_NAMES", False) and not any(map(is_name, chosen.roles)):
            raise InputError(f"{name} is about names, and these prompts have none: leave it out.")
        chosen.check_vocab(config_of(model).vocab_size)
        own = {key: value for key, value in options.items() if key in options_of(module)}
        plans.append(Plan(module, chosen, other, own))
    return plans


def _halves(pairs: Pairs, name: str) -> tuple[Pairs, Pairs]:
    """The first, third, ... pair and the second, fourth, ...: what an experiment chooses on, and what it judges on."""
    if len(pairs) < 2:
        raise InputError(f"{name} chooses on some pairs and judges on others: give two pairs or more.")
    return pairs[::2], pairs[1::2]


def _draw(module: ModuleType, task: ModuleType, tokenizer, n_pairs: int | None, seed: int) -> Pairs:
    """The experiment's own choice of IOI prompts, as in the paper; of another task the same kind of pairs for all."""
    if task is tasks.ioi:
        return module.default_pairs(tokenizer, n_pairs, seed)
    most = min(task.DEFAULT_PAIRS, getattr(module, "DEFAULT_PAIRS", task.DEFAULT_PAIRS))
    return task.generate(tokenizer, n_pairs or most, seed)


def needs_bottleneck(plan: Plan) -> bool:
    """Whether the experiment is on one layer and the user named none."""
    parameter = options_of(plan.module).get("layer")
    return parameter is not None and parameter.default is None and "layer" not in plan.options


def bottleneck_of(plan: Plan, out: Path) -> dict[str, int]:
    """The layer this run's layer-ablation found, for an experiment on one layer when the user named none."""
    if not needs_bottleneck(plan):
        return {}
    source = out / "layer-ablation.parquet"
    if not source.is_file():
        return {}
    return {"layer": int(analyses.load("layer-ablation").bottleneck(pd.read_parquet(source)))}
