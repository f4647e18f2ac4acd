"""How well a circuit stands for the model: scores on held-out pairs, with intervals, and against size.

A circuit is evaluated by patching everything outside it with the corrupted run (*sufficiency*), or, as a test of
*necessity*, by patching what is inside it and keeping the rest. Every score comes with a bootstrap interval over
pairs; circuits evaluated together are resampled together, so that their differences have intervals too. f is MIB's
faithfulness, (m(C) - m(empty)) / (m(N) - m(empty)) with m the mean logit difference, the empty circuit being the
corrupted run; CPR is the area under f over the fraction of items kept, CMD the area of |1 - f|.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from . import metrics
from .errors import InputError
from .graph import Circuit, Item, Universe, items_of, masks_of
from .patching import CorruptedRun, corrupted_run, needs_parts, patched_logits
from .sweep import Progress, last_logits, rows_per_pass
from .tasks.base import Pairs

MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SCORES = (
    "normalized_logit_diff",
    "accuracy",
    "full_vocabulary_accuracy",
    "relative_probability",
    "kl",
    "logit_diff",
)


class Estimate(NamedTuple):
    """One number for each of several circuits, and what it would have been with other draws of the pairs.

    value: [circuit]; resampled: [resample, circuit], one draw of pairs a row, the same for all circuits.
    """

    value: Tensor
    resampled: Tensor

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.value - other.value, self.resampled - other.resampled)

    def __getitem__(self, circuits) -> Estimate:  # type: ignore[override]
        """The estimate of some of the circuits, by index or slice."""
        return Estimate(self.value[circuits], self.resampled[:, circuits])

    @property
    def interval(self) -> tuple[Tensor, Tensor]:
        """(low, high), each [circuit]: the middle 95 % of the resamples."""
        low, high = self.resampled.quantile(torch.tensor([0.025, 0.975], dtype=self.resampled.dtype), dim=0)
        return low, high


def resampled_means(values: Tensor, n_resamples: int = 1000, seed: int = 0) -> Tensor:
    """Means Float64[resample, ...] of values [..., pair], the pairs of each resample drawn with replacement.

    The draws come from a generator of their own and depend on the number of pairs alone.
    """
    n_pairs = values.shape[-1]
    drawn = torch.randint(n_pairs, (n_resamples, n_pairs), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(n_resamples, n_pairs, dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.full(drawn.shape, 1 / n_pairs, dtype=torch.float64))
    return torch.einsum("rp,...p->r...", weights, values.detach().double().cpu())


class Evaluator:
    """Evaluates many sets of patched items on the same pairs, running the clean and corrupted prompts once.

    pairs_per_pass bounds memory; default from an estimate. Corrupted values of all chunks are kept while they take
    less than `keep_mib` MiB, else computed anew for every call.
    """

    def __init__(self, model, pairs: Pairs, universe: Universe, *, rows: int | None = None, keep_mib: int = 1024):
        self.model, self.pairs, self.universe = model, pairs, universe
        self.rows = rows or rows_per_pass(model, pairs.clean.shape[1])
        size = min(self.rows, len(pairs))
        self.chunks = [pairs[i : i + size] for i in range(0, len(pairs), size)]
        self.n_positions = pairs.clean.shape[1]
        config = model.config
        floats = (
            self.n_positions
            * config.num_hidden_layers
            * (config.hidden_size + (8 * config.intermediate_size if universe.parts else 0))
        )
        self._kept: dict[int, CorruptedRun] | None = {} if 4 * floats * len(pairs) <= keep_mib * 2**20 else None
        self.candidates = candidates_of(pairs)
        self.clean_logits = torch.cat([last_logits(model, c.clean, c.last)[:, 0] for c in self.chunks]).float()
        self.corrupted_logits = torch.cat([last_logits(model, c.corrupted, c.last)[:, 0] for c in self.chunks]).float()
        self.answer, self.wrong = pairs.answer.to(model.device), pairs.wrong.to(model.device)

    def _corrupted(self, k: int, parts: bool) -> CorruptedRun:
        if self._kept is None:
            return corrupted_run(self.model, self.chunks[k], parts=parts)
        if k not in self._kept:
            self._kept[k] = corrupted_run(self.model, self.chunks[k], parts=self.universe.parts)
        return self._kept[k]

    def logits(self, patched: Sequence[Sequence[Item]]) -> Tensor:
        """Logits [set, pair, vocab] at the last position, each set of items patched."""
        masks = masks_of([list(items) for items in patched], self.universe, self.n_positions)
        parts = needs_parts(masks)
        columns = []
        for k, chunk in enumerate(self.chunks):
            corrupted = self._corrupted(k, parts)
            n = max(1, self.rows // len(chunk))
            groups = [type(masks)(*(mask[i : i + n] for mask in masks)) for i in range(0, len(patched), n)]
            columns.append(torch.cat([patched_logits(self.model, chunk, corrupted, g) for g in groups]))
        return torch.cat(columns, dim=1).float()

    def score(self, logits: Tensor) -> dict[str, Tensor]:
        """Per-pair scores [set, pair] of logits [set, pair, vocab]; names in SCORES."""
        difference = metrics.logit_diff(logits, self.answer, self.wrong)
        clean = metrics.logit_diff(self.clean_logits, self.answer, self.wrong)
        corrupted = metrics.logit_diff(self.corrupted_logits, self.answer, self.wrong)
        return {
            "normalized_logit_diff": metrics.normalized_logit_diff(difference, clean, corrupted),
            "accuracy": metrics.accuracy(logits, self.answer, self.candidates),
            "full_vocabulary_accuracy": metrics.full_vocabulary_accuracy(logits, self.answer),
            "relative_probability": metrics.relative_probability(logits, self.answer, self.candidates),
            "kl": metrics.kl_divergence(logits, self.clean_logits),
            "logit_diff": difference,
        }

    def scores(self, patched: Sequence[Sequence[Item]], progress: Progress | None = None) -> dict[str, Tensor]:
        """Per-pair scores [set, pair] with each set of items patched; the logits of few sets are alive at a time."""
        n = max(1, self.rows // len(self.pairs))
        found = []
        for first in range(0, len(patched), n):
            found.append(self.score(self.logits(patched[first : first + n])))
            if progress:
                progress(min(first + n, len(patched)), len(patched))
        return {name: torch.cat([scores[name] for scores in found]) for name in SCORES}

    def normalized(self, patched: Sequence[Sequence[Item]]) -> Tensor:
        """Mean normalized logit diff [set]."""
        return self.scores(patched)["normalized_logit_diff"].mean(1)

    def faithfulness(self, logit_diff: Tensor) -> Tensor:
        """MIB's f [set] from logit differences [set, pair]."""
        full, empty = self._ends().mean(1)
        return (logit_diff.mean(-1) - empty) / (full - empty)

    def _ends(self) -> Tensor:
        """Logit differences [2, pair] of the clean and of the corrupted prompts."""
        ends = (self.clean_logits, self.corrupted_logits)
        return torch.stack([metrics.logit_diff(logits, self.answer, self.wrong) for logits in ends])

    def estimates(
        self, patched: Sequence[Sequence[Item]], seed: int = 0, progress: Progress | None = None
    ) -> dict[str, Estimate]:
        """The scores of SCORES and `f` with each set of items patched, as means over pairs with resamples."""
        scores = self.scores(patched, progress)
        out = {name: Estimate(v.mean(1).double().cpu(), resampled_means(v, seed=seed)) for name, v in scores.items()}
        ends, differences = resampled_means(self._ends(), seed=seed), out["logit_diff"].resampled
        full, empty = ends[:, :1], ends[:, 1:]
        f = (differences - empty) / (full - empty)
        out["f"] = Estimate(self.faithfulness(scores["logit_diff"]).double().cpu(), f)
        return out


def candidates_of(pairs: Pairs) -> Tensor:
    """The candidates of the pairs, or (answer, wrong) where they have none."""
    return torch.stack((pairs.answer, pairs.wrong), 1) if pairs.candidates is None else pairs.candidates


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
    tried: dict[int, pd.DataFrame] = {}

    def value(k: int) -> float:
        if k not in tried:
            tried[k] = size_curve(evaluator, table, [k])
        return float(tried[k][metric].iloc[0])

    low, high = 0, len(table) - 1
    while low < high:
        middle = -(-(low + high) // 2)
        low, high = (low, middle - 1) if value(middle) > target else (middle, high)
    k = min(len(table) - 1, low + 1)
    value(k)
    curve = pd.concat(tried.values()).sort_values("size").reset_index(drop=True)
    curve["monotonic"] = curve[metric] >= curve[metric].cummax().shift(fill_value=float("-inf"))
    return top(table, k, evaluator.universe), curve


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


def exact_effects(evaluator: Evaluator, items: Sequence[Item], progress: Progress | None = None) -> Tensor:
    """What patching each item alone does to the normalized logit diff, Float[item, pair]; negative = it hurts."""
    clean = evaluator.score(evaluator.clean_logits[None])["normalized_logit_diff"]
    return evaluator.scores([[item] for item in items], progress)["normalized_logit_diff"] - clean


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation along the last axis, [..., item] gives [...]; equal values share a mean rank."""

    def centred_ranks(values: Tensor) -> Tensor:
        rows = pd.DataFrame(values.reshape(-1, values.shape[-1]).cpu().numpy())
        ranks = torch.tensor(rows.rank(axis=1).to_numpy())
        return ranks - ranks.mean(-1, keepdim=True)

    x, y = centred_ranks(first), centred_ranks(second)
    return ((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).reshape(first.shape[:-1])
