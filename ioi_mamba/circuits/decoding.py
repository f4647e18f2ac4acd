"""How the answer is read off the residual stream: what each node adds to it directly, and what each layer would answer.

The last norm's scale is held fixed, so that the logit difference is linear in the stream: what the nodes add to the stream
sums to it exactly ("direct logit attribution"). A mixer's share is split further, into what its state gives from each
source position and D x. The "logit lens" reads each layer's stream as if it were the last; the "tuned lens" reads what an
affine map makes of it first.

The map of a layer is the one whose result is nearest to the last stream on other prompts, by least squares (arXiv 2303.09435).
The package `tuned-lens` (arXiv 2303.08112) trains the same map for the logits' divergence, and knows no Mamba; a lens of its kind
that was trained elsewhere can be given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ioi_mamba.circuits import relevance
from ioi_mamba.circuits.graph import Item, Masks, masks_of, universe_of
from ioi_mamba.circuits.patching import corrupted_run, nodes_of, patched_run, sink_hooks, source_hooks
from ioi_mamba.errors import InputError
from ioi_mamba.model.families import family_of, sizes_of
from ioi_mamba.model.jobs import call, each_chunk
from ioi_mamba.model.memory import rows_per_chunk, rows_per_pass
from ioi_mamba.passes.forward import Start, forward
from ioi_mamba.passes.metrics import logit_diff
from ioi_mamba.passes.sweep import Progress, pair_named
from ioi_mamba.tasks.base import Pairs

SPLIT = ("ssm_input", "delta", "A", "B", "C")
"""The sites from which the state's share of a read-out is split by source."""
RIDGE = 1e-4
"""How much of the streams' mean square is added to the diagonal of a tuned lens's least squares."""


def direct_attribution(model, pairs: Pairs, progress: Progress | None = None) -> dict[str, Tensor]:
    """What each node adds to the logit difference of the clean prompts by itself, with the last norm's scale fixed.

    Returns:
        nodes: Float[node, pair], embed first; summed over nodes it is the logit difference.
        state: Float[mixer, source, pair], of each mixer what its state gives from each source position.
        skip: Float[mixer, pair], of each mixer what D x gives; state and skip sum to the mixer's node but for a bias.
        logit_diff: Float[pair].
    """
    rows = min(64, rows_per_chunk(model, len(pairs), pairs.clean.shape[1], "flows"))
    return _in_chunks(model, pairs, rows, _direct, progress)


def logit_lens(model, pairs: Pairs, progress: Progress | None = None) -> Tensor:
    """The logit difference that the stream after each layer would give, read by the last norm and the head: Float[layer, pair]."""
    rows = rows_per_chunk(model, len(pairs), pairs.clean.shape[1], "edges")
    return _in_chunks(model, pairs, rows, _lens, progress)["logit_diff"]


def tuned_lens(
    model: Any,
    pairs: Pairs,
    translate: Callable[[Tensor, int], Tensor] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """As `logit_lens`, of what an affine map makes of each stream: Float[layer, pair].

    Args:
        model: As `open_model` gives it.
        pairs: Prompts, also of several layouts. Clusters are dealt into two halves; each is read by the maps of the other.
        translate: A lens that is given, of (stream [pair, D] after a layer, the layer); None: least squares.
        progress: Called with (done, total).

    Raises:
        InputError: For pairs that all share a prompt, where no map is given.
    """
    clusters = pairs.clusters
    if translate is None and int(clusters.max()) == 0:
        raise InputError("A tuned lens is fitted on other prompts than it reads: give pairs of different prompts.")
    rows = rows_per_pass(model, pairs.clean.shape[1], "edges")
    with pair_named(model, pairs):
        return call(model, _tuned, pairs.without_text(), clusters % 2, rows, translate, progress=progress)["logit_diff"]


def exchanged(
    model: Any, pairs: Pairs, other: Tensor, nodes: Sequence[str], progress: Progress | None = None
) -> Tensor:
    """Logit differences of the clean prompts in which a node's output at the last token is that of other prompts.

    Args:
        model: As `open_model` gives it.
        pairs: Prompts of one layout.
        other: Long[pair, pos], the prompts that the outputs are taken from.
        nodes: As in tables.
        progress: Called with (done, total).

    Returns:
        Float[2 + node, pair]: of the clean prompts, of the others, and with each node's output exchanged.
    """
    universe = universe_of(model, n_positions=pairs.clean.shape[1])
    last = int(pairs.last[0])
    edges = [(item.source, item.target) for item in universe.items() if item.position == last]
    sets = [[Item(source, target, last) for source, target in edges if source == node] for node in nodes]
    masks = masks_of([[], *sets], universe, pairs.clean.shape[1])
    given = replace(pairs.without_text(), corrupted=other)
    rows = rows_per_pass(model, pairs.clean.shape[1], "edges")
    return call(model, _exchanged, given, masks, rows, progress=progress)


def _in_chunks(model, pairs: Pairs, rows: int, work, progress: Progress | None) -> dict[str, Tensor]:
    bare = pairs.without_text()
    chunks = [(bare[first : first + rows],) for first in range(0, len(pairs), rows)]
    with pair_named(model, pairs):
        found = each_chunk(model, work, chunks, progress=progress)
    return {name: torch.cat([each[name] for each in found], -1) for name in found[0]}


def _direct(model, pairs: Pairs, *, progress: Progress | None = None) -> dict[str, Tensor]:
    # Gradients are to be had inside torch.inference_mode too, from tensors that were made outside it.
    with torch.inference_mode(False):
        return _direct_chunk(model, replace(pairs, clean=pairs.clean.clone(), corrupted=pairs.corrupted.clone()))


def _direct_chunk(model, pairs: Pairs) -> dict[str, Tensor]:
    nodes, mixer = nodes_of(model), family_of(model).mixer
    mixers = [node for node in nodes if node.mixer]
    leaves: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}

    def leaf(name: str):
        def edit(value: Tensor) -> Tensor:
            leaves[name] = value.detach().requires_grad_()
            return leaves[name]

        return edit

    def keep(name: str):
        return lambda value: seen.__setitem__(name, value)

    fixed, observe = relevance.hooks(model, ("norm",))
    # Nodes read copies that lead no gradient back: what is left is each one's own way to the end.
    edits = {name: torch.Tensor.detach for name in sink_hooks(nodes)[:-1]}
    edits |= {"hook_norm": fixed["hook_norm"], "hook_embed": leaf("hook_embed")}
    stream = sink_hooks(nodes)[-1]
    observe = {stream: observe[stream], **{name: keep(name) for name in source_hooks(nodes)[1:]}}
    for node in mixers:
        name = f"blocks.{node.layer}.hook_"
        edits[f"{name}after_skip"] = leaf(f"{name}after_skip")
        observe |= {f"{name}{site}": keep(f"{name}{site}") for site in (*SPLIT, "y", "ssm_output")}

    def attribute(saved: dict[str, Tensor]) -> dict[str, Tensor]:
        scores = pairs.scores(saved["hook_logits"])
        difference = logit_diff(scores, pairs.answer.to(scores.device), pairs.wrong.to(scores.device))
        names = list(leaves)
        gradients = dict(zip(names, torch.autograd.grad(difference.sum(), [leaves[n] for n in names]), strict=True))
        with torch.no_grad():
            # Whatever is added to the stream leads to the end by the same way as the embeddings.
            to_end = gradients["hook_embed"]
            outputs = [leaves["hook_embed"], *(seen[name] for name in source_hooks(nodes)[1:])]
            of_nodes = torch.stack([(to_end * output).flatten(1).sum(1) for output in outputs])
            state, skip = [], []
            for node in mixers:
                name = f"blocks.{node.layer}.hook_"
                y, out = seen[f"{name}y"], seen[f"{name}ssm_output"]
                after = f"{name}after_skip"
                # The gate, and a gated norm's scale, are a factor by channel.
                factor = gradients[after] * relevance.quotient(leaves[after].to(out.dtype), out)
                x, delta, A, B, C = (seen[f"{name}{site}"] for site in SPLIT)
                wide = torch.promote_types(delta.dtype, torch.float32)
                factor_, x_, delta_ = (each.to(wide) for each in (factor, x, delta))
                flows = mixer.flow_products(
                    factor_, x_, delta_, A, B.to(wide), C.to(wide)
                )  # [pair, head, target, source]
                state.append(flows.sum((1, 2)).T)
                skip.append((factor * (out - y)).flatten(1).sum(1))
        found = {
            "nodes": of_nodes,
            "state": torch.stack(state),
            "skip": torch.stack(skip),
            "logit_diff": difference.detach(),
        }
        return {key: value.float().cpu() for key, value in found.items()}

    with torch.enable_grad():
        return forward(
            model,
            pairs.clean.clone(),
            edits,
            observe=observe,
            logits_at=pairs.read_at,
            own_scan=True,
            reduce=attribute,
        )


def _lens(model, pairs: Pairs, *, progress: Progress | None = None) -> dict[str, Tensor]:
    return _lens_chunk(model, pairs)


def _lens_chunk(model, pairs: Pairs, translate: Callable[[Tensor, int], Tensor] | None = None) -> dict[str, Tensor]:
    n_layers = sizes_of(model).n_layers
    streams = [f"blocks.{layer}.hook_resid_post" for layer in range(n_layers)]
    found = []
    with torch.no_grad():
        clean = forward(model, pairs.clean, reads=streams, logits_at=pairs.read_at, own_scan=True)
        for layer, name in enumerate(streams):
            # Only the last block runs, and what it gives is replaced.
            start = Start(n_layers - 1, clean[streams[max(0, n_layers - 2)]], {}, {})
            given = clean[name] if translate is None else translate(clean[name], layer)
            read = forward(
                model, pairs.clean, {streams[-1]: given}, logits_at=pairs.read_at, own_scan=True, start=start
            )
            scores = pairs.scores(read["hook_logits"]).float()
            found.append(_difference(pairs, scores))
    return {"logit_diff": torch.stack(found)}


def _difference(pairs: Pairs, scores: Tensor) -> Tensor:
    return logit_diff(scores, pairs.answer.to(scores.device), pairs.wrong.to(scores.device)).cpu()


def _tuned(
    model,
    pairs: Pairs,
    half: Tensor,
    rows: int,
    translate: Callable[[Tensor, int], Tensor] | None,
    *,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    def read(some: Pairs, by: Callable[[Tensor, int], Tensor]) -> Tensor:
        parts = [some[first : first + rows] for first in range(0, len(some), rows)]
        return torch.cat([_lens_chunk(model, part, by)["logit_diff"] for part in parts], -1)

    if translate is not None:
        return {"logit_diff": read(pairs, translate)}
    n_layers = sizes_of(model).n_layers
    maps = [[_nearest_map(model, pairs[half != own], layer, rows) for layer in range(n_layers)] for own in (0, 1)]
    found = torch.zeros(n_layers, len(pairs))
    for own in (0, 1):
        here = (half == own).nonzero()[:, 0]

        def mapped(stream: Tensor, layer: int, own=own) -> Tensor:
            weight, bias = maps[own][layer]
            return (stream.double() + stream.double() @ weight + bias).to(stream.dtype)

        found[:, here] = read(pairs[here], mapped)
        if progress:
            progress(own + 1, 2)
    return {"logit_diff": found}


def _nearest_map(model, pairs: Pairs, layer: int, rows: int) -> tuple[Tensor, Tensor]:
    """(W, b) with stream + stream W + b nearest to the last stream at all tokens, by least squares, in float64."""
    last = sizes_of(model).n_layers - 1
    names = [f"blocks.{each}.hook_resid_post" for each in dict.fromkeys((layer, last))]
    width = sizes_of(model).letters["D"]
    products, moments = [], []
    for first in range(0, len(pairs), rows):
        part = pairs[first : first + rows]
        with torch.no_grad():
            got = forward(model, part.clean, reads=names, logits_at=part.read_at, own_scan=True)
        there = torch.arange(part.clean.shape[1]) <= part.last[:, None]  # what pads is no token
        x, y = (got[name][there.to(got[name].device)].double() for name in (names[0], names[-1]))
        one = torch.cat((x, torch.ones_like(x[:, :1])), 1)
        products.append(one.T @ one)
        moments.append(one.T @ (y - x))
    square, moment = (torch.stack(each).sum(0) for each in (products, moments))
    # A little of the mean square keeps directions that no prompt has where they are, as in the logit lens.
    ridge = RIDGE * square.diagonal()[:width].mean() * torch.eye(width + 1).to(square)
    solved = torch.linalg.solve(square + ridge, moment)
    return solved[:width], solved[width]


def _exchanged(model, pairs: Pairs, masks: Masks, rows: int, *, progress: Progress | None = None) -> Tensor:
    n_sets, found = masks.edges.shape[0], []
    for first in range(0, len(pairs), rows):
        part = pairs[first : first + rows]
        corrupted = corrupted_run(model, part, parts=False)
        of_sets = []
        step = max(1, rows // len(part))
        for begin in range(0, n_sets, step):
            group = Masks(*(mask[begin : begin + step] for mask in masks))
            of_sets.append(_difference(part, patched_run(model, part, corrupted, group)[0].float()))
        clean, *patched = torch.cat(of_sets)
        found.append(torch.stack([clean, _difference(part, corrupted.logits.float()), *patched]))
        if progress:
            progress(min(first + rows, len(pairs)), len(pairs))
    return torch.cat(found, -1)
