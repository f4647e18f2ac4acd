"""The passes of edge attribution patching: gradients at points of the path from clean to corrupted, and their products.

What the scores mean and which variant to use stands in `attribution.py`. All pairs have a range (`ranges`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ioi_mamba.circuits import relevance
from ioi_mamba.circuits.features import Features, columns_of
from ioi_mamba.circuits.graph import Masks, Universe, universe_of
from ioi_mamba.circuits.patching import (
    CorruptedRun,
    Patch,
    corrupted_run,
    edit_after,
    node_of,
    nodes_of,
    sink_hooks,
)
from ioi_mamba.circuits.variants import Variant
from ioi_mamba.model.jobs import device_of
from ioi_mamba.model.portable import portable
from ioi_mamba.passes.ablations import Spread
from ioi_mamba.passes.forward import Observer, forward
from ioi_mamba.passes.metrics import logit_diff, normalized_logit_diff
from ioi_mamba.passes.sweep import Progress
from ioi_mamba.tasks.base import Pairs


@portable
@dataclass
class _Point:
    """One pass on the path: the tensors that gradients are taken at, and the differences they are multiplied with."""

    gradient_at: dict[tuple, Tensor]  # ("sink", j), or (site of a part or of features, node)
    values: dict[tuple[str, int], Tensor]  # (site, node): what parts and features are made from


def _path_masks(universe: Universe, n_positions: int, alpha: float, parts: bool) -> Masks:
    n = len(universe.writers)
    grid = torch.zeros(n + 1, n + 1)
    for source, target in universe.edges():
        grid[source, target - 1] = 1
    forward_edges = grid[None, :, :, None].expand(1, -1, -1, n_positions)
    on_path = torch.tensor([float(part.on_path and parts) for part in universe.of_layer])
    of_parts = (on_path * alpha)[None, None, :, None].expand(1, n, -1, n_positions)
    return Masks(forward_edges * alpha, of_parts, torch.zeros(1, 0, n_positions))


def _differentiable_pass(
    model, pairs: Pairs, corrupted: CorruptedRun, alpha: float, variant: Variant, parts: bool, score
):
    """Run the clean prompts at one point of the path; `score(logits, patch, point)` is called inside the trace."""
    nodes, of_layer = nodes_of(model), corrupted.parts if parts else ()
    universe = universe_of(model, parts=parts)
    masks = _path_masks(universe, pairs.clean.shape[1], alpha, parts and variant.parts_on_path)
    # On the path no feature is patched: what is upstream moves them.
    patch = Patch(model, replace(corrupted, features=()), masks, detach=variant.detached)
    point = _Point({}, {})

    def leaf(key: tuple, then=None):
        def edit(x: Tensor) -> Tensor:
            x = then(x) if then else x
            point.gradient_at[key] = x = x if x.requires_grad else x.requires_grad_()
            return x

        return edit

    def keep(key: tuple[str, int], then=None):
        def observer(value: Tensor) -> None:
            point.values[key] = value
            if then:
                then(value)

        return observer

    edits, observe = patch.hooks()
    fixed, seen = relevance.hooks(model, variant.rules)
    # Rules come first: what a rule writes has no way back to what it is written over.
    edits |= {name: edit_after(edits.get(name), edit) for name, edit in fixed.items()}
    edits["hook_embed"] = leaf(("embed",))
    for j, name in enumerate(sink_hooks(nodes)):
        edits[name] = leaf(("sink", j), edits.get(name))
    for w, node in enumerate(nodes):
        own = [each for each in corrupted.features if node_of(each, nodes) == w]
        inside = of_layer if node.mixer else ()
        for site in dict.fromkeys([*(part.site for part in inside), *(each.writes for each in own)]):
            name = f"blocks.{node.layer}.hook_{site}"
            edits[name] = leaf((site, w), edits.get(name))
        read = [each.reads for each in own if each.reads != each.writes]
        for site in dict.fromkeys([*(site for part in inside for site in part.now), *read]):
            name = f"blocks.{node.layer}.hook_{site}"
            observe[name] = keep((site, w), observe.get(name))
    observe |= {name: _in_turn(observe.get(name), observer) for name, observer in seen.items()}
    with torch.enable_grad():
        return forward(
            model,
            pairs.clean,
            edits,
            observe=observe,
            logits_at=pairs.read_at,
            own_scan=True,
            reduce=lambda saved: score(pairs.scores(saved["hook_logits"]), patch, point),
        )


def _in_turn(first: Observer | None, then: Observer) -> Observer:
    """Two observers of one value; the first may be none."""
    if first is None:
        return then

    def both(value: Tensor) -> None:
        first(value)
        then(value)

    return both


def _chunk_scores(
    model,
    pairs: Pairs,
    alphas: list[float],
    steps: int,
    variant: Variant,
    parts: bool,
    features: tuple[Features, ...],
    spread: Spread | None,
    first: int,
) -> dict[str, Tensor]:
    """Scores of one chunk: edges [pair, source, target, pos]; parts [pair, node, part, pos]; features [pair, item, pos].

    spread: of all pairs, of which the first of these is number `first`.
    """
    n, (P, L) = len(nodes_of(model)), pairs.clean.shape
    numbers = torch.arange(first, first + P)
    corrupted = corrupted_run(model, pairs, parts=parts, features=features, spread=spread, rows=numbers)
    nodes, of_layer = nodes_of(model), corrupted.parts if parts else ()
    answer, wrong = pairs.answer.to(device_of(model)), pairs.wrong.to(device_of(model))
    from_corrupted = logit_diff(corrupted.logits, answer, wrong)
    clean: dict = {}
    # Products and sums are never rounded below float32, whatever the weights are in.
    wide = torch.promote_types(corrupted.outputs[0].dtype, torch.float32)
    zeros = {"device": device_of(model), "dtype": wide}
    total = {
        "edges": torch.zeros(P, n + 1, n + 1, L, **zeros),
        "parts": torch.zeros(P, n, len(of_layer), L, **zeros),
        "features": torch.zeros(P, sum(each.n + 1 for each in features), L, **zeros),
    }
    replaced = {part.site for part in of_layer if not part.is_term} | {each.writes for each in features}
    rows = torch.arange(P, device=device_of(model))

    def score(logits: Tensor, patch: Patch, point: _Point) -> dict[str, Tensor]:
        difference = logit_diff(logits, answer, wrong)
        here = point.values | {key: value for key, value in point.gradient_at.items() if key[0] in replaced}
        if "logit_diff" not in clean:  # the first point is alpha = 0, the clean run
            clean["logit_diff"] = difference.detach()
            if variant.from_clean:
                clean["outputs"] = [output.detach() for output in patch.outputs]
                clean["values"] = {key: value.detach() for key, value in here.items()}
        metric = normalized_logit_diff(difference, clean["logit_diff"], from_corrupted).sum()
        keys = list(point.gradient_at)
        gradients = torch.autograd.grad(metric, [point.gradient_at[key] for key in keys])
        gradient = dict(zip(keys, gradients, strict=True))
        with torch.no_grad():
            outputs = clean.get("outputs", patch.outputs)
            values = clean.get("values", here)
            change = [c.to(wide) - o for c, o in zip(corrupted.outputs, outputs, strict=True)]
            # [pair, pos, sink, source]; also for sources above a sink, which are no edges and not read.
            at_sinks = torch.stack([gradient["sink", j].to(wide) for j in range(n + 1)], dim=2)
            total["edges"] += (at_sinks @ torch.stack(change, dim=3)).permute(0, 3, 2, 1)
            for i, node in enumerate(nodes):
                there, now = corrupted.sites[i], {site: value for (site, at), value in values.items() if at == i}
                for k, part in enumerate(of_layer if node.mixer else ()):
                    made = there[part.own] if part.made is None else part.made(there, now, rows)
                    change = made.to(wide) - now[part.own]
                    total["parts"][:, i, k] += (gradient[part.site, i] * change).sum(-1)
            for each, columns in zip(features, columns_of(features), strict=True):
                i = node_of(each, nodes)
                now = {site: value for (site, at), value in values.items() if at == i}
                total["features"][:, columns] += each.scores(gradient[each.writes, i], now, corrupted.sites[i])
        return {}

    for alpha in alphas:
        _differentiable_pass(model, pairs, corrupted, alpha, variant, parts, score)
    return {name: value / steps for name, value in total.items()}


def scores(
    model,
    pairs: Pairs,
    alphas: list[float],
    steps: int,
    variant: Variant,
    parts: bool,
    features: tuple[Features, ...],
    positions: bool,
    per_pair: bool,
    spread: Spread | None,
    first: int,
    *,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """As `_chunk_scores`, on the CPU; summed to length 1 without `positions`, and, in float64, without `per_pair`.

    A function for `each_chunk`.
    spread: what the ablation takes of all pairs, None for resample. first: the number of the first of these among all.
    """
    # Gradients are to be had inside torch.inference_mode too, from tensors that were made outside it.
    with torch.inference_mode(False):
        own = replace(pairs, clean=pairs.clean.clone(), corrupted=pairs.corrupted.clone())
        of_items = _chunk_scores(model, own, alphas, steps, variant, parts, features, spread, first)
        found = {name: score.cpu() for name, score in of_items.items()}
    for score in found.values():
        pairs.check_finite("scores", score.movedim(0, -1), first)
    for name, score in found.items():
        score = score if positions else score.sum(-1, keepdim=True)
        found[name] = score if per_pair else score.double().sum(0, keepdim=True)
    return found
