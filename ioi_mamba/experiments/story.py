"""What an experiment's table adds to the figure at the top of a page: marks on tokens and layers, of a few kinds.

A mark says that something at a layer and a token matters to the answer, or is in the circuit. The page draws marks by their
kind, whatever experiment they come from, so that another experiment appears there by giving marks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import pandas as pd


class Kind(StrEnum):
    """What a mark stands for."""

    READS = "reads"
    """A layer's input at a token: `value` is the effect of patching it."""
    MOVES = "moves"
    """A conv slice of a layer, from a token to a later one: the effect of patching it."""
    CARRIES = "carries"
    """A layer's state after a token: the effect of patching it."""
    WRITES = "writes"
    """What a layer adds to the stream at a token: the effect of patching it."""
    EDGE = "edge"
    """An edge of the kept circuit at a token: `value` is its score, negative where patching it lowers the metric."""


MARKS = ("kind", "corruption", "source", "target", "source_label", "label", "value", "low", "high", "n")
"""Columns of a table of marks. corruption: as the experiment's table has it, "" for all. source, target: nodes, equal where a
mark lies in one layer. source_label, label: of the tokens it goes from and to, as `Pairs.position_labels` has them, equal
where it lies on one. low, high: the 95 % interval of `value`; n: prompts."""


@dataclass(frozen=True)
class Told:
    """What an experiment tells of its table. marks: with the columns MARKS; sure: how far it can be trusted, a short sentence or ""."""

    marks: pd.DataFrame
    sure: str = ""


Story = Callable[[pd.DataFrame], Told]


def cells(table: pd.DataFrame, kind: Kind) -> Told:
    """Marks of one kind from a table of effects (corruption, layer, label, effect, n; low and high where it has them)."""
    layer, label = table["layer"].astype(str), table["label"].astype(str)
    columns = {"kind": str(kind), "corruption": table["corruption"], "source": layer, "target": layer}
    numbers = {name: table.get(name, float("nan")) for name in ("low", "high")}
    marks = table.assign(**columns, source_label=label, label=label, value=table["effect"], **numbers)
    return Told(marks[list(MARKS)].reset_index(drop=True))
