"""Which pairs can be normalised by: the one rule for pairs without a range.

The range of a pair is how far its clean and its corrupted logit difference are apart, |d_clean - d_corrupted|. Scores
that are divided by it mean nothing where it is no larger than rounding: a prompt whose corrupted copy is the same, or
is answered alike, turns noise into effects of any size. Such pairs are left out of every experiment, metric and search
that compares clean and corrupted runs, whatever its score, so that all of them speak of the same prompts. How many were
left out is counted in the tables (`left_out`) and said in the findings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ioi_mamba.errors import InputError
from ioi_mamba.model.jobs import conduct, each_chunk
from ioi_mamba.model.memory import rows_per_chunk
from ioi_mamba.passes.metrics import logit_diff
from ioi_mamba.passes.sweep import choice_scores
from ioi_mamba.tasks.base import Pairs, check_pairs

SMALLEST = 1e-3
"""Logits. Two passes of one prompt in float32 differ by some 1e-5, so that scores are right to 1 %."""


class Usable(NamedTuple):
    """The pairs that have a range. rows: Int64[pair], their numbers among those given; left_out: how many have none."""

    pairs: Pairs
    rows: Tensor
    left_out: int


def has_range(clean: Tensor, corrupted: Tensor) -> Tensor:
    """Bool[pair], whether |d_clean - d_corrupted| exceeds the smallest range; of logits (answer, wrong), [pair, 2].

    The smallest range is SMALLEST logits, or where that is more, what rounding alone makes of it: the four logits of
    a pair are each off by up to half the dtype's spacing at their size, so twice that spacing at the largest (.5 for
    bfloat16 logits of 32). The logits must have the dtype that the model gave them in.
    """
    largest = torch.cat([clean, corrupted], -1).abs().amax(-1).double()
    rounding = 2 * torch.finfo(clean.dtype).eps * largest
    return (logit_diff(clean.double()) - logit_diff(corrupted.double())).abs() > rounding.clamp(min=SMALLEST)


def usable(model, pairs: Pairs) -> Usable:
    """The pairs that have a range, by their two plain passes, as one job.

    Raises InputError if none has one, and for logits that are not finite, naming the pair.
    """
    return usable_of(model, [pairs])[0]


def usable_of(model, sets: Sequence[Pairs]) -> list[Usable]:
    """As `usable`, of several sets of pairs, all as one job."""
    ends = conduct(model, _ends, [check_pairs(pairs).without_text() for pairs in sets])
    found = []
    for pairs, logits in zip(sets, ends, strict=True):
        for name, side in logits.items():
            pairs.check_finite(f"logits of its {name} prompt", side.sum(-1))
        rows = has_range(**logits).nonzero()[:, 0]
        if len(rows) == 0:
            raise InputError(no_range(len(pairs)))
        found.append(Usable(pairs if len(rows) == len(pairs) else pairs[rows], rows, len(pairs) - len(rows)))
    return found


def no_range(n_pairs: int) -> str:
    """The sentence for pairs of which none has a range."""
    which = "The pair has" if n_pairs == 1 else f"None of the {n_pairs} pairs has"
    return (
        f"{which} {'no' if n_pairs == 1 else 'a'} range: the model's logit difference is the same for its clean and "
        "corrupted prompt, so nothing can be normalised by it; give pairs whose two prompts are answered differently."
    )


def left_out_sentence(table) -> list[str]:
    """The sentence of findings on the pairs that a table's `left_out` counts; none where none was."""
    # A table of an earlier version has no such column.
    left_out = int(table["left_out"].max()) if "left_out" in table and len(table) else 0
    if not left_out:
        return []
    prompts = "1 prompt was" if left_out == 1 else f"{left_out} prompts were"
    return [
        f"{prompts} left out: clean and corrupted logit differences agree (within {SMALLEST:g} logits, or rounding), so "
        "there is no range to normalise by."
    ]


def _ends(model, sets: list[Pairs], *, progress=None) -> list[dict[str, Tensor]]:
    """Of each set the logits of (answer, wrong), [pair, 2], of its clean and corrupted prompts, in the model's dtype."""
    chunks, of_set = [], []
    for k, pairs in enumerate(sets):
        for rows in torch.arange(len(pairs)).split(rows_per_chunk(model, len(pairs), pairs.clean.shape[1])):
            chunks.append((pairs[rows],))
            of_set.append(k)
    found = each_chunk(model, _ends_chunk, chunks, progress=progress)
    return [
        {
            name: torch.cat([ends[name] for ends, own in zip(found, of_set, strict=True) if own == k])
            for name in found[0]
        }
        for k in range(len(sets))
    ]


def _ends_chunk(model, pairs: Pairs, *, progress=None) -> dict[str, Tensor]:
    found = {}
    with torch.no_grad():
        for name in ("clean", "corrupted"):
            last = choice_scores(model, pairs, getattr(pairs, name))
            answers = torch.stack([pairs.answer, pairs.wrong], 1).to(last.device)
            found[name] = last.gather(1, answers).cpu()
    return found
