"""Edge patching: a clean run in which chosen edges and parts carry the corrupted run's values (equation 11).

    input_j := input_j + sum over patched i of alpha (corrupted output_i - output_i)            (11), (13)

With another kind of ablation (`passes.ablations`) what that kind writes stands in the place of the corrupted run's values.

output_i is that of the same pass, so patches upstream are seen downstream; input_j is the layer's own copy of the
residual stream (`hook_layer_input`), for the output node the stream after the last layer. alpha is 1 for patching
and between 0 and 1 on the path of integrated gradients (the paper prints equation 13 with the sign of output_i
turned; this is the form its code has). Many sets of items are tested in one pass: sets x pairs are its rows.

What is put in the place of a part inside a layer stands in the part's record (`family.Part`; appendix D.2): resampled, a
state is made of the corrupted run's inputs of the scan and read out with the pass' own C. Other kinds of ablation
overwrite the part's own value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ioi_mamba.circuits.features import Features, columns_of
from ioi_mamba.circuits.graph import Item, Masks, Universe, masks_of, universe_of
from ioi_mamba.errors import InputError
from ioi_mamba.model.families import block_of, family_of, sizes_of
from ioi_mamba.model.family import MAMBA_WRITER, Part, Writer
from ioi_mamba.model.jobs import call, device_of
from ioi_mamba.model.memory import rows_per_chunk
from ioi_mamba.model.portable import portable
from ioi_mamba.passes.ablations import RESAMPLE, Ablation, AblationName, Spread, ablation_of, replaced, spread_of
from ioi_mamba.passes.forward import Edit, Given, Observer, Start, forward
from ioi_mamba.tasks.base import Pairs, check_pairs


@portable
class Node(NamedTuple):
    """A node between embed and output.

    Attributes:
        layer: Its block.
        group: Its place in the block; nodes of one place stand side by side.
        writer: What reads the stream there and adds to it.
        mixer: Whether it has parts.
    """

    layer: int
    group: int
    writer: Writer
    mixer: bool

    @property
    def place(self) -> tuple[int, int]:
        """Block and place in it."""
        return self.layer, self.group


def nodes_of(model) -> list[Node]:
    """The nodes between embed and output, in order."""
    return [
        Node(layer, group, writer, writer.name == MAMBA_WRITER.name)
        for layer in range(sizes_of(model).n_layers)
        for group, writers in enumerate(block_of(model, layer).writers)
        for writer in writers
    ]


@portable
@dataclass(frozen=True)
class CorruptedRun:
    """What patches are taken from: the corrupted run, or what another kind of ablation writes in its place.

    outputs: per source node [pair, pos, D]. sites: per node the values by site that parts and features take from it; none
    where none is patched. logits: [pair, vocab] of the corrupted prompts at the last position, whatever the kind. parts:
    those of a layer, as the kind patches them. features: those whose values are in `sites`.
    """

    outputs: list[Tensor]
    sites: list[dict[str, Tensor]]
    logits: Tensor
    parts: tuple[Part, ...]
    features: tuple[Features, ...] = ()


@portable
@dataclass(frozen=True)
class PatchedRun:
    """A run with one set of items patched, which other sets can go on from.

    Where two sets agree on everything that enters or lies in the layers below some layer, so do their runs there.
    outputs: per source node [pair, pos, D]. dropped: the nodes that were not run, see `dropped_nodes`.
    """

    nodes: list[Node]
    masks: Masks
    outputs: list[Tensor]
    dropped: list[int]
    features: tuple[Features, ...] = ()

    def agrees_below(self, masks: Masks) -> int:
        """The lowest layer into which, or in which, any of these sets patches other items; the last if none does."""
        edges, parts, features = (mask != other for mask, other in zip(masks, self.masks, strict=True))
        differs = edges.any(3).any(1)[:, : parts.shape[1]] | parts.flatten(2).any(2)
        nodes = torch.nonzero(differs.any(0))[:, 0].tolist()
        needed = set(self.dropped) - set(dropped_nodes(masks, self.nodes))
        of_features = zip(self.features, columns_of(self.features), strict=True)
        layers = [each.layer for each, columns in of_features if features[:, columns].any()]
        return min([*layers, *(self.nodes[w].layer for w in (*nodes, *needed, len(self.nodes) - 1))])


def dropped_nodes(masks: Masks, nodes: Sequence[Node]) -> list[int]:
    """The nodes all of whose edges to later nodes are patched, at all positions in all sets.

    Whoever reads such a node gets the corrupted run's output in place of its own, so it need not be run.
    """
    found = []
    for w, node in enumerate(nodes):
        # Nodes side by side have no edge between them.
        readers = [j for j in range(w + 1, len(nodes) + 1) if j == len(nodes) or nodes[j].place != node.place]
        if bool((masks.edges[:, w + 1, readers] == 1).all()):
            found.append(w)
    return found


def source_hooks(nodes: Sequence[Node]) -> list[str]:
    """Hooks whose values are the outputs of the source nodes: embed, then every node after it."""
    return ["hook_embed", *(f"blocks.{node.layer}.hook_{node.writer.adds}" for node in nodes)]


def sink_hooks(nodes: Sequence[Node]) -> list[str]:
    """Hooks whose values are the inputs of the target nodes: every node, then output."""
    return [
        *(f"blocks.{node.layer}.hook_{node.writer.reads}" for node in nodes),
        f"blocks.{nodes[-1].layer}.hook_resid_post",
    ]


def parts_of(model, ablation: Ablation = RESAMPLE) -> tuple[Part, ...]:
    """The parts that a layer of the model has, in the order of the tables, as a kind of ablation patches them."""
    parts = family_of(model).mixer.parts(sizes_of(model).conv_width)
    if ablation.name == RESAMPLE.name:
        return parts
    return tuple(
        replace(part, corrupted=(part.own,), now=(part.own,) if part.is_term else (), made=None) for part in parts
    )


def corrupted_sites(parts: Iterable[Part]) -> list[str]:
    """The sites of a layer that some part takes from the corrupted run, each once."""
    return list(dict.fromkeys(site for part in parts for site in part.corrupted))


def kept_floats(model, universe: Universe, n_positions: int) -> int:
    """How many numbers of one pair a corrupted run and a patched one keep."""
    sites, sizes = family_of(model).sites, sizes_of(model)
    inside = corrupted_sites(universe.of_layer) if universe.parts else ()
    floats = lambda name: math.prod(sizes.shape(sites[name.split(".")[0]], 1, n_positions))
    of_features = sum(floats(site) for each in universe.features for site in {each.reads, each.writes})
    of_mixers = len(universe.mixers) * sum(map(floats, inside))
    return 2 * len(universe.writers) * n_positions * sizes.letters["D"] + of_mixers + of_features


def node_of(features: Features, nodes: Sequence[Node]) -> int:
    """The number of the node that features are of, among those between embed and output."""
    name = features.node.partition(".")[2]
    return next(w for w, node in enumerate(nodes) if node.layer == features.layer and name in ("", node.writer.name))


def kind_of_patches(ablation: str | Ablation, pairs: Pairs, features: Sequence[Features] = ()) -> Ablation:
    """The kind of ablation that patches are of. Raises InputError as `ablation_of`, and for a kind that features do not have."""
    found = ablation_of(ablation, pairs)
    if features and found.name != RESAMPLE.name:
        raise InputError(
            f"Features of a dictionary can be resampled only, not ablated by {found.name}: what they are moved by is another "
            "input. Leave features or the ablation out."
        )
    return found


def _taken(model, parts: Sequence[Part], features: Sequence[Features] = ()) -> tuple[list[str], list[dict[str, str]]]:
    """The hooks whose values patches take: the source nodes' outputs, and per node those of its parts and features by site."""
    nodes, sites = nodes_of(model), corrupted_sites(parts)
    inside = [{site: f"blocks.{node.layer}.hook_{site}" for site in sites if node.mixer} for node in nodes]
    for each in features:
        place = inside[node_of(each, nodes)]
        place |= {site: f"blocks.{each.layer}.hook_{site}" for site in (each.reads, each.writes)}
    return source_hooks(nodes), inside


def spread_for(model, pairs: Pairs, *, parts: bool, ablation: Ablation) -> Spread | None:
    """What an ablation takes of all pairs, for `corrupted_run` of some of them; None where that is nothing."""
    if ablation.name == RESAMPLE.name:
        return None
    sources, inside = _taken(model, parts_of(model, ablation) if parts else ())
    names = [*sources, *(name for each in inside for name in each.values())]
    return spread_of(model, pairs, names, ablation, rows_per_chunk(model, len(pairs), pairs.clean.shape[1], "parts"))


def corrupted_run(
    model,
    pairs: Pairs,
    *,
    parts: bool,
    features: Sequence[Features] = (),
    spread: Spread | None = None,
    rows: Tensor | None = None,
) -> CorruptedRun:
    """Run the corrupted prompts once and keep what edge patches need, with `parts` what parts need, and what features do.

    spread: of another kind of ablation, from `spread_for`: what it writes is kept. rows: Int64[pair], which of the
    pairs that `spread` was taken of these are; None: all.
    """
    own = parts_of(model, RESAMPLE if spread is None else spread.ablation)
    sources, inside = _taken(model, own if parts else (), features)
    kept = replaced(model, pairs, [*sources, *(name for each in inside for name in each.values())], spread, rows)
    outputs = [kept[name] for name in sources]
    of_nodes = [{site: kept[name] for site, name in each.items()} for each in inside]
    return CorruptedRun(outputs, of_nodes, pairs.scores(kept["hook_logits"]), own, tuple(features))


class Patch:
    """Edits and observers of one pass that carries out `masks` (see `graph.Masks`).

    Rows of the pass are sets x pairs, sets first. detach: stop gradients through output_i in the sum. known: outputs
    [pair, pos, D] of the first source nodes, the same in all sets; the pass then begins at the block of the next.
    dropped: nodes that are not run, see `dropped_nodes`; their output is the corrupted run's.
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
        self.nodes, self.parts = nodes_of(model), corrupted.parts
        self._by_row = {name for name, site in family_of(model).sites.items() if site.by_row}
        self.corrupted, self.detach = corrupted, detach
        self.masks = Masks(*(mask.to(device_of(model), copy=True) for mask in masks))
        self.outputs: list[Tensor] = list(known)
        self.sinks: dict[int, Tensor] = {}
        self._now: list[dict[str, Tensor]] = [{} for _ in self.nodes]
        self._differences: list[Tensor] = []  # corrupted output_i - output_i, [set or 1, pair, pos, D]
        self._n_known, self._dropped = len(known), dropped
        # A reader of a dropped node has nothing left to exchange.
        for w in dropped:
            self.masks.edges[:, w + 1] = 0

    def hooks(self) -> tuple[dict[str, Edit], dict[str, Observer]]:
        """The edits and the observers. Not kept here: they refer to this object, and its tensors must go with it."""
        first, n_sets = max(0, self._n_known - 1), self.masks.edges.shape[0]
        edits: dict[str, Edit] = {}
        observe = dict.fromkeys(source_hooks(self.nodes)[self._n_known :], self.outputs.append)
        for j, name in enumerate(sink_hooks(self.nodes)):
            if j >= first and j not in self._dropped and self.masks.edges[:, :, j].any():
                edits[name] = self._sink(j)
        for w in range(first, len(self.nodes)):
            if w in self._dropped:
                edits[source_hooks(self.nodes)[w + 1]] = self.corrupted.outputs[w + 1].repeat(n_sets, 1, 1)
            elif self.nodes[w].mixer:
                self._parts(w, edits, observe)
        for each, columns in zip(self.corrupted.features, columns_of(self.corrupted.features), strict=True):
            w = node_of(each, self.nodes)
            if w >= first and w not in self._dropped and self.masks.features[:, columns].any():
                self._features(each, columns, edits, observe)
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

    def _parts(self, w: int, edits: dict[str, Edit], observe: dict[str, Observer]) -> None:
        """The edits of the sites at which some part of a node is patched."""
        by_site: dict[str, list[int]] = {}
        for k, part in enumerate(self.parts):
            if self.masks.parts[:, w, k].any():
                by_site.setdefault(part.site, []).append(k)
                for site in part.now:
                    observe[f"blocks.{self.nodes[w].layer}.hook_{site}"] = self._keep(w, site)
        for site, patched in by_site.items():
            name, part = f"blocks.{self.nodes[w].layer}.hook_{site}", self.parts[patched[0]]
            if len(patched) == 1 and part.made is not None and self.masks.parts[:, w, patched[0]].eq(1).all():
                # What is replaced everywhere need not be computed.
                edits[name] = Given(lambda part=part: self._made(w, part, None))
            else:
                edits[name] = lambda x, patched=patched: self._patched(w, patched, x)

    def _features(
        self, features: Features, columns: slice, edits: dict[str, Edit], observe: dict[str, Observer]
    ) -> None:
        """The edit of the site whose features are patched, after what is written there already."""
        w, mask = node_of(features, self.nodes), self.masks.features[:, columns]
        name = f"blocks.{features.layer}.hook_{features.writes}"
        if features.reads != features.writes:
            observe[f"blocks.{features.layer}.hook_{features.reads}"] = self._keep(w, features.reads)

        def patched(value: Tensor) -> Tensor:
            return features.patched(mask, self._now[w] | {features.writes: value}, self.corrupted.sites[w])

        edits[name] = edit_after(edits.get(name), patched)

    def _keep(self, w: int, site: str) -> Observer:
        return lambda value: self._now[w].__setitem__(site, value)

    def _patched(self, w: int, patched: list[int], x: Tensor) -> Tensor:
        """The value of a site with these parts, which are written there, patched."""
        for k in patched:
            part, mask = self.parts[k], self.masks.parts[:, w, k]
            corrupted = self.corrupted.sites[w]
            if part.is_term:
                sets = x.unflatten(0, (mask.shape[0], -1))
                difference = corrupted[part.own] - self._now[w][part.own].unflatten(0, (mask.shape[0], -1))
                x = torch.addcmul(sets, mask[:, None, :, None], difference).flatten(0, 1)
            elif part.made is None:
                x = self._toward(mask, x, corrupted[part.own])
            else:
                by_row = self._rows(mask, x)
                rows = torch.nonzero(by_row.flatten(1).any(1))[:, 0]
                x = x.index_add(0, rows, by_row[rows] * (self._made(w, part, rows) - x[rows]))
        return x

    def _made(self, w: int, part: Part, rows: Tensor | None) -> Tensor:
        """What is put in the place of a part that says how it is made, for some rows of sets x pairs; None: all."""
        assert part.made is not None
        corrupted, now = self.corrupted.sites[w], self._now[w]
        n_pairs = len(corrupted[part.corrupted[0]])
        if rows is None:
            rows = torch.arange(self.masks.parts.shape[0] * n_pairs, device=self.masks.parts.device)
        else:
            now = {site: value[rows] if site in self._by_row else value for site, value in now.items()}
        return part.made(corrupted, now, rows % n_pairs)


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
    nodes, known, dropped = nodes_of(model), [], []
    if before is not None:
        first = before.agrees_below(masks)
        known = before.outputs[: 1 + sum(node.layer < first for node in nodes)]
        dropped = dropped_nodes(masks, nodes)
    # A node below the start that is dropped only now was run before: its readers get the corrupted output from here on.
    known = [corrupted.outputs[i] if i - 1 in dropped else output for i, output in enumerate(known)]
    patch = Patch(model, corrupted, masks, known=known, dropped=dropped)
    logits = _patched(model, pairs, masks, patch, False)
    features = corrupted.features
    # Copies, so that the rows of the other sets are let go.
    own = [output[: len(pairs)].clone() for output in patch.outputs[len(known) :]]
    return logits, PatchedRun(nodes, Masks(*(mask[:1] for mask in masks)), [*known, *own], dropped, features)


def edit_after(first: Edit | None, then: Callable[[Tensor], Tensor]) -> Edit:
    """Two edits of one value, one after the other; the first may be none."""
    if first is None:
        return then
    if isinstance(first, Given):
        return Given(lambda: then(first.make()))
    if callable(first):
        return lambda value: then(first(value))
    raise TypeError(f"{type(first).__name__} is no edit that another can follow")


def _patched(model, pairs: Pairs, masks: Masks, patch: Patch, everywhere: bool) -> Tensor:
    n_sets, start = masks.edges.shape[0], None
    if len(patch.outputs) > 1:
        # The residual stream is the sum of all outputs below, added up in the order and dtype of the model.
        in_fp32, stream = sizes_of(model).stream_in_fp32, patch.outputs[0]
        for output in patch.outputs[1:]:
            stream = (stream.float() if in_fp32 else stream) + output
        start = Start(patch.nodes[len(patch.outputs) - 1].layer, stream.repeat(n_sets, 1, 1), {}, {})
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


def patch_edges(
    model,
    pairs: Pairs,
    edges: Iterable[Sequence],
    positions: Sequence[int] | None = None,
    *,
    features: Iterable[Features] = (),
    ablation: AblationName | Ablation = "resample",
) -> Tensor:
    """Logits [pair, pos, vocab] of the clean prompts with these edges patched (equation 11).

    edges: (source, target), (source, target, position) or (source, target, position, part); nodes are "embed",
    "0".., "output"; parts, such as "conv-1" or "ssm", with source = target. positions: where edges without a
    position are patched; default everywhere. features: those whose items may be patched, as parts such as "out_proj.12" and
    "out_proj.error". ablation: what is patched in, by default the corrupted run's values (`passes.ablations`). Raises
    InputError for what is no edge of the model, and an unknown ablation.
    """
    check_pairs(pairs)
    items = []
    for edge in edges:
        if not 2 <= len(edge) <= 4:
            raise InputError(f"{tuple(edge)} is no edge: give (source, target[, position[, part]]).")
        item = Item(str(edge[0]), str(edge[1]), *edge[2:])
        spread = positions is not None and item.position is None
        items += [item._replace(position=p) for p in positions or ()] if spread else [item]
    universe = universe_of(model, parts=True, features=features)
    masks = masks_of([items], universe, pairs.clean.shape[1])
    kind = kind_of_patches(ablation, pairs, universe.features)
    return call(model, _patched_everywhere, pairs.without_text(), masks, universe.features, kind)


def _patched_everywhere(
    model, pairs: Pairs, masks: Masks, features: tuple[Features, ...], ablation: Ablation, *, progress=None
) -> Tensor:
    parts = bool(masks.parts.any())
    spread = spread_for(model, pairs, parts=parts, ablation=ablation)
    corrupted = corrupted_run(model, pairs, parts=parts, features=features, spread=spread)
    return patched_logits(model, pairs, corrupted, masks, everywhere=True)[0]
