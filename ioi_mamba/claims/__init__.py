"""How each claim of the paper is measured: one number out of one experiment's table, at one layer.

The claims themselves (what is said, published value, tolerance) are data, `paper.table("claims")`; here stands one
function a claim, the same for every model. `layer` is the layer in question: 39 on mamba-370m, elsewhere the
bottleneck of the run. Nothing here runs a model. `compare` judges a whole run, `analyses.names_summary` takes the
claims on how names are carried.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

import analyses

from . import circuits, interventions
from .interventions import changed_slot
from .values import NONE, Measure, Value

__all__ = ["MEASURES", "NONE", "Value", "bottleneck", "changed_slot", "common_layer", "measure", "tolerance", "within"]

ONE_LAYER = ("name-steering", "conv-shift", "state-similarity")
"""The experiments that are run on the bottleneck layer alone."""

MEASURES: dict[str, Measure] = interventions.MEASURES | circuits.MEASURES
"""By claim; a claim without one is held by no experiment's table."""


def common_layer(tables: Mapping[str, pd.DataFrame]) -> int | None:
    """The one layer that the experiments on one layer agree on; None where there is none."""
    used = [set(tables[name]["layer"].unique()) for name in ONE_LAYER if name in tables]
    single = set().union(*(layers for layers in used if len(layers) == 1))
    return int(single.pop()) if len(single) == 1 else None


def bottleneck(tables: Mapping[str, pd.DataFrame]) -> int | None:
    """The bottleneck layer of layer-ablation; None where that was not run."""
    table = tables.get("layer-ablation")
    return None if table is None else analyses.load("layer-ablation").bottleneck(table)


def measure(claim: str, table: pd.DataFrame, layer: int) -> Value:
    """The number a claim is about, from its experiment's table; NONE where the table does not have it."""
    return MEASURES[claim](table, layer)


def within(value: float, at_least: float, at_most: float) -> bool:
    """Whether at_least <= value <= at_most, up to rounding; a bound that is NaN is none."""
    slack = 1e-9
    return not (value < at_least - slack or value > at_most + slack)


def tolerance(at_least: float, at_most: float) -> str:
    """The bounds in words; empty where there are none."""
    if pd.isna(at_least) and pd.isna(at_most):
        return ""
    if pd.isna(at_most):
        return f"at least {at_least:g}"
    if pd.isna(at_least) or at_least == 0 < at_most:
        return f"at most {at_most:g}"
    return f"{at_least:g} to {at_most:g}" if at_least < at_most else f"{at_least:g}"
