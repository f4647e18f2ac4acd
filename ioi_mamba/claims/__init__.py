"""How each claim of the paper is measured and judged: one number out of one experiment's table, at one layer.

The claims themselves (what is said, published value, tolerance) are data, `paper.table("claims")`; here stands one
function a claim, the same for every model, and the one rule that makes a verdict of a number. `layer` is the layer in
question: 39 on mamba-370m, elsewhere the bottleneck of the run. Nothing here runs a model. `compare` judges a whole
run, `names_summary` takes the claims on how names are carried.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd

from ioi_mamba.analyses import layer_ablation
from ioi_mamba.claims import circuits, interventions
from ioi_mamba.claims.interventions import changed_slot
from ioi_mamba.claims.values import NONE, Layer, Measure, Value, around, prompts, share, spread, within

__all__ = [
    "CHOOSES",
    "FAILS",
    "HOLDS",
    "JUDGED",
    "MEASURES",
    "NONE",
    "NOT_COMPARABLE",
    "NOT_RUN",
    "TASK",
    "UNDECIDED",
    "Layer",
    "Value",
    "around",
    "bottleneck",
    "changed_slot",
    "common_layer",
    "held_out_layers",
    "judge",
    "measure",
    "share",
    "spread",
    "tolerance",
    "within",
]

TASK = "ioi"
"""The task that the paper is about."""

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
JUDGED = (HOLDS, FAILS, UNDECIDED)
NOT_COMPARABLE, NOT_RUN = "not comparable", "not run"

ONE_LAYER = ("name-steering", "conv-shift", "state-similarity")
"""The experiments that are run on the bottleneck layer alone."""
CHOOSES = "layer-ablation"
"""The experiment whose table chooses the bottleneck layer."""

MEASURES: dict[str, Measure] = interventions.MEASURES | circuits.MEASURES
"""By claim; a claim without one is held by no experiment's table."""


def common_layer(tables: Mapping[str, pd.DataFrame]) -> int | None:
    """The one layer that the experiments on one layer agree on; None where there is none."""
    used = [set(tables[name]["layer"].unique()) for name in ONE_LAYER if name in tables]
    single = set().union(*(layers for layers in used if len(layers) == 1))
    return int(single.pop()) if len(single) == 1 else None


def bottleneck(tables: Mapping[str, pd.DataFrame]) -> int | None:
    """The bottleneck layer of layer-ablation; None where that was not run or found no effect that is a number."""
    return None if CHOOSES not in tables else _chosen(tables[CHOOSES])


def _chosen(table: pd.DataFrame) -> int | None:
    known = table.dropna(subset="effect")
    return None if known.empty else layer_ablation.bottleneck(known)


def held_out_layers(table: pd.DataFrame) -> dict[str, int]:
    """For each corruption of a table of layer-ablation, the bottleneck layer of all the other corruptions.

    A layer that was chosen for its effects has large effects in the table it was chosen on, whatever it does. So each
    corruption's prompts are asked about the layer that the prompts of the others choose. Empty for one corruption,
    of which no prompts are left to choose on.
    """
    chosen = {own: _chosen(table[table["corruption"] != own]) for own in table["corruption"].unique()}
    return {own: layer for own, layer in chosen.items() if layer is not None}


def measure(claim: str, table: pd.DataFrame, layer: Layer) -> Value:
    """The number a claim is about, from its experiment's table; NaN, perhaps with a reason, where it does not have it."""
    found = MEASURES[claim](table, layer)
    return found if not math.isnan(found.n) else found._replace(n=prompts(table))


def judge(claim: pd.Series, value: Value, required: str | None = None) -> tuple[str, str]:
    """(verdict, why) of a measured value; why is empty where it holds or does not.

    claim: a row of `paper.table("claims")`. required: the verdict of the claim named in its column `requires`. A claim
    holds if the whole interval is within the tolerance, does not if the whole interval is outside, and is undecided if
    the interval straddles a bound or fewer prompts than `min_n` were used. A value without an interval is its own.
    """
    if math.isnan(value.value):
        return NOT_COMPARABLE, value.why or (
            f"the table of {claim['analysis']} does not hold it: other prompts, layers, steps or circuit"
        )
    if claim["requires"] and required != HOLDS:
        verdict = UNDECIDED if required == UNDECIDED else NOT_COMPARABLE
        return verdict, f"it means something only where {claim['requires']} holds"
    if value.n < claim["min_n"]:
        return UNDECIDED, f"{value.n:g} prompts are too few: {claim['min_n']:g} are needed"
    ends = [value.value, *(end for end in (value.low, value.high) if not math.isnan(end))]
    low, high = min(ends), max(ends)
    at_least, at_most = claim["at_least"], claim["at_most"]
    if within(low, at_least, at_most) and within(high, at_least, at_most):
        return HOLDS, ""
    if not within(high, at_least, float("nan")) or not within(low, float("nan"), at_most):
        return FAILS, ""
    return UNDECIDED, "the interval reaches past the tolerance"


def tolerance(at_least: float, at_most: float) -> str:
    """The bounds in words; empty where there are none."""
    if pd.isna(at_least) and pd.isna(at_most):
        return ""
    if pd.isna(at_most):
        return f"at least {at_least:g}"
    if pd.isna(at_least) or at_least == 0 < at_most:
        return f"at most {at_most:g}"
    return f"{at_least:g} to {at_most:g}" if at_least < at_most else f"{at_least:g}"
