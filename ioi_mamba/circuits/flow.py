"""What goes from token to token inside a layer: the state's share of each read-out that comes from each earlier position.

Unrolled, y_t of a mixer is a sum over source positions s <= t (arXiv 2403.01590; arXiv 2405.21060, section 6):

    y_t = sum over s of C_t (A_bar_t ... A_bar_(s+1)) B_bar_s x_s

One term is a *flow*, source -> target, of one layer, and in a Mamba-2 of one head. Patched, it takes A_bar, B_bar and x
from the corrupted run and C from the pass itself, as the part `ssm` does (appendix D.2): all flows of a layer patched are
that part patched. Ablated by zero it is left out of the sum, as an attention is knocked out between two tokens. The
convolution's own ways from token to token are parts already (`conv-1` at a position).

A flow is scored by gradient, for all at once, or exactly, each patched alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from ioi_mamba.circuits.scoring import check_one_layout
from ioi_mamba.errors import InputError
from ioi_mamba.model.families import family_of, layers_with, mixer_layer, sizes_of
from ioi_mamba.model.jobs import call, device_of, each_chunk
from ioi_mamba.model.memory import rows_per_chunk, rows_per_pass
from ioi_mamba.model.portable import portable
from ioi_mamba.passes.ablations import Ablation, AblationName, Spread, ablation_of, groups_of, replaced
from ioi_mamba.passes.forward import Start, forward
from ioi_mamba.passes.intervals import mean_interval
from ioi_mamba.passes.metrics import logit_diff, normalized_logit_diff
from ioi_mamba.passes.ranges import usable
from ioi_mamba.passes.sweep import Progress, pair_named
from ioi_mamba.tasks.base import Pairs, check_pairs

MOVED = ("ssm_input", "delta", "B")
"""The sites that a patched flow takes from the corrupted run."""
KEPT = ("A", "C")
"""Those that it takes from the pass itself."""
METHODS = {
    "eap": "the gradient at the clean point times what patching changes, all flows from one backward pass",
    "exact": "each flow is patched alone",
}


@portable
class Flow(NamedTuple):
    """What one target's read-out takes from one source. head: of a Mamba-2; None: all channels."""

    layer: int
    source: int
    target: int
    head: int | None = None


def token_flow(
    model: Any,
    pairs: Pairs,
    *,
    layers: Sequence[int] | None = None,
    heads: bool = False,
    method: Literal["eap", "exact"] = "eap",
    pairs_per_pass: int | None = None,
    ablation: AblationName | Ablation = "resample",
    progress: Progress | None = None,
) -> pd.DataFrame:
    """How much the answer needs each flow, mean over pairs.

    Args:
        model: As `open_model` gives it.
        pairs: Prompts of one layout; pairs without a range are left out (`attrs["left_out"]`).
        layers: Layers with a state-space mixer; None: all of them.
        heads: Of a Mamba-2, one row a head instead of one for all heads.
        method: "eap": the gradient at the clean point times what patching changes, all flows from one backward pass;
            "exact": each flow is patched alone, a pass a flow.
        pairs_per_pass: By default what fits into 1 GiB, on an accelerator 8 GiB.
        ablation: What patching writes: "resample", the corrupted run's, or "zero", nothing ("knockout").
        progress: Called with (done, total).

    Returns:
        Columns layer, head, source, target (positions), source_label, target_label, score, low, high (95 %). Score:
        normalized logit diff per unit of patching, as of `attribute`; negative: patching lowers the metric.

    Raises:
        InputError: For a layer without a mixer, heads of a model that has none, an unknown method or ablation, one that
            flows do not have, prompts of several layouts, and pairs of which none has a range.
    """
    check_one_layout(pairs)
    chosen = layers_with(model, "h") if layers is None else [mixer_layer(model, layer) for layer in layers]
    if heads and "H" not in sizes_of(model).letters:
        raise InputError(f"The mixers of this {family_of(model).label} have no heads: leave heads out.")
    if method not in METHODS:
        raise InputError(f"method {method!r} is unknown: methods are {', '.join(METHODS)}.")
    check_ablation(ablation)
    found = usable(model, pairs)
    scores = flow_scores(model, found.pairs, chosen, heads, method, pairs_per_pass, ablation, progress)
    low, high = mean_interval(scores, found.pairs.clusters)
    labels = found.pairs.position_labels()
    rows = [
        (
            layer,
            head if heads else None,
            s,
            t,
            labels[s],
            labels[t],
            mean,
            float(low[i, head, t, s]),
            float(high[i, head, t, s]),
        )
        for i, layer in enumerate(chosen)
        for head in range(scores.shape[1])
        for t in range(scores.shape[2])
        for s in range(t + 1)
        for mean in [float(scores[i, head, t, s].double().mean())]
    ]
    columns = ["layer", "head", "source", "target", "source_label", "target_label", "score", "low", "high"]
    table = pd.DataFrame(rows, columns=columns).astype({"head": "Int64"})
    table.attrs = {"left_out": found.left_out}
    return table


def flow_scores(
    model: Any,
    pairs: Pairs,
    layers: Sequence[int],
    heads: bool,
    method: str,
    pairs_per_pass: int | None = None,
    ablation: str | Ablation = "resample",
    progress: Progress | None = None,
) -> Tensor:
    """As `token_flow`, of pairs that all have a range: Float[layer, head or 1, target, source, pair]."""
    if pairs_per_pass is None:
        rows = min(64, rows_per_pass(model, pairs.clean.shape[1], "flows"))
        size = min(rows, rows_per_chunk(model, len(pairs), pairs.clean.shape[1], "flows"))
    else:
        rows = size = pairs_per_pass
    work, bare = _gradient_chunk if method == "eap" else _each_alone, pairs.without_text()
    options = (list(layers), heads, rows, check_ablation(ablation))
    chunks = [(bare[first : first + size], *options) for first in range(0, len(pairs), size)]
    with pair_named(model, pairs):
        return torch.cat(each_chunk(model, work, chunks, progress=progress), -1)


def check_ablation(ablation: str | Ablation) -> Ablation:
    """The kind of ablation. Raises InputError for one that flows do not have."""
    found = ablation_of(ablation)
    if found.over is not None or found.draws:
        raise InputError(
            f"A flow cannot be ablated by {found.name}: it is a product of values at many positions, of which the mean is not "
            "the product of means. Ablate flows by resample or by zero."
        )
    return found


def patch_flow(
    model: Any,
    pairs: Pairs,
    flows: Iterable[Flow | Sequence[int]],
    *,
    ablation: AblationName | Ablation = "resample",
) -> Tensor:
    """Logits [pair, pos, vocab] of the clean prompts with these flows patched, by default from the corrupted run.

    flows: (layer, source, target) or (layer, source, target, head). ablation: as of `token_flow`. Raises InputError for
    what is no flow of the model, and for an ablation that flows do not have.
    """
    kind = check_ablation(ablation)
    check_pairs(pairs)
    n_positions, sizes = pairs.clean.shape[1], sizes_of(model)
    n_heads = sizes.letters.get("H", 1)
    weights: dict[int, Tensor] = {}
    for each in flows:
        if not 3 <= len(each) <= 4:
            raise InputError(f"{tuple(each)} is no flow: give (layer, source, target[, head]).")
        flow = Flow(each[0], each[1], each[2], *each[3:])
        layer = mixer_layer(model, flow.layer)
        if not 0 <= flow.source <= flow.target < n_positions:
            raise InputError(
                f"{tuple(each)} is no flow: it goes from a position to itself or a later one, of 0 to {n_positions - 1}."
            )
        if flow.head is not None and not 0 <= flow.head < sizes.letters.get("H", 0):
            raise InputError(
                f"{tuple(each)} is no flow: the mixers of this model have {sizes.letters.get('H', 0)} heads."
            )
        weight = weights.setdefault(layer, torch.zeros(1, n_heads, n_positions, n_positions))
        weight[:, slice(None) if flow.head is None else flow.head, flow.target, flow.source] = 1
    return call(model, _patched, pairs.without_text(), weights, kind)


def _names(layer: int, sites: Iterable[str]) -> dict[str, str]:
    return {site: f"blocks.{layer}.hook_{site}" for site in sites}


def _taken(values: dict[str, Tensor], layer: int) -> list[Tensor]:
    """x, delta and B in one layer, as they are patched in."""
    return [values[name] for name in _names(layer, MOVED).values()]


def _changed(mixer, function, first: Tensor, there: list[Tensor], here: dict[str, Tensor]) -> Tensor:
    """`function` of the corrupted run's values, less the same of this pass'; C and A are this pass' in both.

    function: `flow_read_out` or `flow_products`, whose first argument is `first`.
    """
    wide = torch.promote_types(here["delta"].dtype, torch.float32)
    A, C = here["A"], here["C"].to(wide)

    def of(x: Tensor, delta: Tensor, B: Tensor) -> Tensor:
        return function(first.to(wide), x.to(wide), delta.to(wide), A, B.to(wide), C)

    return of(*there) - of(*(here[site] for site in MOVED))


def _run_with(model, tokens: Tensor, corrupted: dict[str, Tensor], weights: dict[int, Tensor], **options) -> Tensor:
    """Logits of a pass over rows of sets x pairs in which flows are patched; weights: by layer [set, H or 1, target, source].

    corrupted: the values that are patched in [pair, ...].
    """
    mixer, now = family_of(model).mixer, {}
    edits, observe = {}, {}
    for layer, weight in weights.items():
        here = now.setdefault(layer, {})
        for site, name in _names(layer, (*MOVED, *KEPT)).items():
            observe[name] = lambda value, here=here, site=site: here.__setitem__(site, value)
        sets = weight.shape[0]
        there = [value.repeat(sets, *[1] * (value.dim() - 1)) for value in _taken(corrupted, layer)]
        by_row = weight.to(tokens.device).repeat_interleave(len(tokens) // sets, 0)

        def edit(y: Tensor, by_row=by_row, there=there, here=here) -> Tensor:
            return y + _changed(mixer, mixer.flow_read_out, by_row, there, here).to(y.dtype)

        edits[f"blocks.{layer}.hook_y"] = edit
    with torch.no_grad():
        return forward(model, tokens, edits, observe=observe, own_scan=True, **options)["hook_logits"]


def _corrupted(model, pairs: Pairs, layers: Iterable[int], ablation: Ablation) -> dict[str, Tensor]:
    """What is patched in at MOVED, and the logits of the corrupted prompts."""
    names = [name for layer in layers for name in _names(layer, MOVED).values()]
    return replaced(model, pairs, names, Spread(ablation, groups_of(pairs, ablation), {}))


def _patched(model, pairs: Pairs, weights: dict[int, Tensor], ablation: Ablation, *, progress=None) -> Tensor:
    tokens = pairs.clean.to(device_of(model))
    return _run_with(model, tokens, _corrupted(model, pairs, weights, ablation), weights)


def _difference(pairs: Pairs, logits: Tensor) -> Tensor:
    scores = pairs.scores(logits)
    return logit_diff(scores, pairs.answer.to(scores.device), pairs.wrong.to(scores.device))


def _gradient_chunk(
    model,
    pairs: Pairs,
    layers: list[int],
    heads: bool,
    rows: int,
    ablation: Ablation,
    *,
    progress: Progress | None = None,
) -> Tensor:
    """Scores [layer, head or 1, target, source, pair] of one chunk."""
    # Gradients are to be had inside torch.inference_mode too, from tensors that were made outside it.
    with torch.inference_mode(False):
        own = replace(pairs, clean=pairs.clean.clone(), corrupted=pairs.corrupted.clone())
        return _gradients(model, own, layers, heads, ablation)


def _gradients(model, pairs: Pairs, layers: list[int], heads: bool, ablation: Ablation) -> Tensor:
    mixer, corrupted = family_of(model).mixer, _corrupted(model, pairs, layers, ablation)
    at_y: dict[int, Tensor] = {}
    now: dict[int, dict[str, Tensor]] = {layer: {} for layer in layers}

    def leaf(layer: int):
        def edit(y: Tensor) -> Tensor:
            at_y[layer] = y = y if y.requires_grad else y.requires_grad_()
            return y

        return edit

    def differentiate(saved: dict[str, Tensor]) -> dict[str, Tensor]:
        clean = _difference(pairs, saved["hook_logits"])
        metric = normalized_logit_diff(clean, clean.detach(), _difference(pairs, corrupted["hook_logits"])).sum()
        gradients = torch.autograd.grad(metric, [at_y[layer] for layer in layers])
        found = []
        with torch.no_grad():
            for layer, gradient in zip(layers, gradients, strict=True):
                here = {site: value.detach() for site, value in now[layer].items()}
                products = _changed(mixer, mixer.flow_products, gradient, _taken(corrupted, layer), here)
                found.append(products if heads else products.sum(1, keepdim=True))
        return {"scores": torch.stack(found).permute(0, 2, 3, 4, 1).cpu()}

    observe = {
        name: lambda value, layer=layer, site=site: now[layer].__setitem__(site, value)
        for layer in layers
        for site, name in _names(layer, (*MOVED, *KEPT)).items()
    }
    edits = {f"blocks.{layer}.hook_y": leaf(layer) for layer in layers}
    with torch.enable_grad():
        return forward(
            model,
            pairs.clean.clone(),
            edits,
            observe=observe,
            logits_at=pairs.read_at,
            own_scan=True,
            reduce=differentiate,
        )["scores"]


def _each_alone(
    model,
    pairs: Pairs,
    layers: list[int],
    heads: bool,
    rows: int,
    ablation: Ablation,
    *,
    progress: Progress | None = None,
) -> Tensor:
    """The same, each flow patched alone: a pass has as many flows as fill it."""
    L, n_heads = pairs.clean.shape[1], sizes_of(model).letters.get("H", 1) if heads else 1
    places = [(head, t, s) for head in range(n_heads) for t in range(L) for s in range(t + 1)]
    found = torch.zeros(len(layers), n_heads, L, L, len(pairs))
    corrupted = _corrupted(model, pairs, layers, ablation)
    streams = {layer: f"blocks.{layer}.hook_resid_pre" for layer in layers}
    with torch.no_grad():
        clean = forward(model, pairs.clean, reads=list(streams.values()), logits_at=pairs.read_at, own_scan=True)
    ends = [_difference(pairs, run["hook_logits"]) for run in (clean, corrupted)]
    sets, done = max(1, rows // len(pairs)), 0
    for i, layer in enumerate(layers):
        for begin in range(0, len(places), sets):
            group = places[begin : begin + sets]
            weight = torch.zeros(len(group), n_heads, L, L)
            for row, (head, t, s) in enumerate(group):
                weight[row, head, t, s] = 1
            n = len(group)
            start = Start(layer, clean[streams[layer]].repeat(n, 1, 1), {}, {})
            tokens = pairs.clean.to(device_of(model)).repeat(n, 1)
            options = {"start": start, "logits_at": pairs.read_at.repeat(n, 1)}
            logits = _run_with(model, tokens, corrupted, {layer: weight}, **options)
            moved = _difference(pairs, logits.unflatten(0, (n, -1)))
            effects = (normalized_logit_diff(moved, *ends) - normalized_logit_diff(ends[0], *ends)).cpu()
            for row, (head, t, s) in enumerate(group):
                found[i, head, t, s] = effects[row]
            done += n
            if progress:
                progress(done, len(places) * len(layers))
    return found
