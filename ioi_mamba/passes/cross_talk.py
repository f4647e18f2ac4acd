"""The greedy search for the layers that must let tokens see each other (paper 4.1.3).

It begins with every layer ablated at all positions, and at each step gives the layer back that leaves the highest
accuracy. Ablated is what a layer makes of its conv input; resampled, that is to exchange the conv input itself.

How it is fast, and exact. What an ablated layer's recurrence gives does not depend on the layers below: it is kept and
never run again. And above the highest layer that is given back no position sees another, so only the
last one is run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import nnsight
import torch
from torch import Tensor

from ioi_mamba.model.families import blocks_of, family_of, head_of, open_layer, sizes_of
from ioi_mamba.model.jobs import device_of
from ioi_mamba.passes import metrics
from ioi_mamba.passes.ablations import Ablation, Spread, replaced, spread_of
from ioi_mamba.passes.forward import forward, give_logits_of, without_mask
from ioi_mamba.passes.sweep import Roll, block_sites, layer_count
from ioi_mamba.tasks.base import Pairs

SCANNED = ("ssm_input", "y")
"""What a layer makes of its conv input, of all positions, on the way to its output: all that ablating changes."""

NO_LAYER = -1

Score = tuple[float, float, float]
"""(accuracy among the names, mean probability of the answer among them, variance of the accuracy by cluster)"""


def _rows_per_pass(model, pairs: Pairs) -> int:
    """How many prompts keep what is held of them (`_Rows`) within 1 GiB, or 8 GiB on an accelerator."""
    sizes, sites = sizes_of(model), family_of(model).sites
    held = sizes.n_layers * sum(
        math.prod(sizes.shape(sites[site], 1, pairs.clean.shape[1])) for site in (*SCANNED, "resid_pre")
    )
    budget = (1 if torch.device(device_of(model)).type == "cpu" else 8) * 2**30
    return max(1, budget // (4 * held))


def search(
    model,
    pairs: Pairs,
    threshold: float,
    rows: int | None,
    ablation: Ablation,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Float64[candidate, 6]: step, layer or -1, accuracy, probability, variance of accuracy, chosen; a function for `each_chunk`."""
    total = layer_count(model) * (layer_count(model) + 1) // 2

    def report(done: int) -> None:
        if progress is not None:
            progress(done, total)

    with torch.no_grad():
        return _greedy(model, pairs, threshold, rows or _rows_per_pass(model, pairs), ablation, report)


def _greedy(
    model, pairs: Pairs, threshold: float, rows: int, ablation: Ablation, report: Callable[[int], None]
) -> Tensor:
    """The search in one group; see `search` for what is returned."""
    clusters = pairs.clusters
    parts = list(torch.arange(len(pairs)).split(rows))
    names = [name for site in SCANNED for name in block_sites(site, range(layer_count(model)))]
    spread = spread_of(model, pairs, names, ablation, rows)
    left, circuit, records = list(range(layer_count(model))), [], []
    held, done = None, 0
    for step in range(len(left) + 1):
        seen: dict[int, list[Tensor]] = {}
        for part in parts:
            # A group of one part is held from step to step; several are made anew, so that one fits at a time.
            if held is None or len(parts) > 1:
                held = _Rows(model, pairs[part], spread, part)
            held.give_back(circuit)
            for layer in [NO_LAYER] if step == 0 else left:
                seen.setdefault(layer, []).append(held.scores(None if layer == NO_LAYER else layer))
                done += layer != NO_LAYER and part is parts[-1]
                report(done)
        means = {layer: _mean(torch.cat(scores, 1), clusters) for layer, scores in seen.items()}
        # max keeps the first of equals, which is the lowest layer.
        best = max(means, key=lambda layer, means=means: means[layer][:2])
        records += [(step, layer, *score, layer == best and layer != NO_LAYER) for layer, score in means.items()]
        if best != NO_LAYER:
            circuit.append(best)
            left.remove(best)
        if means[best][0] > threshold:
            break
    return torch.tensor(records, dtype=torch.float64)


def _mean(scores: Tensor, clusters: Tensor) -> Score:
    accuracy, probability = scores.double().mean(1).tolist()
    return accuracy, probability, float(metrics.clustered_variance(scores[0], clusters))


class _Rows:
    """Some prompts with all but a few layers ablated, and what a candidate's pass begins with.

    values: what is written at SCANNED, per layer [row, pos, E]; at_last: the same at the last position,
    [row, 1, E]. streams: per layer [row, pos, D], the residual stream that enters it when the layers of `circuit` are
    given back.
    """

    def __init__(self, model, pairs: Pairs, spread: Spread, rows: Tensor):
        self.model, self.pairs = model, pairs
        self.tokens, self.last = pairs.clean.to(device_of(model)), pairs.last.to(device_of(model))
        layers = range(layer_count(model))
        names = {site: block_sites(site, layers) for site in SCANNED}
        reads = [name for each in names.values() for name in each]
        written = replaced(model, pairs, reads, spread, rows)
        self.values = {site: [written[name] for name in names[site]] for site in names}
        index = torch.arange(len(pairs), device=self.tokens.device)
        self.at_last = {site: [v[index, self.last][:, None] for v in values] for site, values in self.values.items()}
        self.choices = pairs.choices.clamp(min=0)[:, None].to(device_of(model))
        self.circuit: frozenset[int] = frozenset()
        self._run_from(0, None)

    def give_back(self, layers: Iterable[int]) -> None:
        """Make `layers` the ones that are not ablated."""
        changed = self.circuit ^ frozenset(layers)
        if changed:
            self.circuit = frozenset(layers)
            first = min(changed)
            self._run_from(first, self.streams[first])

    def _run_from(self, first: int, stream: Tensor | None) -> None:
        """The streams from layer `first` on, and the logits, of all positions."""
        layers = range(first, layer_count(self.model))
        edits = {
            f"blocks.{i}.hook_{site}": self.values[site][i]
            for site in self.values
            for i in layers
            if i not in self.circuit
        }
        start = None if stream is None else Roll.begin(self.model, self.tokens).start(first, stream)
        names = block_sites("resid_pre", layers)
        last = self.last[:, None]
        run = forward(
            self.model,
            self.tokens,
            edits,
            names,
            logits_at=last,
            logits_of=self.choices,
            start=start,
            own_scan=True,
        )
        self.logits = run["hook_logits"][:, 0]
        self.streams = [*(self.streams[:first] if first else []), *(run[name] for name in names)]

    def scores(self, layer: int | None) -> Tensor:
        """[accuracy or probability, row] with `layer` given back too; None: as it is."""
        logits = (self.logits if layer is None else self._candidate(layer)).float().cpu()
        # The logits are those of the choices alone, so that a choice is its own number.
        choices = self.pairs.choices
        numbers = torch.where(choices < 0, -1, torch.arange(choices.shape[1]))
        answer = (choices == self.pairs.answer[:, None]).int().argmax(1)
        probability = metrics.relative_probability(logits, answer, numbers)
        self.pairs.check_finite("probabilities", probability)
        return torch.stack([metrics.accuracy(logits, answer, numbers), probability])

    def _candidate(self, layer: int) -> Tensor:
        """Logits [row, choice] at the last position with `layer` given back too."""
        blocks, stream, n_layers = blocks_of(self.model), self.streams[layer], layer_count(self.model)
        head = head_of(self.model)
        clean = self.circuit | {layer}
        highest = max(clean)
        index = torch.arange(len(stream), device=stream.device)
        with self.model.trace(self.tokens, use_cache=False):
            without_mask(self.model)
            for i in range(layer):
                blocks[i].skip(stream)
            for i in range(layer, highest + 1):
                self._walk(i, None if i in clean else self.values)
            for i in range(highest + 1, n_layers):
                # No position above sees another: from here on only the last one is carried.
                if i == highest + 1:
                    blocks[i].input = blocks[i].input[index, self.last][:, None]
                self._walk(i, self.at_last)
            if highest + 1 == n_layers:
                head.input = head.input[index, self.last][:, None]
            give_logits_of(head, head.input, self.choices)
            logits = nnsight.save(head.output)
        return logits[:, 0]

    def _walk(self, layer: int, values: dict[str, list[Tensor]] | None) -> None:
        """Run one layer as it is, or with `values` in place of its own."""
        mixer = open_layer(self.model, layer, alone=True)
        if values is None:
            mixer.own_scan()
        else:
            for site in SCANNED:
                mixer.set(site, values[site][layer])
        mixer.finish()
