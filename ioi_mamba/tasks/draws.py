"""IOI prompts of several kinds (a template, a corruption) that are drawn apart, so that means over kinds have errors.

One seed gives every corruption the same names, place and object: five sets drawn from it say little more than one, and
the error of their mean comes out 1.5 times too small. Here the first kind is drawn from the seed itself, which keeps the
published prompts that belong to a seed, and every other one from a seed of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import Pairs

STEP = 1_000_003
"""From the seed of one kind to that of the next: no step between seeds that anyone gives."""


def drawn_apart(tokenizer: Any, n_pairs: int, seed: int, kinds: Sequence[tuple[Sequence[str], Sequence[str]]]) -> Pairs:
    """`n_pairs` symmetric pairs of each kind, (templates, corruptions), as `ioi.generate` draws them."""
    return Pairs.concat(
        [
            ioi.generate(
                tokenizer, n_pairs, seed + STEP * number, templates=templates, corruptions=corruptions, symmetric=True
            )
            for number, (templates, corruptions) in enumerate(kinds)
        ]
    )
