"""What a run's last-position logits say about the answer.

Every metric gives one value per pair and leaves the mean to the caller. A is the answer of the clean prompt
(`Pairs.answer`), B that of the corrupted one (`Pairs.wrong`); logits and their differences are in natural log
units. Leading dimensions are free: [layer, pos, pair, vocab] gives [layer, pos, pair].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ioi_mamba.errors import InputError

ROUNDING = 1e-9


def answer_logits(logits: Tensor, answer: Tensor, wrong: Tensor) -> Tensor:
    """Float[..., pair, 2]: the logits of A and of B, out of Float[..., pair, vocab]; float32 or above.

    A difference of two logits in half precision would be rounded again.
    """
    found = _gather(logits, torch.stack([answer, wrong], -1))
    return found.to(torch.promote_types(found.dtype, torch.float32))


def logit_diff(logits: Tensor, answer: Tensor | None = None, wrong: Tensor | None = None) -> Tensor:
    """logit A - logit B, Float[..., pair].

    logits: Float[..., pair, vocab] with `answer` and `wrong`, Int[pair]; or, without the two,
        Float[..., pair, 2] as `answer_logits` gives it.
    """
    if answer is not None and wrong is not None:
        logits = answer_logits(logits, answer, wrong)
    elif answer is not None or wrong is not None or logits.shape[-1] != 2:
        raise InputError(
            f"logits of shape {tuple(logits.shape)} need both answer and wrong; leave both out only for [..., pair, 2]."
        )
    return logits[..., 0] - logits[..., 1]


def normalized_logit_diff(patched: Tensor, clean: Tensor, corrupted: Tensor) -> Tensor:
    """Appendix B: (d_patched - d_corrupted) / |d_clean - d_corrupted|, a range of 0 counted as 1; no unit.

    That is the paper's definition. Pairs without a range (`ranges`) do not get here from any experiment or search.

        >>> patched, clean, corrupted = torch.tensor([2.0]), torch.tensor([5.0]), torch.tensor([-5.0])
        >>> round(float(normalized_logit_diff(patched, clean, corrupted).mean()), 3)  # keeps 70 % of the range
        0.7
        >>> round(float(effect(patched, clean, corrupted).mean()), 3)  # of which 30 % are gone
        0.3

    All three are logit differences A - B of the clean prompt's A and B, Float[..., pair]. 1 acts like the
    clean run, 0 like the corrupted one; where the clean difference is the smaller one, the clean run has -1.
    """
    possible_range = (clean - corrupted).abs()
    return (patched - corrupted) / torch.where(possible_range == 0, 1.0, possible_range)


def effect(patched: Tensor, clean: Tensor, corrupted: Tensor) -> Tensor:
    """1 - (d_patched - d_corrupted) / (d_clean - d_corrupted), what figures 4, 8, 10 and 11 show; no unit.

    Logit differences as in `normalized_logit_diff`. 0 acts like the clean run, 1 like the corrupted one. As
    in the figures nothing is guarded: a small range blows the value up, a range of 0 gives inf or NaN. Experiments
    leave pairs without a range out (`ranges`).
    """
    return 1 - (patched - corrupted) / (clean - corrupted)


def accuracy(logits: Tensor, answer: Tensor, candidates: Tensor) -> Tensor:
    """1 where no candidate has a larger logit than the answer, else 0; Float32[..., pair].

    logits: Float[..., pair, vocab]; candidates: Int[pair, choice], padded with -1. This is the accuracy of
    the published code: among the 3 or 4 names of the pair, so that other words may be likelier still.
    """
    answers = _gather(logits, answer[:, None])
    return (answers >= _candidate_logits(logits, candidates).amax(-1, keepdim=True))[..., 0].float()


def full_vocabulary_accuracy(logits: Tensor, answer: Tensor) -> Tensor:
    """1 where no token at all has a larger logit than the answer, else 0; Float32[..., pair]."""
    return (_gather(logits, answer[:, None]) >= logits.amax(-1, keepdim=True))[..., 0].float()


def relative_probability(logits: Tensor, answer: Tensor, candidates: Tensor) -> Tensor:
    """Probability of the answer in a softmax over the candidates alone, in 0..1 (figure 5); Float[..., pair].

    Shapes as in `accuracy`; each candidate once, the answer among them.
    """
    is_answer = candidates == answer[:, None].to(candidates.device)
    if not is_answer.any(-1).all():
        raise InputError("An answer is not among its candidates; give candidates that include every answer.")
    return (_candidate_logits(logits, candidates).softmax(-1) * is_answer.to(logits.device)).sum(-1)


def kl_divergence(patched: Tensor, clean: Tensor) -> Tensor:
    """KL(clean || patched) over the vocabulary, in nats; Float[..., pair, vocab] gives Float[..., pair]."""
    clean_log, patched_log = clean.log_softmax(-1), patched.log_softmax(-1)
    # A token that the clean run excludes (-inf) adds nothing, where the product would be 0 * inf.
    return torch.where(clean_log.isneginf(), 0.0, clean_log.exp() * (clean_log - patched_log)).sum(-1)


def reaches(value: float, bound: float) -> bool:
    """Whether value >= bound up to rounding, so that 1 - .97 is not more than .03. False for NaN."""
    return value >= bound - ROUNDING


def wilson_interval(successes: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion, (low, high) in 0..1.

    n: independent outcomes; an effective number of them need not be whole. z: 1.96 is 95 %.

        >>> [round(end, 3) for end in wilson_interval(19, 20)]
        [0.764, 0.991]
    """
    if not 0 <= successes <= n or n == 0:
        raise InputError(f"{successes} successes of {n} is no proportion; give 0 <= successes <= n and n > 0.")
    share, weight = successes / n, z * z / n
    centre = (share + weight / 2) / (1 + weight)
    margin = z / (1 + weight) * math.sqrt(share * (1 - share) / n + weight / (4 * n))
    # Without rounding, which would leave 0 of n successes outside of their own interval.
    low = 0.0 if successes == 0 else max(0.0, centre - margin)
    return low, 1.0 if successes == n else min(1.0, centre + margin)


def clustered_variance(values: Tensor, clusters: Tensor) -> Tensor:
    """The variance of the mean of values [..., row], rows of one cluster being no independent draws; Float64[...].

    clusters: Int64[row], 0 to m - 1 (`Pairs.clusters`). The between-cluster estimate, m / (m - 1) times the sum over
    clusters of their summed deviations squared, over n^2; with a row a cluster the usual variance of a mean. NaN for
    one cluster, whose spread says nothing of other draws.
    """
    values, clusters = values.detach().double(), clusters.to(values.device)
    n_clusters = int(clusters.max()) + 1
    sums = values.new_zeros(*values.shape[:-1], n_clusters)
    sums.index_add_(-1, clusters, values - values.mean(-1, keepdim=True))
    correction = n_clusters / (n_clusters - 1) if n_clusters > 1 else math.nan
    return correction * (sums / values.shape[-1]).square().sum(-1)


def _gather(logits: Tensor, ids: Tensor) -> Tensor:
    """Float[..., pair, choice] out of Float[..., pair, vocab] for Int[pair, choice]."""
    if logits.ndim < 2 or logits.shape[-2] != len(ids):
        raise InputError(f"logits of shape {tuple(logits.shape)} are not [..., pair, vocab] for {len(ids)} pairs.")
    if ids.min() < 0 or ids.max() >= logits.shape[-1]:
        raise InputError(f"A token id is outside the {logits.shape[-1]} logits; give ids of the model's vocabulary.")
    return logits.gather(-1, ids.to(logits.device).expand(*logits.shape[:-1], ids.shape[-1]))


def _candidate_logits(logits: Tensor, candidates: Tensor) -> Tensor:
    """Float[..., pair, choice], -inf where a pair has no further candidate."""
    padding = (candidates < 0).to(logits.device)
    return _gather(logits, candidates.clamp(min=0)).masked_fill(padding, -math.inf)
