"""How well a circuit stands for the model: scores on held-out pairs, with intervals, and against size.

A circuit is evaluated by patching everything outside it, by default with the corrupted run (*sufficiency*), or, as a test
of *necessity*, by patching what is inside it and keeping the rest. Every score comes with an interval (`intervals`);
circuits evaluated together are resampled together, so that their differences have intervals too. f is MIB's
faithfulness, (m(C) - m(empty)) / (m(N) - m(empty)) with m the mean logit difference, the empty circuit having
everything patched; CPR is the area under f over the fraction of items kept, CMD the area of |1 - f|. Both depend on the
fractions they are summed over: `MIB_FRACTIONS` are those of the benchmark (`mib_sizes`).
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from ioi_mamba.circuits.graph import Circuit, Item, kind_of
from ioi_mamba.circuits.ranking import Ranking, places_of
from ioi_mamba.circuits.scoring import SCORES, Evaluator, chosen_sizes, faithfulness_of, smallest_size
from ioi_mamba.circuits.search import Search
from ioi_mamba.errors import InputError
from ioi_mamba.model.jobs import runs_here
from ioi_mamba.passes.ablations import Ablation, AblationName
from ioi_mamba.passes.intervals import Estimate, Mean, Resampled, mean_interval, resampled_means, share_interval
from ioi_mamba.passes.sweep import Progress
from ioi_mamba.tasks.base import Pairs

MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SHARES = ("accuracy", "full_vocabulary_accuracy")
"""Of the scores, those that are 0 or 1 of a pair."""


def evaluate(
    model,
    pairs: Pairs,
    circuit: Circuit | Search | pd.DataFrame,
    *,
    necessity: bool = False,
    intervals: bool = False,
    ablation: AblationName | Ablation = "resample",
    seed: int = 0,
) -> dict[str, float]:
    """Mean scores of a circuit on pairs: those of SCORES, and `f` (MIB's faithfulness), `n`, `left_out`, `size`.

    circuit: a `Circuit`, what `im.acdc` gives, or a table with a column `kept`. n: the pairs that have a range (`ranges`); left_out: those that have none. necessity: patch the circuit and keep the
    rest. intervals: add `{score}_low` and `{score}_high`, 95 % by cluster. ablation: what patching writes, by default the
    corrupted run's values (`passes.ablations`). seed: of the bootstrap that f has. Raises
    InputError for a circuit of another graph, where no pair has a range, and for a circuit at positions with pairs of
    several layouts.
    """
    if isinstance(circuit, Search):
        circuit = circuit.circuit()
    elif not isinstance(circuit, Circuit):
        circuit = Circuit.from_frame(circuit, model)
    patched = list(circuit.items) if necessity else circuit.patched()
    evaluator = Evaluator(model, pairs, circuit.universe, ablation=ablation)
    found = estimates(evaluator, [patched], seed)
    n = len(evaluator.rows_kept)
    out: dict[str, float] = {"n": n, "left_out": len(pairs) - n, "size": len(circuit)}
    for name, estimate in found.items():
        out[name] = float(estimate.value[0])
        if intervals:
            out[f"{name}_low"], out[f"{name}_high"] = (float(end[0]) for end in estimate.interval)
    return out


def estimates(
    evaluator: Evaluator, patched: Sequence[Sequence[Item]], seed: int = 0, progress: Progress | None = None
) -> dict[str, Estimate]:
    """The scores of SCORES and `f` with each set of items patched, as means over pairs, with intervals by cluster."""
    scores = evaluator.scores(patched, progress)
    return estimates_of(scores, evaluator.ends(), evaluator.clusters, seed)


def estimates_of(scores: dict[str, Tensor], ends: Tensor, clusters: Tensor, seed: int = 0) -> dict[str, Estimate]:
    """As `estimates`, of scores [set, pair] by name, such as those of evaluators of several layouts put together.

    ends: logit differences [3, pair] of `scoring.ENDS`. clusters: Int64[pair].
    """
    out: dict[str, Estimate] = {
        name: Mean(values, clusters, share_interval if name in SHARES else mean_interval)
        for name, values in scores.items()
    }
    drawn, differences = (resampled_means(each, clusters, seed=seed) for each in (ends, scores["logit_diff"]))
    f = (differences - drawn[:, 2:]) / (drawn[:, :1] - drawn[:, 2:])
    value = faithfulness_of(scores["logit_diff"], ends)
    out["f"] = Resampled(value.double(), f, int(clusters.max()) + 1)
    return out


def size_curve(evaluator: Evaluator, ranking: Ranking, sizes: Sequence[int]) -> pd.DataFrame:
    """Scores of the circuits of the first k items of a ranking, one row a size: size, fraction, f, SCORES.

    Items that are not ranked are kept always.
    """
    scores = evaluator.scores(ranking.cut(sizes))
    curve = pd.DataFrame({"size": sizes, "fraction": [k / len(ranking) for k in sizes]})
    curve["f"] = evaluator.faithfulness(scores["logit_diff"]).cpu().numpy()
    for name, values in scores.items():
        curve[name] = values.mean(1).cpu().numpy()
    return curve


def areas(fractions: Sequence[float], f: Tensor) -> dict[str, Tensor]:
    """MIB's CPR and CMD: areas over the fraction of items kept (trapezoids between the fractions of the curve).

    f: [..., size], MIB's faithfulness at each of the fractions.
    """
    x, order = torch.tensor(list(fractions), dtype=f.dtype).sort()
    return {"cpr": torch.trapezoid(f[..., order], x), "cmd": torch.trapezoid((1 - f[..., order]).abs(), x)}


def mib_sizes(n_items: int) -> list[int]:
    """How many items the MIB benchmark keeps at each of MIB_FRACTIONS: the whole part of fraction times all items.

    Its areas are those of trapezoids over the nominal fractions, from .001 on; CPR takes the items in order of the
    signed score, CMD in order of its size.
    """
    return [int(fraction * n_items) for fraction in MIB_FRACTIONS]


def smallest(
    evaluator: Evaluator, ranking: Ranking, target: float, *, metric: str = "accuracy"
) -> tuple[Circuit, pd.DataFrame]:
    """The smallest k whose circuit (first k of a ranking) has `metric` > target, by binary search.

    As published (`smallest_size`), which assumes a metric that rises with k; the second result has every k tried, with
    `monotonic` False where a smaller circuit scored higher than a larger one. Where no k tried is above the target the
    circuit is all items but the last one: compare its `metric` with the target.
    """
    if metric not in SCORES:
        raise InputError(f"metric {metric!r} is unknown: use one of {', '.join(SCORES)}.")
    known: dict[int, pd.Series] = {}
    tried: set[int] = set()
    # To a server one goes seldom: the sizes that the next four decisions can lead to are asked for together.
    levels = 1 if runs_here(evaluator.model) else 4

    def value(k: int, ahead: set[int]) -> float:
        if k not in known:
            curve = size_curve(evaluator, ranking, sorted(({k} | ahead) - set(known)))
            for place, size in enumerate(curve["size"].tolist()):
                known[size] = curve.iloc[place]
        tried.add(k)
        return float(known[k].to_dict()[metric])

    above = lambda k, low, high: value(k, _middles(low, high, levels)) > target
    k = smallest_size(len(ranking), above)
    value(k, set())
    curve = pd.DataFrame([known[size] for size in sorted(tried)]).astype({"size": int}).reset_index(drop=True)
    curve["monotonic"] = curve[metric] >= curve[metric].cummax().shift(fill_value=float("-inf"))
    return ranking.top(k), curve


def _middles(low: int, high: int, levels: int) -> set[int]:
    """The sizes that a binary search between low and high can try in its next so many steps, its result included."""
    if levels == 0:
        return set()
    if low >= high:
        return {low + 1}
    middle = -(-(low + high) // 2)
    return {middle} | _middles(low, middle - 1, levels - 1) | _middles(middle, high, levels - 1)


def random_circuits(circuit: Circuit, n: int, seed: int = 0) -> list[Circuit]:
    """n random circuits with as many items of each kind (`kind_of`: embed->layer, layer->layer, conv0, ssm ...).

    Drawn from a generator of their own. Kinds are kept because they differ in what patching them does: of 45 edges
    the few into the output carry nearly everything.
    """
    generator = torch.Generator().manual_seed(seed)
    groups: dict[str, list[Item]] = {}
    for item in circuit.universe.items():
        groups.setdefault(kind_of(item), []).append(item)
    sizes = dict.fromkeys(groups, 0)
    for item in circuit.items:
        sizes[kind_of(item)] += 1
    out = []
    for _ in range(n):
        chosen: list[Item] = []
        for kind, items in groups.items():
            chosen += [items[int(k)] for k in torch.randperm(len(items), generator=generator)[: sizes[kind]]]
        out.append(Circuit(frozenset(chosen), circuit.universe))
    return out


def split_jaccards(
    evaluator: Evaluator,
    items: Sequence[Item],
    per_pair: Tensor,
    target: float,
    *,
    ranking: str = "signed",
    n_splits: int = 5,
    seed: int = 0,
) -> Tensor:
    """Jaccard Float64[split] of the circuits that two halves of the pairs choose, each anew: ranking, and how many.

    per_pair: scores [item, pair] of `items` on the evaluator's pairs. Whole clusters are dealt out, so that the halves
    have no prompt in common; of each half the smallest circuit with an accuracy above `target` is looked for as
    `smallest` does, on that half. ranking: "signed" or "absolute", as `attribution.ranked` takes it. Raises InputError
    for pairs of a single cluster.
    """
    clusters = evaluator.pairs.clusters
    n_clusters = int(clusters.max()) + 1
    if n_clusters < 2:
        raise InputError("Pairs that all share a prompt cannot be split in halves; give pairs of different prompts.")
    generator = torch.Generator().manual_seed(seed)
    halves, orders = [], []
    for _ in range(n_splits):
        in_first = torch.zeros(n_clusters, dtype=torch.bool)
        in_first[torch.randperm(n_clusters, generator=generator)[: n_clusters // 2]] = True
        for rows in (in_first[clusters].nonzero()[:, 0], (~in_first[clusters]).nonzero()[:, 0]):
            halves.append(rows)
            orders.append([items[k] for k in places_of(per_pair[:, rows].double().mean(1), ranking)])
    sizes = chosen_sizes(evaluator, halves, orders, target)
    chosen = [set(order[:size]) for order, size in zip(orders, sizes, strict=True)]
    pairs_of = zip(chosen[::2], chosen[1::2], strict=True)
    return torch.tensor([len(a & b) / max(1, len(a | b)) for a, b in pairs_of], dtype=torch.float64)


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation along the last axis, [..., item] gives [...]; equal values share a mean rank."""

    def centred_ranks(values: Tensor) -> Tensor:
        rows = pd.DataFrame(values.reshape(-1, values.shape[-1]).cpu().numpy())
        ranks = torch.tensor(rows.rank(axis=1).to_numpy())
        return ranks - ranks.mean(-1, keepdim=True)

    x, y = centred_ranks(first), centred_ranks(second)
    return ((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).reshape(first.shape[:-1])
