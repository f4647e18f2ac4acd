"""How well a circuit stands for the model: scores on held-out pairs, with intervals, and against size.

A circuit is evaluated by patching everything outside it with the corrupted run (*sufficiency*), or, as a test of
*necessity*, by patching what is inside it and keeping the rest. Every score comes with a bootstrap interval over
pairs. f is MIB's faithfulness, (m(C) - m(empty)) / (m(N) - m(empty)) with m the mean logit difference, the empty
circuit being the corrupted run; CPR is the area under f over the fraction of items kept, CMD the area of |1 - f|.
"""

from __future__ import annotations

from collections.abc import Sequence

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


class Evaluator:
    """Evaluates many sets of patched items on the same pairs, running the clean and corrupted prompts once.

    pairs_per_pass bounds memory; default from an estimate. Corrupted values of all chunks are kept while they take
    less than `keep_mib` MiB, else computed anew for every call.
    """

    def __init__(self, model, pairs: Pairs, universe: Universe, *, rows: int | None = None, keep_mib: int = 1024):
        self.model, self.universe = model, universe
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

    def normalized(self, patched: Sequence[Sequence[Item]]) -> Tensor:
        """Mean normalized logit diff [set]."""
        return self.score(self.logits(patched))["normalized_logit_diff"].mean(1)

    def faithfulness(self, logit_diff: Tensor) -> Tensor:
        """MIB's f [set] from logit differences [set, pair]."""
        full = metrics.logit_diff(self.clean_logits, self.answer, self.wrong).mean()
        empty = metrics.logit_diff(self.corrupted_logits, self.answer, self.wrong).mean()
        return (logit_diff.mean(-1) - empty) / (full - empty)


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
    evaluator = Evaluator(model, pairs, circuit.universe)
    scores = evaluator.score(evaluator.logits([patched]))
    out: dict[str, float] = {"n": len(pairs), "size": len(circuit)}
    for name, values in scores.items():
        out[name] = float(values.mean())
        if intervals:
            out[f"{name}_low"], out[f"{name}_high"] = metrics.bootstrap_interval(values[0].cpu(), seed=seed)
    out["f"] = float(evaluator.faithfulness(scores["logit_diff"])[0])
    return out


def top(table: pd.DataFrame, k: int, universe: Universe) -> Circuit:
    """The circuit of the first k items of a ranked table."""
    return Circuit(frozenset(items_of(table.head(k))), universe)


def size_curve(
    evaluator: Evaluator, table: pd.DataFrame, sizes: Sequence[int], progress: Progress | None = None
) -> pd.DataFrame:
    """Scores of the circuits of the first k items of a ranked table, one row a size: size, fraction, f, SCORES."""
    everything, order = evaluator.universe.items(), items_of(table)
    always = [item for item in everything if item not in set(order)]
    rows = []
    for done, k in enumerate(sizes, 1):
        kept = {*order[:k], *always}
        scores = evaluator.score(evaluator.logits([[item for item in everything if item not in kept]]))
        row = {
            "size": k,
            "fraction": k / len(order),
            "f": float(evaluator.faithfulness(scores["logit_diff"])[0]),
        }
        rows.append(row | {name: float(values.mean()) for name, values in scores.items()})
        if progress:
            progress(done, len(sizes))
    return pd.DataFrame(rows)


def areas(curve: pd.DataFrame) -> dict[str, float]:
    """MIB's CPR and CMD: areas over the fraction of items kept (trapezoids between the fractions of the curve)."""
    curve = curve.sort_values("fraction")
    x = torch.tensor(curve["fraction"].to_numpy())
    f = torch.tensor(curve["f"].to_numpy())
    return {"cpr": float(torch.trapezoid(f, x)), "cmd": float(torch.trapezoid((1 - f).abs(), x))}


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


def bootstrap_jaccard(per_pair: pd.DataFrame, k: int, n_resamples: int = 200, seed: int = 0) -> Tensor:
    """Jaccard [resample] of the k best items of resampled pairs with the k best of all pairs.

    per_pair: the table of `attribute(..., per_pair=True)`, every item with every pair, in its order.
    """
    n_pairs = int(per_pair["pair"].max()) + 1
    scores = torch.tensor(per_pair["score"].to_numpy()).view(-1, n_pairs)
    generator = torch.Generator().manual_seed(seed)
    best = set(scores.mean(1).argsort(stable=True)[:k].tolist())
    out = []
    for _ in range(n_resamples):
        rows = torch.randint(n_pairs, (n_pairs,), generator=generator)
        other = set(scores[:, rows].mean(1).argsort(stable=True)[:k].tolist())
        out.append(len(best & other) / len(best | other))
    return torch.tensor(out)
