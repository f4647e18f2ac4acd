"""Scores of many sets of patched items on the same pairs, and what other draws of the pairs would have given.

f is MIB's faithfulness, (m(C) - m(empty)) / (m(N) - m(empty)) with m the mean logit difference, the empty circuit being
the corrupted run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import metrics
from .graph import Item, Masks, Universe, masks_of
from .jobs import call, config_of, runs_here
from .memory import rows_per_pass
from .patching import corrupted_run, needs_parts, patched_run
from .sweep import Progress
from .tasks.base import Pairs

SCORES = (
    "normalized_logit_diff",
    "accuracy",
    "full_vocabulary_accuracy",
    "relative_probability",
    "kl",
    "logit_diff",
)
ENDS = ("clean", "corrupted")


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
    """Evaluates many sets of patched items on the same pairs; each call is one job.

    rows bounds memory: so many prompts in a pass, default from an estimate. Here, clean and corrupted values of all
    pairs are kept between calls while they take less than `keep_mib` MiB; else, and on a server, each call runs the
    clean and corrupted prompts anew. resume: a pass begins at the first layer where its sets differ from the set that
    was run before, which is what makes a search cheap; False runs every pass in full (slower, same values).
    All that is returned is on the CPU. Raises InputError for the universe of another model or of other positions.
    """

    def __init__(
        self,
        model,
        pairs: Pairs,
        universe: Universe,
        *,
        rows: int | None = None,
        keep_mib: int = 1024,
        resume: bool = True,
    ):
        universe.check_fits(model, pairs.clean.shape[1])
        self.model, self.pairs, self.universe, self.resume = model, pairs, universe, resume
        self.rows = rows or rows_per_pass(model, pairs.clean.shape[1], "parts" if universe.parts else "edges")
        config = config_of(model)
        floats = (
            pairs.clean.shape[1]
            * config.num_hidden_layers
            * (2 * config.hidden_size + (8 * config.intermediate_size if universe.parts else 0))
        )
        self._memory: dict | None = {} if runs_here(model) and 4 * floats * len(pairs) <= keep_mib * 2**20 else None
        self._ends: Tensor | None = None

    def scores(self, patched: Sequence[Sequence[Item]], progress: Progress | None = None) -> dict[str, Tensor]:
        """Per-pair scores [set, pair] of SCORES with each set of items patched.

        Raises InputError for scores that are not finite, naming the pair.
        """
        masks = masks_of([list(items) for items in patched], self.universe, self.pairs.clean.shape[1])
        pairs = self.pairs.without_text()
        options = (self.universe.parts, self.rows, self._memory, self.resume)
        found = call(self.model, _scores, pairs, masks, *options, progress=progress)
        self._ends = torch.stack([found.pop(name) for name in ENDS])
        return found

    def normalized(self, patched: Sequence[Sequence[Item]]) -> Tensor:
        """Mean normalized logit diff [set]."""
        return self.scores(patched)["normalized_logit_diff"].mean(1)

    def ends(self) -> Tensor:
        """Logit differences [2, pair] of the clean and of the corrupted prompts."""
        if self._ends is None:
            self.scores([[]])
        assert self._ends is not None
        return self._ends

    def faithfulness(self, logit_diff: Tensor) -> Tensor:
        """MIB's f [set] from logit differences [set, pair]."""
        full, empty = self.ends().mean(1)
        return (logit_diff.mean(-1) - empty) / (full - empty)

    def estimates(
        self, patched: Sequence[Sequence[Item]], seed: int = 0, progress: Progress | None = None
    ) -> dict[str, Estimate]:
        """The scores of SCORES and `f` with each set of items patched, as means over pairs with resamples."""
        scores = self.scores(patched, progress)
        out = {name: Estimate(v.mean(1).double(), resampled_means(v, seed=seed)) for name, v in scores.items()}
        ends, differences = resampled_means(self.ends(), seed=seed), out["logit_diff"].resampled
        full, empty = ends[:, :1], ends[:, 1:]
        f = (differences - empty) / (full - empty)
        out["f"] = Estimate(self.faithfulness(scores["logit_diff"]).double(), f)
        return out

    def exact_effects(self, items: Sequence[Item], progress: Progress | None = None) -> Tensor:
        """What patching each item alone does to the normalized logit diff, Float[item, pair]; negative = it hurts."""
        patched = self.scores([[item] for item in items], progress)["normalized_logit_diff"]
        clean, corrupted = self.ends()
        return patched - metrics.normalized_logit_diff(clean, clean, corrupted)


def _scores(
    model,
    pairs: Pairs,
    masks: Masks,
    parts: bool,
    rows: int,
    memory: dict | None,
    resume: bool,
    *,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Scores [set, pair] by name, and the logit differences of ENDS [pair]; the logits of few sets live at a time.

    parts: whether later calls may patch parts, so that what is kept in `memory` must serve them.
    """
    n_sets, size = masks.edges.shape[0], min(rows, len(pairs))
    found: dict[str, list[Tensor]] = {name: [] for name in (*SCORES, *ENDS)}
    for k, first in enumerate(range(0, len(pairs), size)):
        chunk = pairs[first : first + size]
        values = None if memory is None else memory.get(k)
        if values is None:
            corrupted = corrupted_run(model, chunk, parts=needs_parts(masks) if memory is None else parts)
            nothing = Masks(*(torch.zeros_like(mask[:1]) for mask in masks))
            logits, last_run = patched_run(model, chunk, corrupted, nothing)
            values = (corrupted, logits[0].float(), last_run)
            for name, logits in zip(ENDS, (values[1], corrupted.logits), strict=True):
                chunk.check_finite(f"logits of its {name} prompt", logits.sum(-1), first)
        corrupted, clean, last_run = values
        step = max(1, rows // len(chunk))
        of_sets: dict[str, list[Tensor]] = {name: [] for name in SCORES}
        for begin in range(0, n_sets, step):
            group = Masks(*(mask[begin : begin + step] for mask in masks))
            logits, last_run = patched_run(model, chunk, corrupted, group, last_run if resume else None)
            for name, score in _score(chunk, logits.float(), clean, corrupted.logits.float()).items():
                chunk.check_finite(f"a {name} when patched", score, first)
                of_sets[name].append(score.cpu())
            if progress:
                progress(first * n_sets + min(begin + step, n_sets) * len(chunk), len(pairs) * n_sets)
        if memory is not None:
            memory[k] = (corrupted, clean, last_run)
        for name, scores in of_sets.items():
            found[name].append(torch.cat(scores))
        for name, logits in zip(ENDS, (clean, corrupted.logits.float()), strict=True):
            found[name].append(metrics.logit_diff(logits, *_answers(chunk, logits)).cpu())
    return {name: torch.cat(parts_, dim=-1) for name, parts_ in found.items()}


def _answers(pairs: Pairs, like: Tensor) -> tuple[Tensor, Tensor]:
    return pairs.answer.to(like.device), pairs.wrong.to(like.device)


def _score(pairs: Pairs, logits: Tensor, clean: Tensor, corrupted: Tensor) -> dict[str, Tensor]:
    """Scores [set, pair] of logits [set, pair, vocab], given those of the clean and corrupted prompts [pair, vocab]."""
    answers = _answers(pairs, logits)
    candidates = pairs.choices
    difference, *ends = (metrics.logit_diff(each, *answers) for each in (logits, clean, corrupted))
    return {
        "normalized_logit_diff": metrics.normalized_logit_diff(difference, *ends),
        "accuracy": metrics.accuracy(logits, answers[0], candidates),
        "full_vocabulary_accuracy": metrics.full_vocabulary_accuracy(logits, answers[0]),
        "relative_probability": metrics.relative_probability(logits, answers[0], candidates),
        "kl": metrics.kl_divergence(logits, clean),
        "logit_diff": difference,
    }
