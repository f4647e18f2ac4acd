"""What a run is going to do: its experiments with their pairs and options, checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ioi_mamba import analyses
from ioi_mamba.analyses.layer_ablation import bottleneck
from ioi_mamba.errors import InputError
from ioi_mamba.experiments.experiment import Experiment
from ioi_mamba.experiments.needs import Need
from ioi_mamba.experiments.options import made, options_of
from ioi_mamba.files import read_table
from ioi_mamba.model.jobs import config_of
from ioi_mamba.results.stored import finished
from ioi_mamba.tasks.base import Pairs
from ioi_mamba.tasks.task import Task


@dataclass(frozen=True)
class Plan:
    """One experiment, ready to run.

    held_out: what it is to judge on, if it asks for that; given: the user's options; found: options that another table of
    the run answers, or the server.
    """

    experiment: Experiment
    pairs: Pairs
    held_out: Pairs | None
    given: Mapping[str, Any]
    found: Mapping[str, Any] = field(default_factory=dict)

    def with_found(self, values: Mapping[str, Any]) -> Plan:
        """The plan with these options too."""
        return replace(self, found={**self.found, **values})

    @property
    def options(self) -> Any:
        """An instance of the experiment's options."""
        return made(self.experiment.options, {**self.given, **self.found}, self.experiment.name)

    @property
    def needs_layer(self) -> bool:
        """Whether the experiment is on one layer and the user named none."""
        return Need.LAYER in self.experiment.needs and "layer" not in self.given


def in_order(experiments: Iterable[Experiment]) -> list[Experiment]:
    """The experiments, each once: those of the paper in its order, then the others as they are given."""
    known = {name: k for k, name in enumerate(analyses.ORDER)}
    once = {experiment.name: experiment for experiment in experiments}
    return sorted(once.values(), key=lambda experiment: known.get(experiment.name, len(known)))


def plans_of(
    model: Any,
    experiments: Sequence[Experiment],
    task: Task,
    pairs: Pairs | None,
    held_out: Pairs | None,
    n_pairs: int | None,
    seed: int,
    options: Mapping[str, Any],
) -> list[Plan]:
    """One plan an experiment, in order; arguments and errors as those of `runs.run_study`."""
    check_options(experiments, options)
    for given in (pairs, held_out):
        if given is not None:
            given.check_vocab(config_of(model).vocab_size)
    plans = []
    for experiment in in_order(experiments):
        if (why := experiment.unavailable(model)) is not None:
            raise InputError(f"{why} Leave it out.")
        own = {key: value for key, value in options.items() if key in options_of(experiment.options)}
        made(experiment.options, own, experiment.name)
        judges = Need.HELD_OUT in experiment.needs
        if pairs is None:
            chosen = experiment.draw(model.tokenizer, n_pairs, seed, task)
            other = experiment.draw(model.tokenizer, n_pairs, seed + 1, task) if judges else None
        elif judges and held_out is None:
            chosen, other = _halves(pairs, experiment.name)
        else:
            chosen, other = pairs, held_out if judges else None
        experiment.check_pairs(chosen)
        chosen.check_vocab(config_of(model).vocab_size)
        plans.append(Plan(experiment, chosen, other, own))
    return plans


def check_options(experiments: Sequence[Experiment], options: Iterable[str]) -> None:
    """Raise InputError for an option that none of the experiments takes."""
    for key in options:
        if not any(key in options_of(experiment.options) for experiment in experiments):
            known = [f"{each.name}: {', '.join(options_of(each.options)) or 'none'}" for each in experiments]
            raise InputError(f"Unknown option {key!r}: the options are {'; '.join(known)}.")


def _halves(pairs: Pairs, name: str) -> tuple[Pairs, Pairs]:
    """The first, third, ... pair and the second, fourth, ...: what an experiment chooses on, and what it judges on."""
    if len(pairs) < 2:
        raise InputError(f"{name} chooses on some pairs and judges on others: give two pairs or more.")
    return pairs[::2], pairs[1::2]


def bottleneck_of(plan: Plan, out: Path) -> dict[str, int]:
    """The layer this run's layer-ablation found, for an experiment on one layer when the user named none."""
    if not plan.needs_layer or finished(out, "layer-ablation") is None:
        return {}
    return {"layer": bottleneck(read_table(out / "layer-ablation.parquet"))}
