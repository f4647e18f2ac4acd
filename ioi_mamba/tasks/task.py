"""A task as one record: what a model is asked, and how pairs of prompts are drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ioi_mamba.tasks.base import Pairs

Measures = Callable[[Tensor, Pairs, Any], dict[str, Tensor]]
"""(logits Float[pair, vocab] where the answer of the clean prompts is read, pairs, tokenizer) gives Float[pair] by name."""


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: As on the command line, such as "greater-than".
        title: The line over a report.
        varies: What differs between the two prompts of a pair, such as "a name"; texts of experiments say it.
        generate: Draws pairs: (tokenizer, how many, seed).
        default_pairs: How many pairs an experiment draws that has no number of its own.
        measures: Values of each pair of the unpatched model whose means a run keeps; None for no more than accuracy.
        roles: What the roles of its pairs mean.
    """

    name: str
    title: str
    varies: str
    generate: Callable[[Any, int, int], Pairs] = field(repr=False)
    default_pairs: int = 100
    measures: Measures | None = field(default=None, repr=False)
    roles: Mapping[str, str] = field(default_factory=dict, repr=False)
