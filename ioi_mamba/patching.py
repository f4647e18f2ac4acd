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

from .errors import InputError
from .graph import Item, Masks, masks_of, universe_of
from .interventions import Edit, Observer, forward
from .jobs import call, config_of, device_of
from .portable import portable
from .scan import selective_scan
from .tasks.base import Pairs

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
        kept = forward(model, pairs.corrupted, reads=[*sources, *sites], logits_at=pairs.last, own_scan=True)
    logits = kept.pop("hook_logits")[:, 0]
    return CorruptedRun([kept.pop(name) for name in sources], kept, logits)


class Patch:
    """Edits and observers of one pass that carries out `masks` (see `graph.Masks`).

    Rows of the pass are sets x pairs, sets first. detach: stop gradients through output_i in the sum.
    After the pass `outputs` holds output_i and `sinks` input_j, both as this pass had them.
    """

    def __init__(self, model, corrupted: CorruptedRun, masks: Masks, *, detach: bool = False):
        self.n_layers, self.conv_width = config_of(model).num_hidden_layers, config_of(model).conv_kernel
        self.corrupted, self.detach = corrupted, detach
        self.masks = Masks(*(mask.to(device_of(model)) for mask in masks))
        self.outputs: list[Tensor] = []
        self.sinks: dict[int, Tensor] = {}
        self._now: dict[str, Tensor] = {}
        self.edits: dict[str, Edit] = {}
        self.observe: dict[str, Observer] = dict.fromkeys(source_hooks(self.n_layers), self.outputs.append)
        for j, name in enumerate(sink_hooks(self.n_layers)):
            if self.masks.edges[:, :, j].any():
                self.edits[name] = self._sink(j)
        for layer in range(self.n_layers):
            self._parts(layer)

    def _rows(self, mask: Tensor, value: Tensor) -> Tensor:
        """A mask [set, pos] against rows [set x pair, pos, width]."""
        return mask.repeat_interleave(value.shape[0] // mask.shape[0], dim=0)[..., None]

    def _toward(self, mask: Tensor, value: Tensor, target: Tensor) -> Tensor:
        """value + mask (target - value), target given once per pair."""
        n_sets = mask.shape[0]
        target = target.repeat(n_sets, *[1] * (target.ndim - 1)) if n_sets > 1 else target
        return value + self._rows(mask, value) * (target - value)

    def _sink(self, j: int) -> Edit:
        mask = self.masks.edges[:, :, j]

        def patched(x: Tensor) -> Tensor:
            n_sets = mask.shape[0]
            for i in range(j + 1):
                if mask[:, i].any():
                    output = self.outputs[i].detach() if self.detach else self.outputs[i]
                    difference = self.corrupted.outputs[i] - output.unflatten(0, (n_sets, -1))
                    x = x + (mask[:, i, None, :, None] * difference).flatten(0, 1)
            self.sinks[j] = x
            return x

        return patched

    def _parts(self, layer: int) -> None:
        for tap in range(self.conv_width):
            mask = self.masks.conv[:, layer, tap]
            if mask.any():
                name = slice_hook(layer, tap, self.conv_width)
                target = self.corrupted.sites[name]
                self.edits[name] = lambda x, mask=mask, target=target: self._toward(mask, x, target)
        name, mask = f"blocks.{layer}.hook_skip", self.masks.skip[:, layer]
        if mask.any():
            self.edits[name] = lambda x, mask=mask, target=self.corrupted.sites[name]: self._toward(mask, x, target)
        if self.masks.ssm[:, layer].any():
            self.observe[f"blocks.{layer}.hook_A"] = self._keep(f"{layer}.A")
            self.observe[f"blocks.{layer}.hook_C"] = self._keep(f"{layer}.C")
            self.edits[f"blocks.{layer}.hook_y"] = lambda y, layer=layer: self._ssm(layer, y)

    def _keep(self, key: str) -> Observer:
        return lambda value: self._now.__setitem__(key, value)

    def _ssm(self, layer: int, y: Tensor) -> Tensor:
        mask = self._rows(self.masks.ssm[:, layer], y)
        rows = torch.nonzero(mask.flatten(1).any(1))[:, 0]
        read_out = corrupted_read_out(self.corrupted, layer, self._now[f"{layer}.A"], self._now[f"{layer}.C"], rows)
        return y.index_add(0, rows, mask[rows] * (read_out - y[rows]))


def corrupted_read_out(corrupted: CorruptedRun, layer: int, A: Tensor, C: Tensor, rows: Tensor) -> Tensor:
    """C_t h_t [row, pos, E] with the corrupted run's states and this pass' C, for some rows of sets x pairs."""
    x, delta, B = (corrupted.sites[f"blocks.{layer}.hook_{site}"] for site in _SSM_SITES)
    of_pair = rows % len(x)
    y, _ = selective_scan(x[of_pair].to(A.dtype), delta[of_pair], A, B[of_pair].to(A.dtype), C[rows].to(A.dtype))
    return y


def needs_parts(masks: Masks) -> bool:
    """Whether any conv slice, ssm or skip is patched."""
    return bool(masks.conv.any() or masks.ssm.any() or masks.skip.any())


def patched_logits(model, pairs: Pairs, corrupted: CorruptedRun, masks: Masks, *, everywhere: bool = False) -> Tensor:
    """Logits [set, pair, vocab] at the last position, or with `everywhere` [set, pair, pos, vocab]."""
    n_sets = masks.edges.shape[0]
    patch = Patch(model, corrupted, masks)
    last = None if everywhere else pairs.last.repeat(n_sets)
    with torch.no_grad():
        logits = forward(
            model,
            pairs.clean.repeat(n_sets, 1),
            patch.edits,
            observe=patch.observe,
            logits_at=last,
            own_scan=True,
        )["hook_logits"]
    return (logits if everywhere else logits[:, 0]).unflatten(0, (n_sets, -1))


def patch_edges(model, pairs: Pairs, edges: Iterable[Sequence], positions: Sequence[int] | None = None) -> Tensor:
    """Logits [pair, pos, vocab] of the clean prompts with these edges patched (equation 11).

    edges: (source, target), (source, target, position) or (source, target, position, part); nodes are "embed",
    "0".., "output"; parts "conv-3".."conv0", "ssm", "skip" with source = target. positions: where edges without a
    position are patched; default everywhere. Raises InputError for what is no edge of the model.
    """
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
