"""Edge patching: a clean run in which chosen edges and parts carry the corrupted run's values (equation 11).

    input_j := input_j + sum over patched i of alpha (corrupted output_i - output_i)            (11), (13)

output_i is that of the same pass, so patches upstream are seen downstream; input_j is the layer's own copy of the
residual stream (`hook_layer_input`), for the output node the stream after the last layer. alpha is 1 for patching
and between 0 and 1 on the path of integrated gradients (the paper prints equation 13 with the sign of output_i
turned; this is the form its code has). Many sets of items are tested in one pass: sets x pairs are its rows.

Parts: a conv slice is its tap applied to the corrupted conv input; `skip` is the gate branch; `ssm` is the state
that the read-out sees, y_t = C_t h_t with h of the corrupted run and C of this pass, D x untouched (appendix D.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ioi_mamba.circuits.graph import Item, Masks, masks_of, universe_of
from ioi_mamba.errors import InputError
from ioi_mamba.model.jobs import call, config_of, device_of
from ioi_mamba.model.portable import portable
from ioi_mamba.model.scan import selective_scan
from ioi_mamba.passes.forward import Edit, Given, Observer, Start, forward
from ioi_mamba.tasks.base import Pairs, check_pairs

_SSM_SITES = (
    "ssm_input",
    "delta",
    "B",
)  # what a corrupted state is recomputed from, 16 times smaller than the state


@portable
@dataclass(frozen=True)
class CorruptedRun:
    """What patches are taken from. outputs: per source node [pair, pos, D]; sites: hook name -> value, for parts."""

    outputs: list[Tensor]
    sites: dict[str, Tensor]
    logits: Tensor  # [pair, vocab] at the last position


@portable
@dataclass(frozen=True)
class PatchedRun:
    """A run with one set of items patched, which other sets can go on from.

    Where two sets agree on everything that enters or lies in the layers below some layer, so do their runs there.
    outputs: per source node [pair, pos, D]. dropped: the layers that were not run, see `dropped_layers`.
    """

    masks: Masks
    outputs: list[Tensor]
    dropped: list[int]

    def agrees_below(self, masks: Masks) -> int:
        """The lowest layer into which, or in which, any of these sets patches other items; the last if none does."""
        n_layers = masks.skip.shape[1]
        edges, conv, ssm, skip = (mask != other for mask, other in zip(masks, self.masks, strict=True))
        differs = edges.any(3).any(1)[:, :n_layers] | conv.flatten(2).any(2) | ssm.any(2) | skip.any(2)
        layers = torch.nonzero(differs.any(0))[:, 0].tolist()
        needed = set(self.dropped) - set(dropped_layers(masks))
        return min([*layers, *needed, n_layers - 1])


def dropped_layers(masks: Masks) -> list[int]:
    """The layers all of whose edges to later nodes are patched, at all positions in all sets.

    Whoever reads such a layer gets the corrupted run's output in place of its own, so the layer need not be run.
    """
    return [i for i in range(masks.skip.shape[1]) if bool((masks.edges[:, i + 1, i + 1 :] == 1).all())]


def source_hooks(n_layers: int) -> list[str]:
    """Hooks whose values are the outputs of the source nodes: embed, then every layer."""
    return ["hook_embed", *(f"blocks.{i}.hook_out_proj" for i in range(n_layers))]


def sink_hooks(n_layers: int) -> list[str]:
    """Hooks whose values are the inputs of the target nodes: every layer, then output."""
    return [
        *(f"blocks.{i}.hook_layer_input" for i in range(n_layers)),
        f"blocks.{n_layers - 1}.hook_resid_post",
    ]


def slice_hook(layer: int, tap: int, conv_width: int) -> str:
    """Hook of a conv slice by tap; tap 0 is the oldest."""
    return f"blocks.{layer}.hook_conv_slice.{tap + 1 - conv_width}"


def corrupted_run(model, pairs: Pairs, *, parts: bool) -> CorruptedRun:
    """Run the corrupted prompts once and keep what edge patches need, and with `parts` what parts need."""
    n, K = config_of(model).num_hidden_layers, config_of(model).conv_kernel
    sources = source_hooks(n)
    sites = []
    if parts:
        for i in range(n):
            sites += [slice_hook(i, k, K) for k in range(K)]
            sites += [f"blocks.{i}.hook_{site}" for site in ("skip", *_SSM_SITES)]
    with torch.no_grad():
        kept = forward(model, pairs.corrupted, reads=[*sources, *sites], logits_at=pairs.read_at, own_scan=True)
    logits = pairs.scores(kept.pop("hook_logits"))
    return CorruptedRun([kept.pop(name) for name in sources], kept, logits)


class Patch:
    """Edits and observers of one pass that carries out `masks` (see `graph.Masks`).

    Rows of the pass are sets x pairs, sets first. detach: stop gradients through output_i in the sum. known: outputs
    [pair, pos, D] of the first source nodes, the same in all sets; the pass then begins at layer len(known) - 1.
    dropped: layers that are not run, see `dropped_layers`; their output is the corrupted run's.
    After the pass `outputs` holds output_i and `sinks` input_j, both as this pass had them.
    """

    def __init__(
        self,
        model,
        corrupted: CorruptedRun,
        masks: Masks,
        *,
        detach: bool = False,
        known: Sequence[Tensor] = (),
        dropped: Sequence[int] = (),
    ):
        self.n_layers, self.conv_width = config_of(model).num_hidden_layers, config_of(model).conv_kernel
        self.corrupted, self.detach = corrupted, detach
        self.masks = Masks(*(mask.to(device_of(model), copy=True) for mask in masks))
        self.outputs: list[Tensor] = list(known)
        self.sinks: dict[int, Tensor] = {}
        self._now: dict[str, Tensor] = {}
        self._differences: list[Tensor] = []  # corrupted output_i - output_i, [set or 1, pair, pos, D]
        self._n_known, self._dropped = len(known), dropped
        # A reader of a dropped layer has nothing left to exchange.
        for layer in dropped:
            self.masks.edges[:, layer + 1] = 0

    def hooks(self) -> tuple[dict[str, Edit], dict[str, Observer]]:
        """The edits and the observers. Not kept here: they refer to this object, and its tensors must go with it."""
        first, n_sets = max(0, self._n_known - 1), self.masks.edges.shape[0]
        edits: dict[str, Edit] = {}
        observe = dict.fromkeys(source_hooks(self.n_layers)[self._n_known :], self.outputs.append)
        for j, name in enumerate(sink_hooks(self.n_layers)):
            if j >= first and j not in self._dropped and self.masks.edges[:, :, j].any():
                edits[name] = self._sink(j)
        for layer in range(first, self.n_layers):
            if layer in self._dropped:
                edits[f"blocks.{layer}.hook_out_proj"] = self.corrupted.outputs[layer + 1].repeat(n_sets, 1, 1)
            else:
                self._parts(layer, edits, observe)
        return edits, observe

    def _rows(self, mask: Tensor, value: Tensor) -> Tensor:
        """A mask [set, pos] against rows [set x pair, pos, width]."""
        return mask.repeat_interleave(value.shape[0] // mask.shape[0], dim=0)[..., None]

    def _toward(self, mask: Tensor, value: Tensor, target: Tensor) -> Tensor:
        """value + mask (target - value), target given once per pair."""
        sets = value.unflatten(0, (mask.shape[0], -1))
        return torch.lerp(sets, target.expand_as(sets), mask[:, None, :, None].to(value.dtype)).flatten(0, 1)

    def _difference(self, i: int) -> Tensor:
        while len(self._differences) <= i:
            k = len(self._differences)
            output = self.outputs[k].detach() if self.detach else self.outputs[k]
            output = output[None] if k < self._n_known else output.unflatten(0, (self.masks.edges.shape[0], -1))
            self._differences.append(self.corrupted.outputs[k] - output)
        return self._differences[i]

    def _sink(self, j: int) -> Edit:
        mask = self.masks.edges[:, :, j, None, :, None]
        patched = [i for i in range(j + 1) if mask[:, i].any()]
        # What all sets add alike, from sources that are the same in all of them, is summed once.
        alike = [i for i in patched if i < self._n_known and bool((mask[:, i] == mask[:1, i]).all())]

        def write(x: Tensor) -> Tensor:
            x = x.unflatten(0, (mask.shape[0], -1))
            if alike:
                shared = mask[:1, alike[0]] * self._difference(alike[0])
                for i in alike[1:]:
                    shared = torch.addcmul(shared, mask[:1, i], self._difference(i))
                x = x + shared
            for i in patched:
                if i not in alike:
                    x = torch.addcmul(x, mask[:, i], self._difference(i))
            self.sinks[j] = x = x.flatten(0, 1)
            return x

        return write

    def _parts(self, layer: int, edits: dict[str, Edit], observe: dict[str, Observer]) -> None:
        taps = [tap for tap in range(self.conv_width) if self.masks.conv[:, layer, tap].any()]
        for tap in taps:
            name = slice_hook(layer, tap, self.conv_width)
            observe[name] = self._keep(name)
        if taps:
            edits[f"blocks.{layer}.hook_conv"] = lambda x, layer=layer, taps=taps: self._conv(layer, taps, x)
        name, mask = f"blocks.{layer}.hook_skip", self.masks.skip[:, layer]
        if mask.any():
            edits[name] = lambda x, mask=mask, target=self.corrupted.sites[name]: self._toward(mask, x, target)
        if self.masks.ssm[:, layer].any():
            observe[f"blocks.{layer}.hook_A"] = self._keep(f"{layer}.A")
            observe[f"blocks.{layer}.hook_C"] = self._keep(f"{layer}.C")
            if self.masks.ssm[:, layer].eq(1).all():
                edits[f"blocks.{layer}.hook_y"] = Given(lambda layer=layer: self._read_out(layer))
            else:
                edits[f"blocks.{layer}.hook_y"] = lambda y, layer=layer: self._ssm(layer, y)

    def _keep(self, key: str) -> Observer:
        return lambda value: self._now.__setitem__(key, value)

    def _conv(self, layer: int, taps: list[int], x: Tensor) -> Tensor:
        """The convolution is the sum of its slices, so what changes in these is added to it."""
        mask = self.masks.conv[:, layer, :, None, :, None]
        sets = x.unflatten(0, (mask.shape[0], -1))
        for tap in taps:
            name = slice_hook(layer, tap, self.conv_width)
            difference = self.corrupted.sites[name] - self._now[name].unflatten(0, (mask.shape[0], -1))
            sets = torch.addcmul(sets, mask[:, tap], difference)
        return sets.flatten(0, 1)

    def _ssm(self, layer: int, y: Tensor) -> Tensor:
        mask = self._rows(self.masks.ssm[:, layer], y)
        rows = torch.nonzero(mask.flatten(1).any(1))[:, 0]
        return y.index_add(0, rows, mask[rows] * (self._read_out(layer, rows) - y[rows]))

    def _read_out(self, layer: int, rows: Tensor | None = None) -> Tensor:
        A, C = self._now[f"{layer}.A"], self._now[f"{layer}.C"]
        rows = torch.arange(len(C), device=C.device) if rows is None else rows
        return corrupted_read_out(self.corrupted, layer, A, C, rows)


def corrupted_read_out(corrupted: CorruptedRun, layer: int, A: Tensor, C: Tensor, rows: Tensor) -> Tensor:
    """C_t h_t [row, pos, E] with the corrupted run's states and this pass' C, for some rows of sets x pairs."""
    x, delta, B = (corrupted.sites[f"blocks.{layer}.hook_{site}"] for site in _SSM_SITES)
    of_pair = rows % len(x)
    wide = delta.dtype
    y, _ = selective_scan(x[of_pair].to(wide), delta[of_pair], A, B[of_pair].to(wide), C[rows].to(wide))
    return y


def needs_parts(masks: Masks) -> bool:
    """Whether any conv slice, ssm or skip is patched."""
    return bool(masks.conv.any() or masks.ssm.any() or masks.skip.any())


def patched_logits(model, pairs: Pairs, corrupted: CorruptedRun, masks: Masks, *, everywhere: bool = False) -> Tensor:
    """Logits [set, pair, vocab] at the last position, or with `everywhere` [set, pair, pos, vocab]."""
    return _patched(model, pairs, masks, Patch(model, corrupted, masks), everywhere)


def patched_run(
    model, pairs: Pairs, corrupted: CorruptedRun, masks: Masks, before: PatchedRun | None = None
) -> tuple[Tensor, PatchedRun]:
    """Logits [set, pair, vocab] at the last position, and the run of the first set.

    before: an earlier run of the same pairs: the pass starts at the first layer where a set differs from it, and runs
    no layer that nobody reads. None: everything is run.
    """
    known = [] if before is None else before.outputs[: before.agrees_below(masks) + 1]
    dropped = [] if before is None else dropped_layers(masks)
    # A layer below the start that is dropped only now was run before: its readers get the corrupted output from here on.
    known = [corrupted.outputs[i] if i - 1 in dropped else output for i, output in enumerate(known)]
    patch = Patch(model, corrupted, masks, known=known, dropped=dropped)
    logits = _patched(model, pairs, masks, patch, False)
    # Copies, so that the rows of the other sets are let go.
    own = [output[: len(pairs)].clone() for output in patch.outputs[len(known) :]]
    return logits, PatchedRun(Masks(*(mask[:1] for mask in masks)), [*known, *own], dropped)


def _patched(model, pairs: Pairs, masks: Masks, patch: Patch, everywhere: bool) -> Tensor:
    n_sets, first, start = masks.edges.shape[0], len(patch.outputs) - 1, None
    if first > 0:
        # The residual stream is the sum of all outputs below, added up in the order and dtype of the model.
        in_fp32, stream = config_of(model).residual_in_fp32, patch.outputs[0]
        for output in patch.outputs[1:]:
            stream = (stream.float() if in_fp32 else stream) + output
        start = Start(first, stream.repeat(n_sets, 1, 1), {}, {})
    edits, observe = patch.hooks()
    with torch.no_grad():
        logits = forward(
            model,
            pairs.clean.repeat(n_sets, 1),
            edits,
            observe=observe,
            logits_at=None if everywhere else pairs.read_at.repeat(n_sets, 1),
            own_scan=True,
            start=start,
        )["hook_logits"]
    logits = logits.unflatten(0, (n_sets, -1))
    return logits if everywhere else pairs.scores(logits)


def patch_edges(model, pairs: Pairs, edges: Iterable[Sequence], positions: Sequence[int] | None = None) -> Tensor:
    """Logits [pair, pos, vocab] of the clean prompts with these edges patched (equation 11).

    edges: (source, target), (source, target, position) or (source, target, position, part); nodes are "embed",
    "0".., "output"; parts "conv-3".."conv0", "ssm", "skip" with source = target. positions: where edges without a
    position are patched; default everywhere. Raises InputError for what is no edge of the model.
    """
    check_pairs(pairs)
    items = []
    for edge in edges:
        if not 2 <= len(edge) <= 4:
            raise InputError(f"{tuple(edge)} is no edge: give (source, target[, position[, part]]).")
        item = Item(str(edge[0]), str(edge[1]), *edge[2:])
        spread = positions is not None and item.position is None
        items += [item._replace(position=p) for p in positions or ()] if spread else [item]
    masks = masks_of([items], universe_of(model, parts=True), pairs.clean.shape[1])
    return call(model, _patched_everywhere, pairs.without_text(), masks)


def _patched_everywhere(model, pairs: Pairs, masks: Masks, *, progress=None) -> Tensor:
    corrupted = corrupted_run(model, pairs, parts=needs_parts(masks))
    return patched_logits(model, pairs, corrupted, masks, everywhere=True)[0]
