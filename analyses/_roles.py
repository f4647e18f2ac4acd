"""What the experiments share that sum values over tokens by their role, so that prompts of any layout can be averaged."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ioi_mamba.passes.intervals import mean_interval
from ioi_mamba.tasks.base import Pairs

OTHER = "other"
"""The label of tokens that have no role."""


class Layout(NamedTuple):
    """Pairs of one layout.

    Attributes:
        pairs: They, without padding.
        rows: Int64[pair], their rows among all.
        at: Float[label, pos], 1 where a position has that label.
    """

    pairs: Pairs
    rows: Tensor
    at: Tensor


def by_role(pairs: Pairs) -> tuple[list[str], list[Layout]]:
    """The labels (BOS, the roles in the order of the tokens, OTHER) and the layouts of the pairs."""
    parts = pairs.layouts()
    longest = max(parts, key=lambda part: part.clean.shape[1])
    named = dict.fromkeys(
        label for part in (longest, *parts) for label in part.position_labels() if label in part.roles
    )
    labels = ["BOS", *(label for label in named if label != "BOS"), OTHER]
    layouts = []
    for part, own_rows in zip(parts, pairs.layout_rows(), strict=True):
        own = [label if label in labels else OTHER for label in part.position_labels()]
        at = torch.tensor([[float(label == name) for label in own] for name in labels])
        layouts.append(Layout(part, torch.tensor(own_rows), at))
    return labels, layouts


class Mean(NamedTuple):
    """A mean over the pairs that have a value."""

    value: float
    low: float
    high: float
    n: int


def means(values: Tensor, clusters: Tensor) -> list[Mean | None]:
    """The mean of each row of values [cell, pair], NaN where a pair has none, with its 95 % interval; None without any."""
    found: list[Mean | None] = [None] * len(values)
    there = ~values.isnan()
    for here in there.unique(dim=0):
        if not here.any():
            continue
        cells = (there == here).all(1).nonzero()[:, 0]
        scores = values[cells][:, here]
        low, high = mean_interval(scores, clusters[here].unique(return_inverse=True)[1])
        for cell, *ends in zip(
            cells.tolist(), scores.double().mean(1).tolist(), low.tolist(), high.tolist(), strict=True
        ):
            found[cell] = Mean(*ends, int(here.sum()))
    return found
