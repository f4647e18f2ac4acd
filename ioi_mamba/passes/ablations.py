"""What is written in the place of a value that is ablated, one record a kind; and what a kind takes to write it.

Every way to overwrite a value goes through these records: a site at one layer and position (`sweep`), edges and parts of a
graph, by attribution and exactly (`circuits`), flows, and the conv inputs of whole layers (`cross_talk`). What is
ablated is the value itself: of a part of a layer its own value at the site where it is patched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ioi_mamba.errors import InputError
from ioi_mamba.model.jobs import each_chunk
from ioi_mamba.model.portable import portable
from ioi_mamba.passes.forward import forward
from ioi_mamba.registry import named
from ioi_mamba.tasks.base import ABSENT, Pairs

AblationName = Literal["resample", "mean", "mean-by-role", "zero", "noise"]
NO_CELL = -1
"""The group of what lies behind a prompt's last token."""


@portable
@dataclass(frozen=True, eq=False)
class Ablation:
    """A kind of ablation.

    Attributes:
        name: As on the command line.
        meaning: What is written, in words that follow "replaced by".
        written: What is written, of the shape of the first argument: (clean, corrupted, mean, deviation, noise), each
            [row, ...]: the values of the clean and of the corrupted run at one place; mean and standard deviation of the
            clean values of the same group of cells; and standard normal numbers of each row's own.
        like_corrupted: Whether a row whose two prompts agree up to a position stays as it is there, so that it is not run.
        over: What a group is, over which mean and deviation are taken: "position", the same position in all pairs of the
            same layout; "role", all tokens of the same role in all pairs, those without a role being one group; None where
            the kind takes neither, which are zeros then.
        draws: Whether it takes the deviation and noise; where not, these are zeros.
    """

    name: str
    meaning: str
    written: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    like_corrupted: bool = False
    over: Literal["position", "role"] | None = "position"
    draws: bool = True


def _resampled(clean: Tensor, corrupted: Tensor, mean: Tensor, deviation: Tensor, noise: Tensor) -> Tensor:
    return corrupted


def _averaged(clean: Tensor, corrupted: Tensor, mean: Tensor, deviation: Tensor, noise: Tensor) -> Tensor:
    return mean.expand_as(clean)


def _emptied(clean: Tensor, corrupted: Tensor, mean: Tensor, deviation: Tensor, noise: Tensor) -> Tensor:
    return torch.zeros_like(clean)


def _disturbed(clean: Tensor, corrupted: Tensor, mean: Tensor, deviation: Tensor, noise: Tensor) -> Tensor:
    return clean + deviation * noise


RESAMPLE = Ablation(
    "resample",
    "the value of the corrupted run (section 4.1.1)",
    _resampled,
    like_corrupted=True,
    over=None,
    draws=False,
)
MEAN = Ablation(
    "mean", "the mean of the clean runs' values at that position, over all pairs of the layout", _averaged, draws=False
)
MEAN_BY_ROLE = Ablation(
    "mean-by-role",
    "the mean of the clean runs' values at all tokens of the same role, over all pairs",
    _averaged,
    over="role",
    draws=False,
)
ZERO = Ablation("zero", "zeros", _emptied, over=None, draws=False)
NOISE = Ablation("noise", "the clean value and normal noise of the clean values' own standard deviation", _disturbed)
ABLATIONS: dict[str, Ablation] = {each.name: each for each in (RESAMPLE, MEAN, MEAN_BY_ROLE, ZERO, NOISE)}


def ablation_of(ablation: str | Ablation, pairs: Pairs | None = None) -> Ablation:
    """The record of a kind of ablation.

    Raises InputError, with the nearest name, for one that is not there, and for pairs without the roles that it takes.
    """
    found = named("ablation", ablation, ABLATIONS, Ablation)
    if found.over == "role" and pairs is not None and not pairs.roles:
        raise InputError(f"These prompts have no roles to take a mean over: ablate by mean in place of {found.name}.")
    return found


def groups_of(pairs: Pairs, ablation: Ablation) -> Tensor:
    """Int64[pair, pos], the group of each cell over which the kind takes its mean; NO_CELL behind the last token."""
    n_pairs, n_positions = pairs.clean.shape
    positions = torch.arange(n_positions)
    groups = torch.zeros(n_pairs, n_positions, dtype=torch.int64)
    if ablation.over == "position":
        for k, rows in enumerate(pairs.layout_rows()):
            groups[rows] = k * n_positions + positions
    elif ablation.over == "role":
        groups[:, 0] = 1  # BOS
        for k, at in enumerate(pairs.roles.values(), 2):
            rows = (at.cpu() != ABSENT).nonzero()[:, 0]
            groups[rows, at.cpu()[rows]] = k
    return torch.where(positions <= pairs.last.cpu()[:, None], groups, NO_CELL)


@portable
@dataclass(frozen=True, eq=False)
class Spread:
    """Mean and standard deviation of clean values over groups of cells, and what a kind writes with them.

    Gathered in float64, so that how pairs are cut into passes changes nothing that counts.

    Attributes:
        ablation: The kind.
        groups: Int64[pair, pos], as `groups_of` gives them, of all pairs.
        sums: By place, of each group how many values [group], their sum [group, ...], and where the kind draws the sum of
            their squares.
    """

    ablation: Ablation
    groups: Tensor
    sums: Mapping[Any, tuple[Tensor, ...]]

    def written(
        self,
        place: Any,
        clean: Tensor,
        corrupted: Tensor,
        rows: Tensor,
        positions: int | slice = slice(None),
        seed: int = 0,
    ) -> Tensor:
        """What the kind writes in place of `clean` [row, (pos,) ...] of some rows of all pairs.

        seed: of the place, so that each has its own noise.
        """
        mean = deviation = noise = torch.zeros_like(clean)
        if self.ablation.over is not None:
            groups = self.groups[rows][:, positions].clamp(min=0)
            n, total, *squares = (each[groups].to(clean.device) for each in self.sums[place])
            n = n.clamp(min=1)[(..., *[None] * (clean.dim() - groups.dim()))]
            wide = total / n
            mean = wide.to(clean)
            if squares:
                deviation = (squares[0] / n - wide.square()).clamp(min=0).sqrt().to(clean)
        if self.ablation.draws:
            noise = torch.stack([_normal(clean.shape[1:], row, seed) for row in rows.tolist()]).to(clean)
        return self.ablation.written(clean, corrupted, mean, deviation, noise)


def _normal(shape: Sequence[int], row: int, seed: int) -> Tensor:
    """Standard normal numbers of one pair at one place, the same however pairs are cut into passes."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed((row * 100_000_007 + seed) % 2**63))


def sums_of(
    values: Tensor, groups: Tensor, n_groups: int, squares: bool, before: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, ...]:
    """The entry of `Spread.sums` for values [row, (pos,) ...] of these groups [row(, pos)], added to those of before."""
    groups = groups.to(values.device)
    there = groups != NO_CELL
    found, groups = values[there].double(), groups[there]
    if before is None:
        nothing = found.new_zeros(n_groups, *found.shape[1:])
        before = (nothing.new_zeros(n_groups), nothing, nothing.clone())[: 3 if squares else 2]
    before[0].index_add_(0, groups, torch.ones_like(groups, dtype=before[0].dtype))
    before[1].index_add_(0, groups, found)
    if squares:
        before[2].index_add_(0, groups, found.square())
    return before


def gathered(ablation: Ablation, groups: Tensor, chunks: Iterable[Mapping[Any, tuple[Tensor, ...]]]) -> Spread:
    """The spread of all pairs from the sums of chunks of them."""
    sums: dict[Any, tuple[Tensor, ...]] = {}
    for chunk in chunks:
        for place, found in chunk.items():
            known = sums.get(place)
            sums[place] = found if known is None else tuple(a + b for a, b in zip(known, found, strict=True))
    return Spread(ablation, groups, sums)


def spread_of(model, pairs: Pairs, names: Sequence[str], ablation: Ablation, rows: int) -> Spread:
    """That of the values of some hooks, each [pair, pos, ...], over the clean prompts of all pairs; rows: of a chunk."""
    groups, bare = groups_of(pairs, ablation), pairs.without_text()
    n_groups, chunks = int(groups.max()) + 1, []
    for first in range(0, len(pairs) if ablation.over is not None else 0, rows):
        part = slice(first, first + rows)
        chunks.append((bare[part], list(names), groups[part], n_groups, ablation.draws))
    return gathered(ablation, groups, each_chunk(model, _sums, chunks))


def _sums(
    model, pairs: Pairs, names: Sequence[str], groups: Tensor, n_groups: int, squares: bool, *, progress=None
) -> dict[str, tuple[Tensor, ...]]:
    """The sums of some pairs, by hook; a function for `each_chunk`."""
    with torch.no_grad():
        kept = forward(model, pairs.clean, reads=names, logits_at=pairs.read_at, own_scan=True)
        return {name: tuple(each.cpu() for each in sums_of(kept[name], groups, n_groups, squares)) for name in names}


def replaced(
    model, pairs: Pairs, names: Sequence[str], spread: Spread | None, rows: Tensor | None = None
) -> dict[str, Tensor]:
    """What is written in place of the values of some hooks, of some pairs; and `hook_logits`, those of their corrupted prompts.

    spread: of all pairs, by `spread_of`; None: the values are the corrupted run's. rows: Int64[pair], which of all pairs
    these are; None: all of them.
    """
    with torch.no_grad():
        corrupted = forward(model, pairs.corrupted, reads=names, logits_at=pairs.read_at, own_scan=True)
        if spread is None or spread.ablation.name == RESAMPLE.name:
            return corrupted
        clean = forward(model, pairs.clean, reads=names, logits_at=pairs.read_at, own_scan=True)
        rows = torch.arange(len(pairs)) if rows is None else rows
        for k, name in enumerate(dict.fromkeys(names)):
            corrupted[name] = spread.written(name, clean[name], corrupted[name], rows, seed=k)
    return corrupted
