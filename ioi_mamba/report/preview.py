"""The rows of a table that a page shows: the strongest first, the numbers of a column with the same decimals."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

MAX_CELL = 300  # characters of a cell
DIGITS = 4
"""Digits of the largest number of a column; the others have as many decimals as it."""
STRENGTHS = ("effect", "score", "contribution", "success", "similarity", "drop", "value")
"""Columns by whose size rows are ordered, the first that a table has."""


def strongest_first(table: pd.DataFrame, n: int) -> pd.DataFrame:
    """The n rows whose number is largest in size, or the first n of a table that has no such number."""
    for name in STRENGTHS:
        if name in table and pd.api.types.is_float_dtype(table[name]):
            order = table[name].abs().sort_values(ascending=False, kind="stable", na_position="last")
            return table.loc[order.index[:n]] if table.index.is_unique else table.head(n)
    return table.head(n)


def cells(table: pd.DataFrame) -> list[list[str]]:
    """Every cell as text."""
    forms = [_decimals(table.iloc[:, k]) for k in range(table.shape[1])]
    return [
        [_cell(value, form) for value, form in zip(row, forms, strict=True)] for row in table.itertuples(index=False)
    ]


def _decimals(column: pd.Series) -> int:
    if not pd.api.types.is_float_dtype(column):
        return 0
    sizes = [abs(value) for value in column.dropna() if math.isfinite(value) and value != 0]
    return max(0, min(9, DIGITS - 1 - math.floor(math.log10(max(sizes))))) if sizes else 0


def _cell(value: Any, decimals: int) -> str:
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return "–"
    return f"{value:z.{decimals}f}" if isinstance(value, float) else str(value)[:MAX_CELL]
