"""The methods of attribution, one record each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ioi_mamba.circuits import gradients
from ioi_mamba.circuits.features import Features, row_floats
from ioi_mamba.circuits.graph import Item, Universe
from ioi_mamba.circuits.patching import kind_of_patches, spread_for
from ioi_mamba.circuits.scoring import Evaluator
from ioi_mamba.circuits.variants import Variant, variant_of
from ioi_mamba.model.jobs import each_chunk
from ioi_mamba.model.memory import rows_per_chunk
from ioi_mamba.passes.ablations import RESAMPLE, Ablation, AblationName, ablation_of
from ioi_mamba.passes.sweep import Progress, pair_named
from ioi_mamba.registry import named
from ioi_mamba.tasks.base import Pairs

MethodName = Literal["eap", "eap-ig", "exact"]
Kind = tuple[str, str, str | None]
"""(source, target, part)"""


class Options(NamedTuple):
    """How items are to be scored; fields as the arguments of `attribution.attribute`."""

    method: str | Method = "eap-ig"
    variant: str | Variant = "paper"
    steps: int = 5
    positions: bool = False
    parts: bool = False
    per_pair: bool = True
    pairs_per_pass: int | None = None
    features: tuple[Features, ...] = ()
    ablation: AblationName | Ablation = "resample"


@dataclass(frozen=True)
class Method:
    """A method of attribution.

    Attributes:
        name: As on the command line.
        label: As in charts and sentences.
        meaning: What a score of it is.
        needs_gradients: Whether it takes backward passes.
        by_position: Whether scores at positions cost no more than their sums.
        run: Scores Float[item, pos, pair] of (model, pairs, universe, options, progress), items in the order of
            `Universe.kinds`; the axis of positions has length 1 without `options.positions`, that of pairs without
            `options.per_pair`.
        least_steps: The fewest steps it makes sense with.
    """

    name: str
    label: str
    meaning: str
    needs_gradients: bool
    by_position: bool
    run: Callable[[Any, Pairs, Universe, Options, Progress | None], Tensor]
    least_steps: int = 1


def method_of(method: str | Method) -> Method:
    """The record of a method. Raises InputError, with the nearest name, for one that is not there."""
    return named("method", method, METHODS, Method)


def _at_the_clean_point(
    model: Any, pairs: Pairs, universe: Universe, options: Options, progress: Progress | None
) -> Tensor:
    return _by_gradients(model, pairs, universe, options, [0.0], 1, progress)


def _along_the_path(
    model: Any, pairs: Pairs, universe: Universe, options: Options, progress: Progress | None
) -> Tensor:
    variant = variant_of(options.variant)
    if variant.rules:
        return _at_the_clean_point(model, pairs, universe, options, progress)
    alphas = [k / (options.steps - 1) for k in range(options.steps)]
    # At alpha = 1 every sink sees the corrupted run and, undetached, only the output has a gradient. What is left
    # to add there is embed->output, which is zero where the last token is the same: then the step is not run.
    rows, at = torch.arange(len(pairs))[:, None], pairs.read_at
    same_last = bool((pairs.clean[rows, at] == pairs.corrupted[rows, at]).all())
    same_last = same_last and ablation_of(options.ablation).name == RESAMPLE.name
    dispensable = same_last and not variant.detached and not variant.from_clean
    alphas = alphas[:-1] if dispensable else alphas
    return _by_gradients(model, pairs, universe, options, alphas, options.steps, progress)


def _by_gradients(
    model: Any,
    pairs: Pairs,
    universe: Universe,
    options: Options,
    alphas: list[float],
    steps: int,
    progress: Progress | None,
) -> Tensor:
    _, variant, _, positions, parts, per_pair, pairs_per_pass, features, ablation = options
    if pairs_per_pass is None:
        L, of_pass = pairs.clean.shape[1], "part gradients" if parts else "gradients"
        pairs_per_pass = min(64, rows_per_chunk(model, len(pairs), L, of_pass, more=row_floats(features, L)))
    passes, bare = (alphas, steps, variant_of(variant), parts, features, positions, per_pair), pairs.without_text()
    starts = range(0, len(pairs), pairs_per_pass)
    with pair_named(model, pairs):
        spread = spread_for(model, pairs, parts=parts, ablation=kind_of_patches(ablation, pairs, features))
        chunks = [(bare[first : first + pairs_per_pass], *passes, spread, first) for first in starts]
        found = each_chunk(model, gradients.scores, chunks, progress=progress)
    scores = {name: torch.cat([chunk[name] for chunk in found]) for name in found[0]}
    if not per_pair:
        scores = {name: (score.sum(0, keepdim=True) / len(pairs)).float() for name, score in scores.items()}
    columns = [scores["edges"][:, i, j - 1] for i, j in universe.edges()]
    mixers = [w for w, (*_, name) in enumerate(universe.writers) if name == "mamba"]
    columns += [scores["parts"][:, w, k] for w in mixers for k in range(len(universe.inside))]
    columns += scores["features"].unbind(1)
    return torch.stack(columns).movedim(1, -1)


def _patched_alone(model: Any, pairs: Pairs, universe: Universe, options: Options, progress: Progress | None) -> Tensor:
    kinds = universe.kinds()
    places = range(pairs.clean.shape[1]) if options.positions else [None]
    items = [Item(source, target, p, part) for source, target, part in kinds for p in places]
    scores = Evaluator(model, pairs, universe, ablation=options.ablation).exact_effects(items, progress)
    scores = scores.view(len(kinds), len(places), -1)
    return scores if options.per_pair else scores.mean(-1, keepdim=True)


EAP = Method(
    name="eap",
    label="EAP",
    meaning="gradient at the clean point times the change that patching brings (equation 12)",
    needs_gradients=True,
    by_position=True,
    run=_at_the_clean_point,
)
EAP_IG = Method(
    name="eap-ig",
    label="EAP-IG",
    meaning="the same with the mean gradient over points of the path from clean to corrupted (equation 13)",
    needs_gradients=True,
    by_position=True,
    run=_along_the_path,
    least_steps=2,
)
EXACT = Method(
    name="exact",
    label="exact effects",
    meaning="what patching the item alone does to the metric",
    needs_gradients=False,
    by_position=False,
    run=_patched_alone,
)
METHODS: dict[str, Method] = {method.name: method for method in (EAP, EAP_IG, EXACT)}
