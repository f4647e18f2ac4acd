"""How the answer is read off the residual stream: what each node adds to it directly, and what each layer would answer.

The last norm's scale is held fixed, so that the logit difference is linear in the stream: what the nodes add to the stream
sums to it exactly ("direct logit attribution"). A mixer's share is split further, into what its state gives from each
source position and D x. The "logit lens" reads each layer's stream as if it were the last.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ioi_mamba.circuits import relevance
from ioi_mamba.circuits.patching import nodes_of, sink_hooks, source_hooks
from ioi_mamba.model.families import family_of, sizes_of
from ioi_mamba.model.jobs import device_of, each_chunk
from ioi_mamba.model.memory import rows_per_chunk
from ioi_mamba.passes.forward import Start, forward
from ioi_mamba.passes.metrics import logit_diff
from ioi_mamba.passes.sweep import Progress, pair_named
from ioi_mamba.tasks.base import Pairs

SPLIT = ("ssm_input", "delta", "A", "B", "C")
"""The sites from which the state's share of a read-out is split by source."""


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
    n_layers = sizes_of(model).n_layers
    streams = [f"blocks.{layer}.hook_resid_post" for layer in range(n_layers)]
    found = []
    with torch.no_grad():
        clean = forward(model, pairs.clean, reads=streams, logits_at=pairs.read_at, own_scan=True)
        for name in streams:
            # Only the last block runs, and what it gives is replaced.
            start = Start(n_layers - 1, clean[streams[max(0, n_layers - 2)]], {}, {})
            read = forward(
                model, pairs.clean, {streams[-1]: clean[name]}, logits_at=pairs.read_at, own_scan=True, start=start
            )
            scores = pairs.scores(read["hook_logits"]).float()
            answer, wrong = pairs.answer.to(device_of(model)), pairs.wrong.to(device_of(model))
            found.append(logit_diff(scores, answer, wrong).cpu())
    return {"logit_diff": torch.stack(found)}
