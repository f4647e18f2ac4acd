"""Items in order of importance: what attribution gives, and what circuits are cut from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from ioi_mamba.charts.notebook import shown
from ioi_mamba.circuits.charts import circuit_matrices
from ioi_mamba.circuits.graph import Circuit, Item, Universe, frame_of, items_of
from ioi_mamba.errors import InputError

Order = Literal["signed", "absolute"]
ORDERS: tuple[Order, ...] = ("signed", "absolute")
"""signed: most negative scores first, as the paper does; absolute: largest sizes first."""


@dataclass(frozen=True, eq=False, repr=False)
class Ranking:
    """Items of a universe, the most important first, each with its score.

    Attributes:
        items: The items.
        scores: Float[item], in units of the normalized logit diff; negative: patching the item lowers the metric.
        universe: The graph that the items are of; those that are not ranked are kept by every circuit of `first`.
    """

    items: tuple[Item, ...]
    scores: np.ndarray
    universe: Universe

    @classmethod
    def of(cls, items: Sequence[Item], scores: Any, universe: Universe, order: str = "signed") -> Ranking:
        """The items in order of importance; ties keep their order.

        Args:
            items: In any order.
            scores: Float[item], a tensor, an array or a list.
            universe: The graph that they are of.
            order: "signed" or "absolute", see ORDERS.

        Raises:
            InputError: For another order, and for an item that the universe does not have.
        """
        places = places_of(scores, order)
        universe.check(items)
        values = np.asarray(scores)
        return cls(tuple(items[k] for k in places), values[places], universe)

    @classmethod
    def from_frame(cls, table: pd.DataFrame, universe: Universe) -> Ranking:
        """The items of a table in its own order, which is theirs; columns as `to_frame` gives them, without the rank."""
        return cls(tuple(items_of(table)), table["score"].to_numpy(), universe)

    def __len__(self) -> int:
        return len(self.items)

    def top(self, k: int) -> Circuit:
        """The circuit of the first k items. Raises InputError for a k that is not 0 to all items."""
        if not 0 <= k <= len(self):
            raise InputError(f"There are {len(self)} ranked items, so a circuit has 0 to {len(self)} of them, not {k}.")
        return Circuit(frozenset(self.items[:k]), self.universe)

    def cut(self, sizes: Iterable[int]) -> list[list[Item]]:
        """For each size, the items that are patched when only so many first ones are kept."""
        return [list(self.items[k:]) for k in sizes]

    def to_frame(self) -> pd.DataFrame:
        """Columns source, target, position, part, score, rank (from 1); one row an item."""
        return frame_of(self.items).assign(score=self.scores, rank=range(1, len(self) + 1))

    def chart(self) -> Any:
        """The scores: edges as a matrix from source to target, and parts by layer; over positions they are summed."""
        return circuit_matrices(self.to_frame(), "score")

    def __repr__(self) -> str:
        first = [f"  {_words(item)}  {score:.4f}" for item, score in zip(self.items[:5], self.scores, strict=False)]
        return "\n".join([f"<Ranking of {len(self)} items, the first {len(first)}:", *first]) + ">"

    def _repr_html_(self) -> str:
        return shown(f"Ranking of {len(self)} items", self.to_frame(), self.chart)


def places_of(scores: Any, order: str) -> list[int]:
    """The places of the scores in order of importance. Raises InputError for another order than ORDERS."""
    if order not in ORDERS:
        raise InputError(f"ranking {order!r} is unknown: use 'signed' (as the paper) or 'absolute'.")
    values = np.asarray(scores)
    return (values if order == "signed" else -np.abs(values)).argsort(kind="stable").tolist()


def _words(item: Item) -> str:
    where = "" if item.position is None else f" at {item.position}"
    return f"{item.source} {item.part}{where}" if item.part else f"{item.source} -> {item.target}{where}"
