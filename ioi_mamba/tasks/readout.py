"""Where an answer is read, and what score its choices have: one token at the last position, or several tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ioi_mamba.errors import InputError
from ioi_mamba.model.portable import portable


@portable
@dataclass(frozen=True, eq=False)
class Readout:
    """Answers of several tokens. A choice's score is the sum of the logits of its tokens, each where it is read.

    The prompt holds all tokens up to the last position that is read, the same for every choice: choices that begin alike
    stand in it with what they share, and differ from there on. `answer`, `wrong` and `candidates` of the pairs are then
    numbers of choices, not token ids.

    Attributes:
        at: Int64[pair, k], the positions that are read.
        tokens: Int64[pair, choice, k], the token of each choice that each position predicts.

    Raises:
        InputError: Where shapes or dtypes do not fit each other.
    """

    at: Tensor
    tokens: Tensor

    def __post_init__(self) -> None:
        for name in ("at", "tokens"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.dtype != torch.int64:
                raise InputError(f"The readout's {name} must be an int64 tensor.")
            if value.numel() == 0 or int(value.min()) < 0:
                raise InputError(f"The readout's {name} must have whole numbers from 0 on, at least one for each pair.")
        shapes = tuple(self.at.shape), tuple(self.tokens.shape)
        if self.at.ndim != 2 or self.tokens.ndim != 3 or shapes[0] != (shapes[1][0], shapes[1][2]):
            raise InputError(
                f"The readout's at has shape {shapes[0]} and tokens {shapes[1]}: give [pair, k] and [pair, choice, k]."
            )

    def scores(self, logits: Tensor) -> Tensor:
        """Float[..., pair, choice] of logits Float[..., pair, k, vocab] at the positions `at`."""
        tokens = self.tokens.to(logits.device).transpose(1, 2)  # [pair, k, choice]
        return logits.gather(-1, tokens.expand(*logits.shape[:-1], -1)).sum(-2)

    def of(self, rows: Tensor) -> Readout:
        """The readout of some of the pairs, Int64[row]."""
        return Readout(self.at[rows.to(self.at.device)], self.tokens[rows.to(self.tokens.device)])

    @staticmethod
    def concat(parts: list[Readout]) -> Readout:
        """That of all parts. Raises InputError where they read or choose among different numbers of tokens."""
        if len({tuple(part.tokens.shape[1:]) for part in parts}) > 1:
            raise InputError("The parts have readouts of different sizes: put those of one size together.")
        return Readout(torch.cat([part.at for part in parts]), torch.cat([part.tokens for part in parts]))
