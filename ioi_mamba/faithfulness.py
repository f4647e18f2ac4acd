"""How well a circuit stands for the model: scores on held-out pairs, with intervals, and against size.

A circuit is evaluated by patching everything outside it with the corrupted run (*sufficiency*), or, as a test of
*necessity*, by patching what is inside it and keeping the rest. Every score comes with a bootstrap interval over
pairs; circuits evaluated together are resampled together, so that their differences have intervals too. f is MIB's
faithfulness, (m(C) - m(empty)) / (m(N) - m(empty)) with m the mean logit difference, the empty circuit being the
corrupted run; CPR is the area under f over the fraction of items kept, CMD the area of |1 - f|.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from .errors import InputError
from .evaluator import SCORES, Evaluator, resampled_means
from .graph import Circuit, Item, Universe, items_of
from .jobs import runs_here
from .tasks.base import Pairs

MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def evaluate(
    model, pairs: Pairs, circuit: Circuit, *, necessity: bool = False, intervals: bool = False, seed: int = 0
) -> dict[str, float]:
    """Mean scores of a circuit on pairs: those of SCORES, and `f` (MIB's faithfulness), `n`, `size`.

    necessity: patch the circuit and keep the rest. intervals: add `{score}_low` and `{score}_high`, 95 % bootstrap
    over pairs. Raises InputError for a circuit of another graph.
    """
    patched = list(circuit.items) if necessity else circuit.patched()
    out: dict[str, float] = {"n": len(pairs), "size": len(circuit)}
    for name, estimate in Evaluator(model, pairs, circuit.universe).estimates([patched], seed).items():
        out[name] = float(estimate.value[0])
        if intervals:
            out[f"{name}_low"], out[f"{name}_high"] = (float(end[0]) for end in estimate.interval)
    return out


def top(table: pd.DataFrame, k: int, universe: Universe) -> Circuit:
    """The circuit of the first k items of a ranked table."""
    return Circuit(frozenset(items_of(table.head(k))), universe)


def size_curve(evaluator: Evaluator, table: pd.DataFrame, sizes: Sequence[int]) -> pd.DataFrame:
    """Scores of the circuits of the first k items of a ranked table, one row a size: size, fraction, f, SCORES.

    Items that are not in the table are kept always.
    """
    order = items_of(table)
    scores = evaluator.scores([order[k:] for k in sizes])
    curve = pd.DataFrame({"size": sizes, "fraction": [k / len(order) for k in sizes]})
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


def smallest(
    evaluator: Evaluator, table: pd.DataFrame, target: float, *, metric: str = "accuracy"
) -> tuple[Circuit, pd.DataFrame]:
    """The smallest k whose circuit (first k of a ranked table) has `metric` > target, by binary search.

    As published (appendix D.1): L = 0, R = n - 1; m = ceil((L + R) / 2); above the target R = m - 1, else L = m;
    the result is min(n - 1, L + 1). The search assumes a metric that rises with k; the second result has every k
    tried, with `monotonic` False where a smaller circuit scored higher than a larger one.
    """
    if metric not in SCORES:
        raise InputError(f"metric {metric!r} is unknown: use one of {', '.join(SCORES)}.")
    known: dict[int, pd.Series] = {}
    tried: set[int] = set()
    # To a server one goes seldom: the sizes that the next four decisions can lead to are asked for together.
    levels = 1 if runs_here(evaluator.model) else 4

    def value(k: int, ahead: set[int]) -> float:
        if k not in known:
            for _, row in size_curve(evaluator, table, sorted(({k} | ahead) - set(known))).iterrows():
                known[int(row["size"])] = row
        tried.add(k)
        return float(known[k][metric])

    low, high = 0, len(table) - 1
    while low < high:
        middle = -(-(low + high) // 2)
        low, high = (low, middle - 1) if value(middle, _middles(low, high, levels)) > target else (middle, high)
    k = min(len(table) - 1, low + 1)
    value(k, set())
    curve = pd.DataFrame([known[size] for size in sorted(tried)]).astype({"size": int}).reset_index(drop=True)
    curve["monotonic"] = curve[metric] >= curve[metric].cummax().shift(fill_value=float("-inf"))
    return top(table, k, evaluator.universe), curve


def _middles(low: int, high: int, levels: int) -> set[int]:
    """The sizes that a binary search between low and high can try in its next so many steps, its result included."""
    if levels == 0:
        return set()
    if low >= high:
        return {low + 1}
    middle = -(-(low + high) // 2)
    return {middle} | _middles(low, middle - 1, levels - 1) | _middles(middle, high, levels - 1)


def random_circuits(circuit: Circuit, n: int, seed: int = 0) -> list[Circuit]:
    """n random circuits with as many items of each kind (edge or part) as `circuit`, from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    groups: dict[bool, list[Item]] = {False: [], True: []}
    for item in circuit.universe.items():
        groups[item.part is not None].append(item)
    out = []
    for _ in range(n):
        chosen: list[Item] = []
        for is_part, items in groups.items():
            size = sum((item.part is not None) == is_part for item in circuit.items)
            chosen += [items[int(k)] for k in torch.randperm(len(items), generator=generator)[:size]]
        out.append(Circuit(frozenset(chosen), circuit.universe))
    return out


def bootstrap_jaccard(
    per_pair: Tensor, k: int, *, ranking: str = "signed", n_resamples: int = 200, seed: int = 0
) -> Tensor:
    """Jaccard [resample] of the k best items of resampled pairs with the k best of all pairs.

    per_pair: scores [item, pair]. ranking: "signed" or "absolute", as `attribution.ranked` takes it.
    """
    key = (lambda means: -means.abs()) if ranking == "absolute" else (lambda means: means)
    best = set(key(per_pair.double().mean(1)).argsort(stable=True)[:k].tolist())
    out = []
    for means in resampled_means(per_pair, n_resamples, seed):
        other = set(key(means).argsort(stable=True)[:k].tolist())
        out.append(len(best & other) / len(best | other))
    return torch.tensor(out)


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation along the last axis, [..., item] gives [...]; equal values share a mean rank."""

    def centred_ranks(values: Tensor) -> Tensor:
        rows = pd.DataFrame(values.reshape(-1, values.shape[-1]).cpu().numpy())
        ranks = torch.tensor(rows.rank(axis=1).to_numpy())
        return ranks - ranks.mean(-1, keepdim=True)

    x, y = centred_ranks(first), centred_ranks(second)
    return ((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).reshape(first.shape[:-1])
