"""95 % intervals, all by cluster: how far other draws of the prompts could have moved a number.

Rows that share a prompt (the two directions of a symmetric pair, a repeated row) are one cluster, `Pairs.clusters`, and
count as one draw. Which interval belongs to what:

| number | interval |
|---|---|
| a mean of values (effects, scores, normalized logit diffs) | Student's t with m - 1 degrees of freedom, m clusters, on the between-cluster variance |
| a proportion (accuracy, success) | Wilson's, on the effective number of independent outcomes; never of no width |
| a difference of proportions on the same prompts | Bonett and Price (2012), on the effective number |
| a ratio or an area (f, CPR, CMD) | bootstrap of whole clusters, percentiles widened for small m (Hesterberg, 2015) |

One cluster alone has no interval of a mean: NaN. How often the intervals hold what they should stands in
docs/statistics.md, by simulation. This module stays on the client (scipy).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from scipy import special
from torch import Tensor

from ioi_mamba.passes.metrics import clustered_variance, wilson_interval

Ends = tuple[Tensor, Tensor]
"""(low, high), each of the shape of the numbers."""

Z = float(special.ndtri(0.975))


@dataclass(frozen=True)
class Mean:
    """Means of rows [circuit, row]; ends: the interval's function, of rows and clusters."""

    rows: Tensor
    clusters: Tensor
    ends: Callable[[Tensor, Tensor], Ends]

    @property
    def value(self) -> Tensor:
        """Float64[circuit]."""
        return self.rows.double().mean(-1)

    @property
    def interval(self) -> Ends:
        """(low, high), each [circuit]."""
        return self.ends(self.rows, self.clusters)

    def __sub__(self, other: Any) -> Mean:
        ends = mean_interval if self.ends is mean_interval else share_difference_interval
        return Mean(self.rows - other.rows, self.clusters, ends)

    def __getitem__(self, circuits) -> Mean:
        """The estimate of some of the circuits, by index or slice."""
        return Mean(self.rows[circuits], self.clusters, self.ends)


@dataclass(frozen=True)
class Resampled:
    """Numbers that are no means, value [circuit], and what resamples of the clusters give, [resample, circuit]."""

    value: Tensor
    resampled: Tensor
    n_clusters: int

    @property
    def interval(self) -> Ends:
        """(low, high), each [circuit]."""
        return percentile_interval(self.resampled, self.n_clusters)

    def __sub__(self, other: Any) -> Resampled:
        return Resampled(self.value - other.value, self.resampled - other.resampled, self.n_clusters)

    def __getitem__(self, circuits) -> Resampled:
        """The estimate of some of the circuits, by index or slice."""
        return Resampled(self.value[circuits], self.resampled[:, circuits], self.n_clusters)


Estimate = Mean | Resampled
"""One number for each of several circuits, all on the same rows, so that their differences have intervals too."""


def difference(one: Estimate, other: Estimate) -> Estimate:
    """How much more `one` is than `other`, circuit by circuit. Raises TypeError for estimates of two kinds."""
    if isinstance(one, Mean) and isinstance(other, Mean):
        return one - other
    if isinstance(one, Resampled) and isinstance(other, Resampled):
        return one - other
    raise TypeError(f"a {type(one).__name__} and a {type(other).__name__} have no difference")


def mean_interval(values: Tensor, clusters: Tensor) -> Ends:
    """Student's t interval of the mean of values [..., row]; NaN for one cluster."""
    mean, n_clusters = values.double().mean(-1), int(clusters.max()) + 1
    t = float(special.stdtrit(n_clusters - 1, 0.975)) if n_clusters > 1 else float("nan")
    half = t * clustered_variance(values, clusters).sqrt()
    return mean - half, mean + half


def effective_number(spread: Tensor, variance: Tensor, clusters: Tensor) -> Tensor:
    """How many independent outcomes say as much as these rows, [...]; from the clusters' number to that of rows.

    spread: the variance of the rows, [...]; variance: of their mean, by cluster. Where all rows are alike, their spread
    says nothing of how alike those of one cluster are, and these are taken to be the same.
    """
    n_rows, sizes = len(clusters), clusters.bincount().double()
    alike = float(sizes.square().sum()) / n_rows
    of_independent = spread / max(1, n_rows - 1)
    inflation = torch.where((variance > 0) & (of_independent > 0), variance / of_independent, alike)
    return n_rows / inflation.nan_to_num(alike).clamp(1, alike)


def share_interval(outcomes: Tensor, clusters: Tensor) -> Ends:
    """Wilson's interval of the mean of outcomes 0/1, [..., row], on the effective number of them."""
    return share_ends(outcomes.double().mean(-1), clustered_variance(outcomes, clusters), clusters)


def share_ends(share: Tensor, variance: Tensor, clusters: Tensor) -> Ends:
    """As `share_interval`, of shares [...] whose variances by cluster [...] are known."""
    n = effective_number(share * (1 - share), variance, clusters)
    ends = [wilson_interval(float(p * m), float(m), Z) for p, m in zip(share.flatten(), n.flatten(), strict=True)]
    low, high = torch.tensor(ends, dtype=torch.float64).T.reshape(2, *share.shape)
    return low, high


def share_difference_interval(differences: Tensor, clusters: Tensor) -> Ends:
    """Of the mean of differences -1, 0, 1 [..., row] of two proportions on the same rows; never of no width."""
    differences = differences.double()
    mean = differences.mean(-1)
    spread = differences.square().mean(-1) - mean.square()
    n = effective_number(spread, clustered_variance(differences, clusters), clusters)
    more, less = (((differences == sign).double().mean(-1) * n + 1) / (n + 2) for sign in (1, -1))
    half = Z * ((more + less - (more - less).square()) / (n + 2)).sqrt()
    return (more - less - half).clamp(min=-1), (more - less + half).clamp(max=1)


def resampled_means(values: Tensor, clusters: Tensor, n_resamples: int = 2000, seed: int = 0) -> Tensor:
    """Means Float64[resample, ...] of values [..., row], whole clusters drawn with replacement.

    The draws come from a generator of their own, so the same seed and clusters give the same ones.
    """
    n_clusters = int(clusters.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n_clusters, (n_resamples, n_clusters), generator=generator)
    times = torch.zeros(n_resamples, n_clusters, dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
    weights = times[:, clusters]
    weights /= weights.sum(1, keepdim=True)
    return torch.einsum("rp,...p->r...", weights, values.detach().double().cpu())


def percentile_interval(resampled: Tensor, n_clusters: int) -> Ends:
    """The middle of the resamples [resample, ...], widened as Student's t is wider than a normal; NaN for one cluster."""
    if n_clusters < 2:
        nothing = torch.full_like(resampled[0], float("nan"))
        return nothing, nothing
    tail = float(special.ndtr(-((n_clusters / (n_clusters - 1)) ** 0.5) * special.stdtrit(n_clusters - 1, 0.975)))
    low, high = resampled.quantile(torch.tensor([tail, 1 - tail], dtype=resampled.dtype), dim=0)
    return low, high
