"""What is written in the place of a value that is ablated, one record a kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ioi_mamba.model.portable import portable
from ioi_mamba.registry import named

AblationName = Literal["resample", "mean", "zero", "noise"]


@portable
@dataclass(frozen=True, eq=False)
class Ablation:
    """A kind of ablation.

    Attributes:
        name: As on the command line.
        meaning: What is written, in words.
        written: What is written, of the shape of the first argument: (clean, corrupted, mean, deviation, noise), each
            [row, ...]: the values of the clean and of the corrupted run at one layer and position; mean and standard
            deviation of the clean values there over all pairs; and standard normal numbers of each row's own.
        like_corrupted: Whether a row whose two prompts agree up to a position stays as it is there, so that it is not run.
    """

    name: str
    meaning: str
    written: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    like_corrupted: bool = False


def _resampled(clean: Tensor, corrupted: Tensor, mean: Tensor, deviation: Tensor, noise: Tensor) -> Tensor:
    return corrupted


def _averaged(clean: Tensor, corrupted: Tensor, mean: Tensor, deviation: Tensor, noise: Tensor) -> Tensor:
    return mean.expand_as(clean)


def _emptied(clean: Tensor, corrupted: Tensor, mean: Tensor, deviation: Tensor, noise: Tensor) -> Tensor:
    return torch.zeros_like(clean)


def _disturbed(clean: Tensor, corrupted: Tensor, mean: Tensor, deviation: Tensor, noise: Tensor) -> Tensor:
    return clean + deviation * noise


RESAMPLE = Ablation("resample", "the value of the corrupted run (section 4.1.1)", _resampled, like_corrupted=True)
MEAN = Ablation("mean", "the mean of the clean runs' values at that position, over all pairs", _averaged)
ZERO = Ablation("zero", "zeros", _emptied)
NOISE = Ablation("noise", "the clean value and normal noise of the clean values' own standard deviation", _disturbed)
ABLATIONS: dict[str, Ablation] = {each.name: each for each in (RESAMPLE, MEAN, ZERO, NOISE)}


def ablation_of(ablation: str | Ablation) -> Ablation:
    """The record of a kind of ablation. Raises InputError, with the nearest name, for one that is not there."""
    return named("ablation", ablation, ABLATIONS, Ablation)
