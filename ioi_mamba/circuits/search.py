"""Exact circuit search (ACDC): decide every edge and part by what removing it does to the metric.

Works back from the output. A *frontier* is all undecided items whose downstream items are decided: first the edges
into the output, then for every layer from the last one down its parts (first those that reach the layer's output by
themselves, ssm and skip, then those that lead to these, the conv slices), then the edges into it. The features of a
dictionary are decided together, before the parts that are written at an earlier site.
Each item, or set of items, of a frontier is patched on top of all that was removed before; if the metric (mean
normalized logit diff) drops by at most `threshold` the set is removed, a single item that drops more is kept, a
larger set is halved and tried again (appendix D.2). All sets of a round are rows of the same passes.

With `recursive`, a frontier of more than three items starts as one set. Several sets that could go in one round
are removed together if their joint drop is within `rollback`, else only the best half of them, and so on. Without
it, items are decided one at a time, each against the metric after the last removal.

Differences from the published code: conv-slice removals count from the moment they are decided (there they were
lost from the baseline), and unless `paper` is set, conv slices of a layer whose ssm was removed are still tested,
because D x carries them around the state.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ioi_mamba.charts.notebook import shown
from ioi_mamba.circuits.charts import circuit_matrices
from ioi_mamba.circuits.features import Features
from ioi_mamba.circuits.graph import Circuit, Item, Universe, frame_of, items_of, universe_of
from ioi_mamba.circuits.scoring import Evaluator
from ioi_mamba.errors import InputError
from ioi_mamba.files import written_whole
from ioi_mamba.model.families import FAMILIES
from ioi_mamba.model.family import Part
from ioi_mamba.passes.ablations import RESAMPLE, Ablation, AblationName
from ioi_mamba.passes.sweep import Progress
from ioi_mamba.tasks.base import Pairs, check_pairs


@dataclass
class _State:
    """What has been decided: enough to go on from after an interruption."""

    baseline: float = float("nan")
    kept: dict[Item, float] = field(default_factory=dict)  # item -> drop when it alone is patched on top
    removed: dict[Item, None] = field(default_factory=dict)  # in order of decision
    tests: int = 0
    rounds: int = 0

    def decided(self, item: Item) -> bool:
        return item in self.kept or item in self.removed

    def save(self, path: Path, question: dict) -> None:
        data = {
            "question": question,
            "baseline": self.baseline,
            "kept": [[*item, drop] for item, drop in self.kept.items()],
            "removed": [list(item) for item in self.removed],
            "tests": self.tests,
            "rounds": self.rounds,
        }
        with written_whole(path) as beside:
            beside.write_text(json.dumps(data))

    @classmethod
    def load(cls, path: Path, question: dict) -> _State:
        try:
            data = json.loads(path.read_text())
            if data["question"] != question:
                raise InputError(f"{path} belongs to another search (other pairs, graph or thresholds): remove it.")
            kept = {Item(*row[:4]): float(row[4]) for row in data["kept"]}
            removed = dict.fromkeys(Item(*row) for row in data["removed"])
            return cls(data["baseline"], kept, removed, data["tests"], data["rounds"])
        except (OSError, json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
            raise InputError(f"{path} is no checkpoint of a circuit search ({error}): remove it.") from None


def _way_out(part: Part, parts: Sequence[Part]) -> list[str]:
    """The part and those that it leads to, until the layer's output."""
    named, way = {each.name: each for each in parts}, [part.name]
    while (following := named[way[-1]].leads_to) is not None:
        way.append(following)
    return way


def frontiers(universe: Universe) -> list[list[Item]]:
    """All items, in the groups and the order in which they are decided."""
    positions = [None] if universe.n_positions is None else list(range(universe.n_positions))
    nodes = universe.nodes

    def spread(pairs: list[tuple[str, str, str | None]]) -> list[Item]:
        return [Item(s, t, p, part) for s, t, part in pairs for p in positions]

    into: dict[int, list[int]] = {}
    for source, target in universe.edges():
        into.setdefault(target, []).append(source)
    by_distance: dict[int, list[str]] = {}
    for part in universe.of_layer:
        by_distance.setdefault(len(_way_out(part, universe.of_layer)), []).append(part.name)
    groups = [spread([(nodes[s], "output", None) for s in into[len(nodes) - 1]])]
    place = {site.name: k for k, site in enumerate(FAMILIES[universe.family].mixer.sites)}
    places = {part.name: place[part.site] for part in universe.of_layer}
    for target in reversed(range(1, len(nodes) - 1)):
        node = nodes[target]
        # (how late in the pass, features before parts, names): what is decided first is what comes last.
        inside = []
        if universe.parts and node in universe.mixers:
            inside += [(max(map(places.__getitem__, names)), False, names) for names in by_distance.values()]
        for each in universe.features:
            if each.node == node:
                before = each.writes in ("layer_input", "normalized_input")
                inside.append((place.get(each.writes, -1 if before else len(place)), True, each.parts))
        inside.sort(key=lambda group: group[:2], reverse=True)
        groups += [spread([(node, node, name) for name in names]) for *_, names in inside]
        groups.append(spread([(nodes[s], node, None) for s in (*into[target][1:], 0)]))
    return groups


class _Search:
    def __init__(
        self, evaluator: Evaluator, state: _State, threshold: float, rollback: float, save: Callable[[], None]
    ):
        self.evaluator, self.state = evaluator, state
        self.threshold, self.rollback, self.save = threshold, rollback, save

    def scores(self, sets: list[list[Item]]) -> list[float]:
        """The metric with each set removed on top of what is removed already."""
        self.state.tests += len(sets)
        self.state.rounds += 1
        return self.evaluator.normalized([[*self.state.removed, *items] for items in sets]).tolist()

    def remove(self, items: list[Item], score: float) -> None:
        self.state.removed.update(dict.fromkeys(items))
        self.state.baseline = score
        self.save()

    def keep(self, item: Item, drop: float) -> None:
        self.state.kept[item] = drop
        self.save()

    def one_by_one(self, items: list[Item]) -> None:
        for item in items:
            (score,) = self.scores([[item]])
            if self.state.baseline - score <= self.threshold:
                self.remove([item], score)
            else:
                self.keep(item, self.state.baseline - score)

    def by_halves(self, items: list[Item]) -> None:
        queue = [items] if len(items) > 3 else [[item] for item in items]
        while queue:
            baseline, candidates, halves = self.state.baseline, [], []
            for tested, score in zip(queue, self.scores(queue), strict=True):
                if baseline - score <= self.threshold:
                    candidates.append((baseline - score, tested, score))
                elif len(tested) == 1:
                    self.keep(tested[0], baseline - score)
                else:
                    middle = len(tested) // 2
                    halves += [tested[:middle], tested[middle:]]
            queue = halves + self._remove_together(sorted(candidates, key=lambda c: c[0]))

    def _remove_together(self, candidates: list) -> list[list[Item]]:
        """Remove as many of the sets as go together, best first; return those that must be tried again."""
        accepted = len(candidates)
        while accepted > 1:
            joint = [item for _, items, _ in candidates[:accepted] for item in items]
            (score,) = self.scores([joint])
            if self.state.baseline - score <= self.rollback:
                self.remove(joint, score)
                return [items for _, items, _ in candidates[accepted:]]
            accepted //= 2
        if candidates:
            _, items, score = candidates[0]
            self.remove(items, score)
        return [items for _, items, _ in candidates[1:]]


def _without_effect(state: _State, universe: Universe, paper: bool, from_embed: bool = True) -> set[Item]:
    """Kept or undecided items that no path from embed to output uses: removing them changes nothing.

    from_embed: see `Circuit.pruned`.

    In `paper` mode a path inside a layer begins at a part that no other leads to and goes on through all that it leads to
    (of a Mamba-1 through a conv slice and the ssm, or through skip); else it runs through the layer as a whole.
    """
    alive = [item for item in universe.items() if item not in state.removed]
    passes = set(universe.nodes[1:-1])
    if paper and universe.parts:
        found = {(item.source, item.part) for item in alive if item.part}
        led_to = {part.leads_to for part in universe.of_layer}
        ways = [_way_out(part, universe.of_layer) for part in universe.of_layer if part.name not in led_to]
        open_ = {node for node in universe.mixers if any(all((node, name) in found for name in way) for way in ways)}
        passes -= set(universe.mixers) - open_
    edges = [i for i in alive if i.part is None and {i.source, i.target} <= passes | {"embed", "output"}]
    live = Circuit(frozenset(edges), universe).pruned(from_embed=from_embed).items
    nodes = {node for item in live for node in (item.source, item.target)}
    dead = {item for item in alive if item.part is None and item not in live}
    dead |= {item for item in alive if item.part and item.source not in nodes}
    if paper:
        leads_to = {part.name: part.leads_to for part in universe.of_layer}
        dead |= {item for item in alive if item.part and item._replace(part=leads_to.get(item.part)) in state.removed}
    return dead


def acdc(
    model,
    pairs: Pairs,
    *,
    start: Circuit | None = None,
    threshold: float = 1e-4,
    rollback: float | None = None,
    parts: bool = True,
    positions: bool = False,
    recursive: bool = True,
    paper: bool = False,
    checkpoint: str | Path | None = None,
    test_mode: bool = False,
    resume: bool = True,
    features: Iterable[Features] = (),
    ablation: AblationName | Ablation = "resample",
    progress: Progress | None = None,
) -> Search:
    """Search for a circuit; its `table` has columns source, target, position, part, kept, drop, one row an item.

    start: items outside it are removed before the search (its universe is the search's). threshold, rollback: the
    largest drop of the mean normalized logit diff that is accepted, for one set and for sets together (default the
    same). drop: baseline minus metric with the item alone patched on top, null for removed items. checkpoint: a
    file written after every decision; an existing one is resumed. test_mode: recompute the baseline from scratch
    after every decision and compare. paper: prune as the published code does. resume: start each test at the layer it
    is about (same values, faster). features: what `features_at` makes, if `start` is not given. ablation: what patching
    writes, by default the corrupted run's values (`passes.ablations`).
    The table's `attrs` has `score` (final metric), `tests`, `rounds`, and `left_out`, how many of the pairs have no
    range (`ranges`) and took no part. Raises InputError for a foreign checkpoint, where no pair has a range, and at
    positions for pairs of several layouts.
    """
    n_positions = check_pairs(pairs).clean.shape[1] if positions else None
    universe = start.universe if start else universe_of(model, parts=parts, n_positions=n_positions, features=features)
    rollback = threshold if rollback is None else rollback
    evaluator = Evaluator(model, pairs, universe, resume=resume, ablation=ablation)
    resampled = evaluator.ablation.name == RESAMPLE.name
    path = Path(checkpoint) if checkpoint else None
    question = {
        "pairs": pairs.hash(),
        "universe": json.loads(json.dumps(universe.described())),
        "start": sorted(map(repr, start.items)) if start else None,
        "threshold": threshold,
        "rollback": rollback,
        "recursive": recursive,
        "paper": paper,
        "ablation": evaluator.ablation.name,
    }
    if path and path.exists():
        state = _State.load(path, question)
    else:
        state = _State()
        state.removed.update(dict.fromkeys(start.patched() if start else []))
        state.baseline = float(evaluator.normalized([list(state.removed)])[0])

    everything = universe.items()

    def save() -> None:
        if test_mode:
            anew = float(evaluator.normalized([list(state.removed)])[0])
            if abs(anew - state.baseline) > 1e-5:
                raise AssertionError(f"the search holds a baseline of {state.baseline}, from scratch it is {anew}")
        if path:
            state.save(path, question)
        if progress:
            progress(len(state.kept) + len(state.removed), len(everything))

    search = _Search(evaluator, state, threshold, rollback, save)
    for group in frontiers(universe):
        dead = _without_effect(state, universe, paper, resampled)
        for item in dead:
            state.kept.pop(item, None)
        state.removed.update(dict.fromkeys(sorted(dead, key=everything.index)))
        todo = [item for item in group if not state.decided(item)]
        if todo:
            (search.by_halves if recursive else search.one_by_one)(todo)
    for item in _without_effect(state, universe, paper, resampled):
        state.kept.pop(item, None)
        state.removed[item] = None
    table = frame_of(everything)
    table["kept"] = [item in state.kept for item in everything]
    table["drop"] = [state.kept.get(item, float("nan")) for item in everything]
    final = float(evaluator.normalized([list(state.removed)])[0])
    left_out = len(pairs) - len(evaluator.rows_kept)
    table.attrs = {"score": final, "tests": state.tests, "rounds": state.rounds, "left_out": left_out}
    return Search(table, universe)


@dataclass(frozen=True, eq=False, repr=False)
class Search:
    """What `acdc` found.

    Attributes:
        table: Columns source, target, position, part, kept, drop; `attrs` has score, tests, rounds, left_out.
        universe: The graph that was searched.
    """

    table: pd.DataFrame
    universe: Universe

    def circuit(self) -> Circuit:
        """What is kept."""
        return Circuit(frozenset(items_of(self._kept())), self.universe)

    def _kept(self) -> pd.DataFrame:
        return pd.DataFrame(self.table[self.table["kept"]])

    def chart(self) -> Any:
        """The drop of every item that is kept: edges as a matrix from source to target, and parts by layer."""
        return circuit_matrices(self._kept(), "drop")

    def __repr__(self) -> str:
        about = self.table.attrs
        return f"<Search: normalized logit diff {about['score']:.3f} after {about['tests']} tests>\n{self.circuit()!r}"

    def _repr_html_(self) -> str:
        kept = self._kept().sort_values(by="drop", ascending=False)
        heading = f"Search: {len(kept)} of {len(self.table)} items kept, largest drops first"
        return shown(heading, kept.drop(columns="kept"), self.chart)
