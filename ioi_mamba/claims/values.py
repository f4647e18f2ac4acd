"""What a measured number is made of: a value, its interval, the prompts behind it, or why there is none.

NaN is never passed over: a number over several cells needs them all, whatever their order. Every interval that is
computed here and not read off a table is computed in this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import pandas as pd
import torch

from ioi_mamba.passes.intervals import mean_interval
from ioi_mamba.passes.metrics import reaches, wilson_interval

NAN = float("nan")
FLOOR = 0.1
"""The least contrast of effects, a tenth of the way from the clean to the corrupted run: below is noise."""


class Value(NamedTuple):
    """A number. low, high: its 95 % interval, NaN where there is none; n: prompts behind its weakest cell.

    why: what kept it from being measured, empty if it was or if the table simply does not hold it.
    """

    value: float = NAN
    low: float = NAN
    high: float = NAN
    n: float = NAN
    why: str = ""


Layer = int | Mapping[str, int]
"""The layer in question; for each corruption its own where the layer was chosen on the table that is measured."""
Measure = Callable[[pd.DataFrame, Layer], Value]
"""(table of the claim's experiment, layer in question) gives the number."""
NONE = Value()


def within(value: float, at_least: float, at_most: float) -> bool:
    """Whether at_least <= value <= at_most, up to rounding; a bound that is NaN is none. False for a NaN value."""
    above = math.isnan(at_least) or reaches(value, at_least)
    below = math.isnan(at_most) or reaches(at_most, value)
    return not math.isnan(value) and above and below


def one(value: float) -> Value:
    return Value(float(value))


def around(value: float, half: float) -> Value:
    """A value with a symmetric interval; without one where `half` is NaN."""
    return Value(float(value), float(value - half), float(value + half))


def share(hits: int, n: int) -> Value:
    """A proportion of n independent cases with Wilson's interval."""
    return Value(hits / n, *wilson_interval(hits, n)) if n else NONE


def proportion(row: pd.Series, column: str) -> Value:
    """A proportion of a row's n prompts: with the row's own interval (COLUMN_low, COLUMN_high), else Wilson's."""
    if {f"{column}_low", f"{column}_high"} <= set(row.index):
        return Value(*(float(row[name]) for name in (column, f"{column}_low", f"{column}_high")))
    if pd.isna(row[column]):
        return NONE
    return share(round(float(row[column] * row["n"])), int(row["n"]))._replace(value=float(row[column]))


def spread(values: pd.Series) -> Value:
    """The mean over circuits, each a draw of its own, with Student's t interval; of one circuit it has no bounds."""
    if values.empty or values.isna().any():
        return NONE
    own = torch.tensor(values.to_numpy(float))
    low, high = mean_interval(own, torch.arange(len(own)))
    return Value(float(own.mean()), *(float(low), float(high)) if len(own) > 1 else (-math.inf, math.inf))


def half_width(table: pd.DataFrame) -> pd.Series:
    """Half of each cell's interval; 0 in a table without intervals."""
    if not {"low", "high"} <= set(table.columns):
        return pd.Series(0.0, index=table.index)
    return (table["high"] - table["low"]) / 2


def mean_effect(effects: Sequence[float], halves: Sequence[float]) -> Value:
    """The mean effect of cells; its interval from theirs, taken as independent, where they have one."""
    if not len(effects):
        return NONE
    half = sum(half**2 for half in halves) ** 0.5 / len(effects)
    value = sum(effects) / len(effects)
    return around(value, half) if half else one(value)


def mean_hit(hits: Iterable[tuple[bool, bool, bool]]) -> Value:
    """The share of cases in which something is so; low and high: in which it surely, and in which it possibly is so.

    Each case is (as measured, with every interval at its worst, with every interval at its best).
    """
    columns = list(zip(*hits, strict=True))
    return Value(*(sum(column) / len(column) for column in columns)) if columns else NONE


def ratio(top: float, bottom: float, top_half: float = 0.0, bottom_half: float = 0.0) -> Value:
    """top / bottom, infinite for a bottom of 0; its interval from theirs, taken as independent."""
    if bottom == 0:
        return one(math.inf)
    value = top / bottom
    half = (top_half**2 + (value * bottom_half) ** 2) ** 0.5 / abs(bottom)
    return around(value, half) if half else one(value)


def worst(values: Sequence[Value], largest: bool) -> Value:
    """The largest, or least, of all, with the largest, or least, ends; NaN, with its reason, if one of them is."""
    missing = next((value for value in values if math.isnan(value.value)), None)
    if missing is not None or not values:
        return missing or NONE
    pick = max if largest else min
    ends = [[value.value if math.isnan(end) else end for end in (value.low, value.high)] for value in values]
    low, high = (pick(column) for column in zip(*ends, strict=True))
    value = pick(value.value for value in values)
    return one(value) if low == high else Value(value, low, high)


def largest_difference(table: pd.DataFrame, published: pd.DataFrame, on: list[str], columns: tuple[str, str]) -> Value:
    """Over all rows of `published`; NONE unless the table has a number for every one of them."""
    both = published.merge(table, on=on, suffixes=("_published", ""))
    values = both[columns[0]].astype(float) - both[columns[1]].astype(float)
    return NONE if len(both) < len(published) or values.isna().any() else one(values.abs().max())


def standard_errors(hits: pd.Series, n: pd.Series, other_hits: pd.Series, other_n: pd.Series) -> pd.Series:
    """The difference of two proportions over its standard error if they were one.

    The common proportion has one hit and one miss added, so that cells at 0 or 1 have an error too.
    """
    common = (hits + other_hits + 1) / (n + other_n + 2)
    error = (common * (1 - common) * (1 / n + 1 / other_n)) ** 0.5
    return (hits / n - other_hits / other_n) / error


def prompts(table: pd.DataFrame) -> float:
    """The fewest prompts behind a number of the table: of the chosen circuit, else of a cell, else the prompts it names."""
    if "n" in table:
        counted = table["n"].notna() & (table["n"] > 0)
        if "what" in table:
            counted &= (table["circuit"] == "kept") & (table["sample"] == "train")
        return float(table["n"][counted].min())
    return float(table["prompt"].nunique()) if "prompt" in table else NAN
