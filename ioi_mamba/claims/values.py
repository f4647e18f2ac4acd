"""What a measured number is made of: means, shares with intervals, differences from a published table."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from ioi_mamba.metrics import wilson_interval

Value = tuple[float, float, float]
"""(value, low, high), NaN where there is none; low and high are a 95 % interval."""
Measure = Callable[[pd.DataFrame, int], Value]
"""(table of the claim's experiment, layer in question) gives the number."""
NAN = float("nan")
NONE: Value = (NAN, NAN, NAN)


def one(value: float) -> Value:
    return float(value), NAN, NAN


def mean(values: list[float]) -> Value:
    return one(sum(values) / len(values)) if values else NONE


def share(hits: int, n: int) -> Value:
    return (hits / n, *wilson_interval(hits, n)) if n else NONE


def accuracy(row: pd.Series, column: str = "accuracy") -> Value:
    _, low, high = share(round(float(row[column] * row["n"])), int(row["n"]))
    return float(row[column]), low, high


def spread(values: pd.Series) -> Value:
    """The mean over circuits, with the normal interval of the mean."""
    if values.empty:
        return NONE
    half = 1.96 * float(values.std()) / len(values) ** 0.5
    return float(values.mean()), float(values.mean()) - half, float(values.mean()) + half


def mean_effect(rows: list[pd.Series]) -> Value:
    """The mean effect of cells; its interval from theirs, taken as independent, where they have one."""
    value, _, _ = mean([row["effect"] for row in rows])
    if not rows or not {"low", "high"} <= set(rows[0].index):
        return value, NAN, NAN
    half = sum(((row["high"] - row["low"]) / 2) ** 2 for row in rows) ** 0.5 / len(rows)
    return value, value - half, value + half


def largest_difference(table: pd.DataFrame, published: pd.DataFrame, on: list[str], columns: tuple[str, str]) -> Value:
    """Over all rows of `published`; NONE unless the table has every one of them."""
    both = published.merge(table, on=on, suffixes=("_published", ""))
    if len(both) < len(published):
        return NONE
    return one((both[columns[0]].astype(float) - both[columns[1]].astype(float)).abs().max())
