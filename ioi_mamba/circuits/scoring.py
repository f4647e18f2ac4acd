"""Scores of many sets of patched items on the same pairs, and the search for how few items are enough.

f is MIB's faithfulness, (m(C) - m(empty)) / (m(N) - m(empty)) with m the mean logit difference. In the empty circuit
everything is patched: resampled, that is the corrupted run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ioi_mamba.circuits.features import Features, row_floats
from ioi_mamba.circuits.graph import Item, Masks, Universe, masks_of, universe_of
from ioi_mamba.circuits.patching import corrupted_run, kept_floats, kind_of_patches, patched_run, spread_for
from ioi_mamba.errors import InputError
from ioi_mamba.model.jobs import conduct, each_chunk, runs_here
from ioi_mamba.model.memory import rows_per_chunk, rows_per_pass
from ioi_mamba.passes import metrics
from ioi_mamba.passes.ablations import Ablation, AblationName, Spread
from ioi_mamba.passes.ranges import has_range, no_range
from ioi_mamba.passes.sweep import Progress
from ioi_mamba.remote.store import Scratch
from ioi_mamba.tasks.base import Pairs, check_pairs

SCORES = (
    "normalized_logit_diff",
    "accuracy",
    "full_vocabulary_accuracy",
    "relative_probability",
    "kl",
    "logit_diff",
)
ENDS = ("clean", "corrupted", "empty")
"""Runs whose logit differences scores are held against: of the clean and the corrupted prompts, and with everything patched."""
SPREAD = "spread"
USABLE = "usable"


class Evaluator:
    """Evaluates many sets of patched items on the same pairs; each call is one job.

    Pairs without a range (`ranges`) have no scores: they are left out, and `rows_kept` says which are not.

    rows bounds memory: so many prompts in a pass, default from an estimate. Here, clean and corrupted values of all
    pairs are kept between calls while they take less than `keep_mib` MiB; else, and on a server, each call runs the
    clean and corrupted prompts anew. resume: a pass begins at the first layer where its sets differ from the set that
    was run before, which is what makes a search cheap; False runs every pass in full (slower, same values). ablation:
    what patching writes, by default the corrupted run's values (`passes.ablations`).
    All that is returned is on the CPU. Raises InputError for the universe of another model or of other positions, and for
    pairs of several layouts where the universe has positions.
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
        ablation: AblationName | Ablation = "resample",
    ):
        universe.check_fits(model, check_pairs(pairs).clean.shape[1])
        if universe.n_positions is not None:
            check_one_layout(pairs)
        self.model, self.pairs, self.universe, self.resume = model, pairs, universe, resume
        self.ablation = kind_of_patches(ablation, pairs, universe.features)
        n_positions, kind = pairs.clean.shape[1], "parts" if universe.parts else "edges"
        more = row_floats(universe.features, n_positions)
        self.rows = rows or rows_per_pass(model, n_positions, kind, more=more)
        self.size = min(rows or len(pairs), rows_per_chunk(model, len(pairs), n_positions, kind, more=more))
        self.keeps = 4 * kept_floats(model, universe, pairs.clean.shape[1]) * len(pairs) <= keep_mib * 2**20
        self._memory: Scratch | None = Scratch() if runs_here(model) and self.keeps else None
        self._ends: Tensor | None = None
        self._kept: Tensor | None = None

    def scores(self, patched: Sequence[Sequence[Item]], progress: Progress | None = None) -> dict[str, Tensor]:
        """Per-pair scores [set, pair] of SCORES with each set of items patched, of the pairs of `rows_kept`.

        Raises InputError for scores that are not finite, naming the pair, and where no pair has a range.
        """
        masks = masks_of([list(items) for items in patched], self.universe, self.pairs.clean.shape[1])
        pairs = self.pairs.without_text()
        about = (self.universe.parts, self.universe.features, self.rows, self.size)
        options = (*about, self._memory, self.resume, self.ablation)
        found = conduct(self.model, _scores, pairs, masks, *options, progress=progress)
        kept = self._kept = found.pop(USABLE).nonzero()[:, 0]
        if len(kept) == 0:
            raise InputError(no_range(len(self.pairs)))
        found = {name: values[..., kept] for name, values in found.items()}
        self._ends = torch.stack([found.pop(name) for name in ENDS])
        return found

    def normalized(self, patched: Sequence[Sequence[Item]]) -> Tensor:
        """Mean normalized logit diff [set]."""
        return self.scores(patched)["normalized_logit_diff"].mean(1)

    def ends(self) -> Tensor:
        """Logit differences [3, pair] of ENDS."""
        if self._ends is None:
            self.scores([[]])
        assert self._ends is not None
        return self._ends

    @property
    def rows_kept(self) -> Tensor:
        """Int64[row], which of the pairs have a range, and so scores."""
        if self._kept is None:
            self.scores([[]])
        assert self._kept is not None
        return self._kept

    @property
    def clusters(self) -> Tensor:
        """Int64[row], the clusters (`Pairs.clusters`) of the pairs that have scores."""
        return self.pairs[self.rows_kept].clusters

    def faithfulness(self, logit_diff: Tensor) -> Tensor:
        """MIB's f [set] from logit differences [set, pair]."""
        return faithfulness_of(logit_diff, self.ends())

    def exact_effects(self, items: Sequence[Item], progress: Progress | None = None) -> Tensor:
        """What patching each item alone does to the normalized logit diff, Float[item, pair]; negative = it hurts."""
        patched = self.scores([[item] for item in items], progress)["normalized_logit_diff"]
        clean, corrupted, _ = self.ends()
        return patched - metrics.normalized_logit_diff(clean, clean, corrupted)


def faithfulness_of(logit_diff: Tensor, ends: Tensor) -> Tensor:
    """MIB's f [set] of logit differences [set, pair]; ends: those [3, pair] of ENDS."""
    full, _, empty = ends.mean(1)
    return (logit_diff.mean(-1) - empty) / (full - empty)


def smallest_size(n_items: int, above: Callable[[int, int, int], bool]) -> int:
    """The smallest size for which `above` holds, by the published binary search (appendix D.1).

    L = 0, R = n - 1; m = ceil((L + R) / 2); above the target R = m - 1, else L = m; the result is min(n - 1, L + 1), so
    that n - 1 is also the answer where no size is above. above: called with (m, L, R).
    """
    low, high = 0, n_items - 1
    while low < high:
        middle = -(-(low + high) // 2)
        low, high = (low, middle - 1) if above(middle, low, high) else (middle, high)
    return min(n_items - 1, low + 1)


def chosen_sizes(
    evaluator: Evaluator, samples: Sequence[Tensor], orders: Sequence[Sequence[Item]], target: float
) -> list[int]:
    """How many first items of each order are enough for an accuracy above `target` on its sample; a sample is a chunk.

    samples: Int64[row], some of the evaluator's pairs, one for each order of the same items.
    """
    pairs, universe, n_positions = evaluator.pairs, evaluator.universe, evaluator.pairs.clean.shape[1]
    ranks = []
    for order in orders:
        # The rank of every item, put together from the binary digits of ranks.
        digits = range(len(order).bit_length())
        sets = [[item for rank, item in enumerate(order, 1) if rank >> digit & 1] for digit in digits]
        masks = masks_of(sets, universe, n_positions)
        powers = torch.tensor([2.0**digit for digit in digits])
        ranks.append(Masks(*(torch.tensordot(powers, mask, 1)[None] for mask in masks)))
    parts = [pairs[rows].without_text() for rows in samples]
    passes = (evaluator.rows, evaluator.size, universe.parts, universe.features, evaluator.keeps, evaluator.ablation)
    options = (len(orders[0]), target, *passes)
    chunks = [(part, rank, *options) for part, rank in zip(parts, ranks, strict=True)]
    return each_chunk(evaluator.model, _smallest, chunks)


def _smallest(
    model,
    pairs: Pairs,
    rank: Masks,
    n_items: int,
    target: float,
    rows: int,
    size: int,
    parts: bool,
    features: tuple[Features, ...],
    keeps: bool,
    ablation: Ablation,
    *,
    progress=None,
) -> int:
    """What `chosen_sizes` gives of one sample; rank: of each item, from 1, 0 for what is kept always."""
    memory: Scratch | None = Scratch() if keeps else None

    def above(n: int, low: int, high: int) -> bool:
        masks = Masks(*((each > n).float() for each in rank))
        scores = _scores(model, pairs, masks, parts, features, rows, size, memory, True, ablation)
        return float(scores["accuracy"][0, scores[USABLE]].mean()) > target

    return smallest_size(n_items, above)


def check_one_layout(pairs: Pairs) -> None:
    """Raise InputError unless the same word stands at the same position in all pairs, as items at positions need."""
    n_layouts = len(check_pairs(pairs).layouts())
    if n_layouts > 1:
        raise InputError(
            f"These prompts have {n_layouts} layouts (lengths, or places of their words), so that one position is not "
            "one word in all of them; give those of one layout, such as pairs.layouts()[0]."
        )


def _scores(
    model,
    pairs: Pairs,
    masks: Masks,
    parts: bool,
    features: tuple[Features, ...],
    rows: int,
    size: int,
    memory: Scratch | None,
    resume: bool,
    ablation: Ablation,
    *,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Scores [set, pair] by name, the logit differences of ENDS [pair], and USABLE [pair], whether a pair has a range.

    Pairs without a range have scores of 0. rows: in a pass; size: pairs of a chunk.
    parts: whether later calls may patch parts, so that what is kept in `memory` must serve them.
    """
    inside = bool(masks.parts.any()) if memory is None else parts
    kept = Scratch() if memory is None else memory
    if SPREAD not in kept:
        kept[SPREAD] = spread_for(model, pairs, parts=inside, ablation=ablation)
    options = (masks, inside, features, rows, kept[SPREAD])
    chunks = [(pairs[first : first + size], *options, first, memory, resume) for first in range(0, len(pairs), size)]
    found = each_chunk(model, _chunk_scores, chunks, progress=progress)
    return {name: torch.cat([chunk[name] for chunk in found], dim=-1) for name in found[0]}


def _chunk_scores(
    model,
    pairs: Pairs,
    masks: Masks,
    parts: bool,
    features: tuple[Features, ...],
    rows: int,
    spread: Spread | None,
    first: int,
    memory: Scratch | None,
    resume: bool,
    *,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The same of the pairs from number `first` on. The logits of few sets live at a time."""
    n_sets, step = masks.edges.shape[0], max(1, rows // len(pairs))
    values = None if memory is None else memory.get(first)
    if values is None:
        numbers = torch.arange(first, first + len(pairs))
        corrupted = corrupted_run(model, pairs, parts=parts, features=features, spread=spread, rows=numbers)
        nothing, everything = (Masks(*(torch.zeros_like(mask[:1]) for mask in masks)) for _ in range(2))
        logits, last_run = patched_run(model, pairs, corrupted, nothing)
        empty = corrupted.logits
        if spread is not None:
            for source, target in universe_of(model).edges():
                everything.edges[:, source, target - 1] = 1
            empty = patched_run(model, pairs, corrupted, everything)[0][0]
        values = (corrupted, (logits[0], corrupted.logits, empty), last_run)
        whose = ("of its clean prompt", "of its corrupted prompt", "with everything patched")
        for name, logits in zip(whose, values[1], strict=True):
            pairs.check_finite(f"logits {name}", logits.sum(-1), first)
    corrupted, ends, last_run = values
    usable = has_range(*(metrics.answer_logits(logits, *_answers(pairs, logits)) for logits in ends[:2]))
    of_sets: dict[str, list[Tensor]] = {name: [] for name in SCORES}
    for begin in range(0, n_sets, step):
        group = Masks(*(mask[begin : begin + step] for mask in masks))
        logits, last_run = patched_run(model, pairs, corrupted, group, last_run if resume else None)
        for name, score in _score(pairs, logits.float(), *(each.float() for each in ends[:2])).items():
            score = torch.where(usable, score, 0.0)
            pairs.check_finite(f"a {name} when patched", score, first)
            of_sets[name].append(score.cpu())
        if progress:
            progress(min(begin + step, n_sets), n_sets)
    if memory is not None:
        memory[first] = (corrupted, ends, last_run)
    found = {name: torch.cat(scores) for name, scores in of_sets.items()}
    for name, logits in zip(ENDS, ends, strict=True):
        found[name] = metrics.logit_diff(logits.float(), *_answers(pairs, logits)).cpu()
    return found | {USABLE: usable.cpu()}


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
