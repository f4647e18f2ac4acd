"""Which items of a circuit other draws of the prompts would choose too, at several sizes.

The pairs are drawn anew, whole clusters with replacement, and ranked by their mean scores of each draw. An item's
*inclusion frequency* at a size is the share of draws in which it is among so many first items. Items that nearly every
draw includes are the stable *core*; those that most include, the *consensus* circuit. (CIRCUS, arXiv 2603.00523, counts over
configurations of one method in the same way.) Nothing is run: scores of single pairs are all that it takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ioi_mamba.circuits.ranking import places_of
from ioi_mamba.passes.intervals import resampled_means

CONSENSUS, CORE = 0.5, 0.95
"""The consensus circuit has the items that more than this share of draws include, the core those of at least this share."""


def drawn_means(per_pair: Tensor, clusters: Tensor, n_draws: int, seed: int = 0) -> Tensor:
    """Float64[draw, item], means of scores [item, pair] over draws of whole clusters; NaN: a pair that has no score.

    A draw in which no pair has a score gives 0.
    """
    there = ~per_pair.isnan()
    total, share = (
        resampled_means(values, clusters, n_draws, seed) for values in (per_pair.nan_to_num(0.0), there.double())
    )
    return torch.where(share > 0, total / share.clamp(min=1e-12), 0.0)


def inclusion(means: Tensor, sizes: Sequence[int], order: str = "signed") -> Tensor:
    """Float64[size, item], the share of draws in which an item is among the first so many.

    Args:
        means: Float[draw, item], as `drawn_means` gives them.
        sizes: How many items a circuit has.
        order: "signed" or "absolute", as of a ranking (`ranking.ORDERS`).
    """
    ranks = torch.empty(means.shape, dtype=torch.int64)
    for draw, scores in enumerate(means):
        ranks[draw, places_of(scores, order)] = torch.arange(means.shape[1])
    return torch.stack([(ranks < size).double().mean(0) for size in sizes])
