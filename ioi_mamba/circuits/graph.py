"""A model as a graph: nodes, the items that can be patched, and circuits (sets of items that are kept).

Nodes are `embed`, whatever adds to the residual stream, and `output`. In a block with one sub-block that is the layer
(`0`, `1`, ...), else each of its sub-blocks (`0.mamba`, `0.attn`, `0.mlp`). The stream makes every earlier node an input
of every later one (paper, appendix D), but for two that stand side by side in one block. Inside a layer there are the *parts* that the record of the model's family lists (of a Mamba-1 the
conv slices, the state and the gate); a part is written as an item whose source and target are the layer. Where a
dictionary is given for a site of a node, its features and their error are parts of that node too (`features`).

An item may hold at all positions or at one. A `Circuit` is the set of items kept clean; every other item of its
`Universe` is patched with the corrupted run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from ioi_mamba.charts.notebook import shown
from ioi_mamba.circuits.charts import circuit_matrices
from ioi_mamba.circuits.features import Features, check_features
from ioi_mamba.errors import InputError
from ioi_mamba.files import read_table, written_whole
from ioi_mamba.model.families import FAMILIES, block_of, family_of, sizes_of
from ioi_mamba.model.family import Part
from ioi_mamba.model.portable import portable

Layout = tuple[tuple[tuple[str, ...], ...], ...]
"""Of each block its sub-blocks, in order; those of an inner tuple stand side by side."""
_SUFFIXES = (".parquet", ".json")
_LARGEST = {"n_layers": 1000, "conv_width": 64, "n_positions": 10_000}


@portable
class Item(NamedTuple):
    """An edge between nodes, or a part of a layer; at one position, or (None) at all of them."""

    source: str
    target: str
    position: int | None = None
    part: str | None = None


@portable
class Universe(NamedTuple):
    """All items there are: the size of the model, whether layers have parts, whether positions are told apart.

    family: the name of the model's family, whose record says which parts a mixer has. layout: of each block its sub-blocks
    by name ("mamba", "attn", "mlp"), those of an inner tuple side by side; None: one mixer in every block. features: of
    dictionaries at nodes.
    """

    n_layers: int
    conv_width: int = 4
    parts: bool = False
    n_positions: int | None = None
    family: str = "mamba"
    layout: Layout | None = None
    features: tuple[Features, ...] = ()

    @property
    def writers(self) -> list[tuple[int, int, str]]:
        """(block, place in it, name) of every node between embed and output; nodes of one place stand side by side."""
        blocks = ((("mamba",),),) * self.n_layers if self.layout is None else self.layout
        return [(i, k, name) for i, block in enumerate(blocks) for k, group in enumerate(block) for name in group]

    @property
    def nodes(self) -> list[str]:
        """embed, what adds to the stream, output."""
        writers = self.writers
        many = {i for (i, *_), (j, *_) in pairwise(writers) if i == j}
        return ["embed", *(f"{i}.{name}" if i in many else str(i) for i, _, name in writers), "output"]

    @property
    def mixers(self) -> list[str]:
        """The nodes that have parts."""
        return [node for node, (*_, name) in zip(self.nodes[1:], self.writers, strict=False) if name == "mamba"]

    def edges(self) -> list[tuple[int, int]]:
        """(source, target) of every edge by number of node, in order of target then source."""
        places = [(-1, 0), *((i, k) for i, k, _ in self.writers), (self.n_layers, 0)]
        return [(i, j) for j in range(1, len(places)) for i in range(j) if places[i] != places[j]]

    @property
    def of_layer(self) -> tuple[Part, ...]:
        """The parts that a layer of this family has, in the order of the tables, also where the graph leaves them out."""
        return FAMILIES[self.family].mixer.parts(self.conv_width)

    @property
    def inside(self) -> tuple[str, ...]:
        """The names of the parts of a layer, in the order of the tables; none where the graph has no parts."""
        return tuple(part.name for part in self.of_layer) if self.parts else ()

    def items(self) -> list[Item]:
        """Every item, edges first in order of target then source, then parts by layer, then features; each by position."""
        positions = [None] if self.n_positions is None else range(self.n_positions)
        return [Item(s, t, p, part) for s, t, part in self.kinds() for p in positions]

    def kinds(self) -> list[tuple[str, str, str | None]]:
        """(source, target, part) of every item, in the order of `items`."""
        nodes = self.nodes
        found: list[tuple[str, str, str | None]] = [(nodes[i], nodes[j], None) for i, j in self.edges()]
        found += [(node, node, part) for node in self.mixers for part in self.inside]
        return found + [(node, node, part) for node, part in self.of_features()]

    def of_features(self) -> list[tuple[str, str]]:
        """(node, part) of every feature and error, in the order of masks."""
        return [(each.node, part) for each in self.features for part in each.parts]

    def size(self) -> int:
        """How many items there are."""
        n = len(self.edges()) + len(self.mixers) * len(self.inside) + sum(each.n + 1 for each in self.features)
        return n * (1 if self.n_positions is None else self.n_positions)

    def check(self, items: Iterable[Item]) -> None:
        """Raise InputError, naming it, for the first of the items that is not one of this graph's; makes no list."""
        nodes = {name: k for k, name in enumerate(self.nodes)}
        edges, inside, mixers = set(self.edges()), set(self.inside), set(self.mixers)
        features = set(self.of_features())
        for item in items:
            if not isinstance(item, Item):
                raise InputError(
                    f"{item!r} is no Item: give ioi_mamba.circuits.graph.Item(source, target, position, part)."
                )
            source, target, position, part = item
            if self.n_positions is None:
                placed = position is None
            else:
                placed = _is_whole(position) and 0 <= position < self.n_positions  # type: ignore[operator]
            edge = (nodes.get(source, -1), nodes.get(target, -1))
            in_mixer = part in inside and source in mixers
            there = edge in edges if part is None else source == target and (in_mixer or (source, part) in features)
            if not (there and placed):
                raise InputError(f"{item} is not in this graph: {self._described()}.")

    def _described(self) -> str:
        where = "no positions (None)" if self.n_positions is None else f"positions 0 to {self.n_positions - 1}"
        inside = f"{', '.join(self.inside)} inside layers" if self.parts else "no parts inside layers"
        inside += "".join(f", {each.parts[0]} to {each.parts[-1]} in node {each.node}" for each in self.features)
        nodes = self.nodes
        return f'it has edges forward among "embed", "{nodes[1]}" to "{nodes[-2]}" and "output", {inside}, {where}'

    def described(self) -> dict[str, Any]:
        """Its fields as a file keeps them; of dictionaries where they are, and a hash."""
        return {**self._asdict(), "features": [each.described() for each in self.features]}

    def check_fits(self, model, n_positions: int) -> None:
        """Raise InputError unless this is a graph of the model, on prompts of so many positions if it has positions."""
        if self.family != family_of(model).name:
            raise InputError(
                f"The circuit's graph is of a {FAMILIES[self.family].label}, the model is a {family_of(model).label}: "
                "take universe_of(model)."
            )
        if self.writers != universe_of(model).writers and self.n_layers == sizes_of(model).n_layers:
            raise InputError("The circuit's graph has other sub-blocks than the model: take universe_of(model).")
        for each in self.features:
            if each.node not in self.nodes:
                raise InputError(f"The features are of node {each.node}, which this model has not: make them for it.")
        sizes = {"layers": (self.n_layers, sizes_of(model).n_layers)}
        if self.parts:
            sizes["conv slices"] = (self.conv_width, sizes_of(model).conv_width)
        if self.n_positions is not None:
            sizes["positions"] = (self.n_positions, n_positions)
        for what, (here, there) in sizes.items():
            if here != there:
                raise InputError(
                    f"The circuit's graph has {here} {what}, the model and prompts have {there}: take universe_of(model)."
                )


def universe_of(
    model, *, parts: bool = False, n_positions: int | None = None, features: Iterable[Features] = ()
) -> Universe:
    """The universe of an open model; n_positions tells positions apart. features: what `features_at` makes.

    Raises InputError for two dictionaries at one site.
    """
    sizes = sizes_of(model)
    blocks = [block_of(model, i).writers for i in range(sizes.n_layers)]
    layout = tuple(tuple(tuple(writer.name for writer in group) for group in block) for block in blocks)
    plain = all(block == (("mamba",),) for block in layout)
    name, found = family_of(model).name, check_features(features)
    return Universe(sizes.n_layers, sizes.conv_width, parts, n_positions, name, None if plain else layout, found)


@portable
class Masks(NamedTuple):
    """How much of each item is replaced by the corrupted run, 0..1; one leading axis for sets tested together.

    edges: [set, source, target, pos], sources embed and the nodes after it, targets these and output. parts: [set, node,
    part, pos], nodes without embed and output, all parts that a mixer of the family has, in the order of the tables.
    features: [set, item, pos], the features and the error of each dictionary in turn.
    """

    edges: Tensor
    parts: Tensor
    features: Tensor

    def __mul__(self, factor: float) -> Masks:  # type: ignore[override]
        return Masks(*(mask * factor for mask in self))


def masks_of(sets: Sequence[Iterable[Item]], universe: Universe, n_positions: int) -> Masks:
    """The masks that patch each of the sets of items.

    Raises InputError for an item the universe does not have, and where there is no set (one of no items is a set).
    """
    if not sets:
        raise InputError("There is no set of items to patch: give at least one; [] is the set that patches nothing.")
    n, edges, mixers = len(universe.writers), set(universe.edges()), set(universe.mixers)
    inside = {part.name: k for k, part in enumerate(universe.of_layer)}
    features = {item: k for k, item in enumerate(universe.of_features())}
    masks = Masks(
        torch.zeros(len(sets), n + 1, n + 1, n_positions),
        torch.zeros(len(sets), n, len(inside), n_positions),
        torch.zeros(len(sets), len(features), n_positions),
    )
    index = {name: i for i, name in enumerate(universe.nodes)}
    for s, items in enumerate(sets):
        for item in items:
            source, target = index.get(item.source), index.get(item.target)
            where = slice(None) if item.position is None else item.position
            placed = item.position is None or (_is_whole(item.position) and 0 <= item.position < n_positions)
            if source is None or target is None or not placed:
                raise InputError(
                    f"{item} is not in this graph: nodes are {', '.join(_shortened(universe.nodes))}; positions below "
                    f"{n_positions}."
                )
            if item.part is not None and source == target and (item.source, item.part) in features:
                masks.features[s, features[item.source, item.part], where] = 1
                continue
            if item.part is not None and not universe.parts:
                raise InputError(
                    f"{item} is a part of a layer, and this graph has none: take a universe with parts=True."
                )
            if item.part is None and (source, target) in edges:
                masks.edges[s, source, target - 1, where] = 1
            elif item.part in inside and source == target and item.source in mixers:
                masks.parts[s, source - 1, inside[item.part], where] = 1
            else:
                raise InputError(f"{item} is no edge forward and no part of a layer ({', '.join(inside)}).")
    return masks


@dataclass(frozen=True, repr=False)
class Circuit:
    """Items kept clean; every other item of the universe is patched when the circuit is evaluated.

    Raises InputError, naming it, for an item that the universe does not have and for one that is given twice. Circuits of
    one universe combine with `|`, `&`, `-` and compare with `jaccard` and `overlap`.

        >>> universe = Universe(n_layers=2)
        >>> a = Circuit(frozenset({Item("embed", "0"), Item("0", "output"), Item("embed", "1")}), universe)
        >>> len(Circuit.full(universe)), len(a), len(a.pruned())  # embed -> 1 leads nowhere
        (6, 3, 2)
        >>> round(a.jaccard(a.pruned()), 3)
        0.667
    """

    items: frozenset[Item]
    universe: Universe

    def __post_init__(self) -> None:
        _check_size(self.universe)
        if not isinstance(self.items, frozenset):
            object.__setattr__(self, "items", frozenset(_each_once(self.items)))
        self.universe.check(self.items)

    @classmethod
    def full(cls, universe: Universe) -> Circuit:
        """Everything kept: the model itself."""
        return cls(frozenset(universe.items()), universe)

    @classmethod
    def from_frame(cls, table: pd.DataFrame, model, features: Iterable[Features] = ()) -> Circuit:
        """The items that a table of a model's items keeps, as `im.acdc` gives it.

        table: columns source, target, kept and, where told apart, position and part; every item of the graph is in it.
        features: those whose items are in it.
        Raises InputError for what is no such table, and for items that the model does not have.
        """
        if not isinstance(table, pd.DataFrame) or not {"source", "target", "kept"} <= set(table.columns):
            what = (
                f"A table with {', '.join(map(str, table.columns))}" if isinstance(table, pd.DataFrame) else repr(table)
            )
            raise InputError(f"{what[:200]} is no circuit: give a Circuit, or a table with source, target and kept.")
        items = items_of(table)
        positions = [item.position for item in items if item.position is not None]
        of_mixers = {part.name for part in universe_of(model).of_layer}
        parts, n_positions = any(item.part in of_mixers for item in items), max(positions) + 1 if positions else None
        universe = universe_of(model, parts=parts, n_positions=n_positions, features=features)
        kept = table["kept"].eq(True).tolist()
        return cls(frozenset(item for item, keep in zip(items, kept, strict=True) if keep), universe)

    def __len__(self) -> int:
        return len(self.items)

    def __contains__(self, item: object) -> bool:
        return item in self.items

    def _with(self, items: Iterable[Item]) -> Circuit:
        return Circuit(frozenset(items), self.universe)

    def _same(self, other: Circuit) -> frozenset[Item]:
        if self.universe != other.universe:
            raise InputError(f"Circuits of different graphs cannot be combined: {self.universe} and {other.universe}.")
        return other.items

    def __or__(self, other: Circuit) -> Circuit:
        return self._with(self.items | self._same(other))

    def __and__(self, other: Circuit) -> Circuit:
        return self._with(self.items & self._same(other))

    def __sub__(self, other: Circuit) -> Circuit:
        return self._with(self.items - self._same(other))

    def patched(self) -> list[Item]:
        """The items of the universe that are not kept."""
        return [item for item in self.universe.items() if item not in self.items]

    def kinds(self) -> dict[str, int]:
        """How many items of each kind are kept: embed->layer, layer->layer, layer->output, embed->output, parts."""
        return pd.Series([kind_of(item) for item in self.items], dtype="str").value_counts().to_dict()

    def pruned(self, *, from_embed: bool = True) -> Circuit:
        """Only the edges on a path from embed to output, and the parts of the layers that such a path visits.

        Positions are not told apart: a layer moves what it reads to later positions. from_embed: whether a path must begin
        there. Resampled, what does not is the corrupted run's whether it is patched or not; by other kinds of ablation a
        layer that reads nothing of the prompt still is not what is written in its place.
        """
        edges = {(i.source, i.target) for i in self.items if i.part is None}

        def reached(start: str, pairs: set[tuple[str, str]]) -> set[str]:
            seen, frontier = {start}, [start]
            while frontier:
                node = frontier.pop()
                new = {b for a, b in pairs if a == node} - seen
                seen |= new
                frontier += new
            return seen

        live = reached("output", {(b, a) for a, b in edges})
        if from_embed:
            live &= reached("embed", edges)
        return self._with(i for i in self.items if i.source in live and i.target in live)

    def jaccard(self, other: Circuit) -> float:
        """Shared items over items in either; 1 for two empty circuits."""
        union = self.items | self._same(other)
        return len(self.items & other.items) / len(union) if union else 1.0

    def overlap(self, other: Circuit) -> pd.DataFrame:
        """Per kind of item: kind, shared, only_here, only_there."""
        there = self._same(other)
        rows = [
            (kind_of(item), item in self.items and item in there, item not in there, item not in self.items)
            for item in self.items | there
        ]
        table = pd.DataFrame(rows, columns=["kind", "shared", "only_here", "only_there"])
        return pd.DataFrame(table.groupby("kind", as_index=False).sum())

    def to_frame(self) -> pd.DataFrame:
        """Columns source, target, position, part; one row an item, in the order of the universe."""
        return frame_of(self.listed())

    def listed(self) -> list[Item]:
        """The items in the order of the universe."""
        order = {item: k for k, item in enumerate(self.universe.items())}
        return sorted(self.items, key=order.__getitem__)

    def chart(self) -> Any:
        """What is kept: edges as a matrix from source to target, and parts by layer; at positions, at how many."""
        return circuit_matrices(self.to_frame().assign(kept=1.0), "kept")

    def __repr__(self) -> str:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(self.kinds().items())) or "no item"
        return f"<Circuit of {len(self)} of {self.universe.size()} items: {kinds}>"

    def _repr_html_(self) -> str:
        return shown(f"Circuit of {len(self)} of {self.universe.size()} items", self.to_frame(), self.chart)

    def save(self, path: str | Path) -> None:
        """Write `path`.parquet (the items) and `path`.json (the universe), each beside and then renamed."""
        path = Path(path)
        universe = json.dumps({"universe": self.universe.described()}, indent=1).encode()
        for suffix, data in zip(_SUFFIXES, (self.to_frame().to_parquet(), universe), strict=True):
            with written_whole(path.with_name(path.name + suffix)) as beside:
                beside.write_bytes(data)

    @classmethod
    def load(cls, path: str | Path, features: Iterable[Features] = ()) -> Circuit:
        """Read what `save` wrote. Raises InputError for a missing or foreign file.

        features: those that the circuit has items of, which a file only has a hash of. Raises InputError for others.
        """
        path = Path(path)
        try:
            table = read_table(path.with_name(path.name + _SUFFIXES[0]))
            fields = json.loads(path.with_name(path.name + _SUFFIXES[1]).read_text())["universe"]
            if fields.get("layout") is not None:
                fields["layout"] = tuple(tuple(map(tuple, block)) for block in fields["layout"])
            fields["features"], stored = check_features(features), fields.get("features", [])
            if [each.described() for each in fields["features"]] != stored:
                raise InputError(
                    f"{path} has items of {len(stored)} dictionaries: give the same ones, in order, as `features`."
                )
            universe = Universe(**fields)
            return cls(frozenset(items_of(table)), universe)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is no saved circuit (two files, .parquet and .json): {error}") from None

    def to_mib(self) -> dict:
        """The layer-level part in the JSON of the MIB benchmark: nodes and edges with `in_graph`.

        Layers appear as MIB's `m{i}` (one block without heads), embed as `input`, output as `logits`.
        """
        if self.universe.layout is not None:
            raise InputError("MIB's JSON has no place for blocks of several kinds: save this circuit with `save`.")
        names = {"embed": "input", "output": "logits"} | {str(i): f"m{i}" for i in range(self.universe.n_layers)}
        kept = {(i.source, i.target) for i in self.items if i.part is None}
        edges = [i for i in Universe(self.universe.n_layers).items()]
        used = {node for edge in kept for node in edge}
        return {
            "cfg": {"n_layers": self.universe.n_layers, "parallel_attn_mlp": False},
            "nodes": {names[node]: {"in_graph": node in used} for node in self.universe.nodes},
            "edges": {
                f"{names[e.source]}->{names[e.target]}": {"in_graph": (e.source, e.target) in kept} for e in edges
            },
        }


def _shortened(nodes: list[str]) -> list[str]:
    return nodes if len(nodes) <= 12 else [*nodes[:5], "...", *nodes[-3:]]


def _check_size(universe: Universe) -> None:
    """Raise InputError for sizes that no model has."""
    if not isinstance(universe, Universe):
        raise InputError(f"{universe!r} is no Universe: give universe_of(model), or a Universe.")
    n_layers, conv_width, parts, n_positions, family, layout, _ = universe
    sizes = {"n_layers": n_layers, "conv_width": conv_width, "n_positions": 1 if n_positions is None else n_positions}
    for name, size in sizes.items():
        if type(size) is not int or not 1 <= size <= _LARGEST[name]:
            raise InputError(f"{name} is {size}, and must be 1 to {_LARGEST[name]}.")
    if type(parts) is not bool:
        raise InputError(f"parts is {parts}, and must be true or false.")
    if family not in FAMILIES:
        raise InputError(f"family is {family!r}, and must be {' or '.join(FAMILIES)}.")
    if layout is not None and len(layout) != n_layers:
        raise InputError(f"layout has {len(layout)} blocks, and must have {n_layers}.")


def _is_whole(value: object) -> bool:
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def _each_once(items: Iterable[Item]) -> list[Item]:
    """The items as a list. Raises InputError, naming it, for one that is there twice."""
    listed, seen = list(items), set()
    for item in listed:
        try:
            known = item in seen
        except TypeError:
            raise InputError(
                f"{item!r} is no Item: give ioi_mamba.circuits.graph.Item(source, target, position, part)."
            ) from None
        if known:
            raise InputError(f"{item} is given twice: give every item once.")
        seen.add(item)
    return listed


def kind_of(item: Item) -> str:
    """embed->layer, layer->layer, layer->output, embed->output, or the name of the part; of sub-blocks by their names.

    The features of one dictionary are of one kind.
    """
    if item.part is not None:
        name, _, which = item.part.rpartition(".")
        return f"{name} features" if which.isdigit() else item.part
    return "->".join(
        node if node in ("embed", "output") else node.partition(".")[2] or "layer"
        for node in (item.source, item.target)
    )


def frame_of(items: Iterable[Item]) -> pd.DataFrame:
    """The items as a table with columns source, target, position, part."""
    table = pd.DataFrame(list(items), columns=list(Item._fields))
    return table.astype({"source": "str", "target": "str", "position": "Int64", "part": "str"})


def items_of(table: pd.DataFrame) -> list[Item]:
    """The items of a table with columns source, target and, where told apart, position and part, one row an item.

    Raises InputError for a table without these columns, a position that is no whole number, and an item in two rows.
    """
    for name in ("source", "target"):
        if name not in table:
            raise InputError(f"The table has no column {name!r}: give one of items, with source and target.")
    n = len(table)
    positions = table["position"].tolist() if "position" in table else [None] * n
    parts: list[Any] = table["part"].tolist() if "part" in table else [None] * n
    return _each_once(
        Item(str(s), str(t), _position(p), str(part) if pd.notna(part) is True else None)
        for s, t, p, part in zip(table["source"], table["target"], positions, parts, strict=True)
    )


def _position(value: Any) -> int | None:
    if pd.isna(value):
        return None
    if isinstance(value, bool) or not isinstance(value, Real) or value % 1 != 0:
        raise InputError(f"The position {value!r} is no whole number: give the index of a token.")
    return int(float(value))
