"""The numbers of sections 4.1 to 4.4: layers, conv slices, names and states that are resampled or rewritten."""

from __future__ import annotations

import re
from functools import partial
from itertools import takewhile

import pandas as pd

import analyses
from ioi_mamba import paper

from .values import NAN, NONE, Measure, Value, accuracy, largest_difference, mean, mean_effect, one, share, spread

FIRST_CLAUSE = ("n1", "n2", "n3")
NOTEBOOK_PROMPT = "Friends Donovan, Isabel and Leah went to the office. Donovan and Isabel gave a necklace to"


def changed_slot(corruption: str) -> str | None:
    """The role of the first name that a corruption such as "ABC AB C -> ABD AB D" changes: "n3"."""
    letters = re.fullmatch(r"([A-Z ]+) -> ([A-Z ]+)", corruption)
    if not letters:
        return None
    clean, corrupted = (side.replace(" ", "")[:-1] for side in letters.groups())
    differing = [k for k, (a, b) in enumerate(zip(clean, corrupted, strict=False), 1) if a != b]
    return f"n{differing[0]}" if differing else None


def _by_corruption(table: pd.DataFrame) -> list[tuple[pd.DataFrame, int, str]]:
    """(table, position of the changed name, its slot) of each corruption of which it is known what it changes."""
    parts = []
    for corruption, part in table.groupby("corruption", sort=False):
        slot = changed_slot(str(corruption))
        at = part.loc[part["label"] == slot, "position"]
        if len(at):
            parts.append((part.assign(size=part["effect"].abs()), int(at.iloc[0]), slot))
    return parts


# 4.1.1, layer-ablation


def _input_effect(table: pd.DataFrame, layer: int) -> Value:
    cells = [part[(part["layer"] == layer) & (part["position"] == name)] for part, name, _ in _by_corruption(table)]
    return mean_effect([cell.iloc[0] for cell in cells if len(cell)])


def _two_strongest_layers(table: pd.DataFrame, layer: int) -> Value:
    hits = []
    for part, _, slot in _by_corruption(table):
        if slot in FIRST_CLAUSE:
            strongest = part.groupby("layer")["size"].max().sort_values(ascending=False).index[:2]
            hits.append(float({0, layer} <= set(strongest)))
    return mean(hits)


def _first_over_bottleneck(table: pd.DataFrame, layer: int, slot: str) -> Value:
    for part, name, changed in _by_corruption(table):
        effects = part[part["position"] == name].set_index("layer")["effect"]
        if changed == slot and {0, layer} <= set(effects.index) and effects[layer]:
            return one(effects[0] / effects[layer])
    return NONE


# 4.1.2, layer-removal


def _whole(table: pd.DataFrame, column: str) -> Value:
    row = table[table["mode"] == "none"].iloc[0]
    return accuracy(row) if column == "accuracy" else one(row[column])


def _without(table: pd.DataFrame) -> pd.Series:
    """Probability by layer removed."""
    single = table[table["mode"] == "single"]
    return single.set_index(single["layer"].astype(int))["probability"]


def _removed(table: pd.DataFrame, layer: int, which: int | None) -> Value:
    probability = _without(table)
    at = layer if which is None else which
    return one(probability[at]) if at in probability.index else NONE


def _lowest_other(table: pd.DataFrame, layer: int) -> Value:
    return one(_without(table).drop([0, layer], errors="ignore").min())


def _worst_two(table: pd.DataFrame, layer: int) -> Value:
    order = list(_without(table).sort_values(kind="stable").index[:2])
    return one(sum(a == b for a, b in zip(order, (0, layer), strict=False)))


def _spare_layers(table: pd.DataFrame, layer: int) -> Value:
    whole = table.loc[table["mode"] == "none", "accuracy"].iloc[0]
    greedy = table[table["mode"] == "greedy"].sort_values("step")["accuracy"]
    kept = len(list(takewhile(lambda value: value >= whole - 0.03, greedy)))
    n_layers = len(_without(table))
    # A search cut off before the accuracy fell says only that so many can go, which decides nothing if they are few.
    if kept == len(greedy) < n_layers - 1 and kept < n_layers / 2:
        return NONE
    return one(kept / n_layers)


def _notebook_removal(table: pd.DataFrame, layer: int, column: str) -> Value:
    single = table[table["mode"] == "single"].astype({"layer": int})
    return largest_difference(single, paper.table("layer-removal"), ["layer"], (f"{column}_published", column))


# 4.1.3, cross-talk


def _members(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["chosen"] & table["in_circuit"]]


def _n_circuits(table: pd.DataFrame) -> int:
    return len(table[["template", "corruption"]].drop_duplicates())


def _in_circuits(table: pd.DataFrame, layer: int, which: int | None = None, first: bool = False) -> Value:
    members = _members(table)
    members = members[members["layer"] == (layer if which is None else which)]
    return share(int((members["step"] == 1).sum()) if first else len(members), _n_circuits(table))


def _gain(table: pd.DataFrame, layer: int) -> Value:
    return spread(table[table["chosen"] & (table["step"] == 1) & (table["layer"] == layer)]["accuracy"])


def _proportions(table: pd.DataFrame) -> pd.DataFrame:
    """layer, proportion and published, the two of them by layer."""
    published = paper.table("cross-talk").set_index("layer")["proportion"]
    own = _members(table)["layer"].astype(int).value_counts() / _n_circuits(table)
    return pd.DataFrame({"published": published, "own": own.reindex(published.index, fill_value=0.0)})


def _proportion_difference(table: pd.DataFrame, layer: int) -> Value:
    both = _proportions(table)
    return one((both["published"] - both["own"]).abs().max())


def _proportion_correlation(table: pd.DataFrame, layer: int) -> Value:
    both = _proportions(table).rank()
    return one(both["published"].corr(both["own"]))


def _circuit_size(table: pd.DataFrame, layer: int) -> Value:
    return spread(_members(table).groupby(["template", "corruption"]).size())


def _stopped(table: pd.DataFrame, layer: int) -> Value:
    reached = table.groupby(["template", "corruption"])["reached"].first()
    return share(int(reached.sum()), len(reached))


def _notebook_steps(table: pd.DataFrame, layer: int) -> Value:
    own = table[table["template"].str.startswith("Then") & (table["corruption"] == "CAB AB C -> DAB AB D")]
    published = paper.table("cross-talk-notebook").query("step <= 2")
    own = own.dropna(subset="layer").astype({"layer": int})
    return largest_difference(own, published, ["step", "layer"], ("accuracy_published", "accuracy"))


# 4.2, state-similarity and conv-shift


def _lines_after_names(table: pd.DataFrame, layer: int) -> Value:
    hits = n = 0
    lines = analyses.load("state-similarity").lines(table[table["layer"] == layer])
    for _, rows in lines.groupby("prompt", sort=False):
        top = rows.head(int(rows["after_name"].sum()))
        hits, n = hits + int(top["after_name"].sum()), n + len(top)
    return mean([hits / n]) if n else NONE


def _notebook_similarity(table: pd.DataFrame, layer: int) -> Value:
    own = table[(table["layer"] == layer) & (table["prompt"] == NOTEBOOK_PROMPT)]
    columns = ("similarity_published", "similarity")
    return largest_difference(own, paper.table("state-similarity"), ["measure", "row", "column"], columns)


def _slice_cells(table: pd.DataFrame, layer: int) -> list[tuple[pd.Series, float]]:
    """Per corruption: the cell of slice -1 one after the name, and the largest other |effect|."""
    cells = []
    for part, name, _ in _by_corruption(table[table["layer"] == layer]):
        shifted = (part["slice"] == -1) & (part["position"] == name + 1)
        if shifted.any():
            cells.append((part[shifted].iloc[0], float(part.loc[~shifted, "size"].max())))
    return cells


def _slice_is_peak(table: pd.DataFrame, layer: int) -> Value:
    return mean([float(own["size"] > other) for own, other in _slice_cells(table, layer)])


def _slice_effect(table: pd.DataFrame, layer: int) -> Value:
    return mean_effect([own for own, _ in _slice_cells(table, layer)])


def _slice_others(table: pd.DataFrame, layer: int) -> Value:
    ratios = [other / own["size"] if own["size"] else float("inf") for own, other in _slice_cells(table, layer)]
    return one(max(ratios)) if ratios else NONE


def _oldest_slice(table: pd.DataFrame, layer: int) -> Value:
    return one(table[(table["layer"] == layer) & (table["slice"] == -3)]["effect"].abs().max())


# 4.3, name-steering


def _steering(table: pd.DataFrame, layer: int, method: str, near: bool) -> Value:
    """Slots 1 to 3 written over, with averages from 1 to 3 (near) or from 4 and 5, pooled."""
    sources = table["source_slot"] <= 3 if near else table["source_slot"] > 3
    own = table[(table["method"] == method) & (table["slot"] <= 3) & sources & (table["n"] > 0)]
    own = own[own["layer"] == layer]
    return share(round(float((own["success"] * own["n"]).sum())), int(own["n"].sum()))


def _steering_cells(table: pd.DataFrame, layer: int, method: str) -> Value:
    published = paper.table("name-steering").query("method == @method")
    published = published.assign(share=published["successes"] / published["n"])
    own = table[(table["layer"] == layer) & (table["offset"] == 1) & (table["n"] > 0)]
    return largest_difference(own, published, ["method", "slot", "source_slot"], ("share", "success"))


# 4.4, state-ablation and output-ablation


def _worst_ratio(table: pd.DataFrame, layer: int, after: bool) -> Value:
    """State effects of the layer over their peak, worst corruption: after the name the least, else the largest."""
    ratios = []
    for part, name, _ in _by_corruption(table[table["layer"] == layer]):
        behind = part["position"] > name
        cells, peak = part.loc[behind if after else ~behind, "size"], part["size"].max()
        ratios.append((cells.min() if after else cells.max()) / peak if peak else NAN)
    return one(min(ratios) if after else max(ratios)) if ratios else NONE


def _before_last(table: pd.DataFrame, layer: int) -> Value:
    """The largest effect before the last position over the one there, worst corruption."""
    ratios = []
    for _, part in table[table["layer"] == layer].groupby("corruption", sort=False):
        last = part["position"] == part["position"].max()
        size = part["effect"].abs()
        ratios.append(size[~last].max() / size[last].iloc[0] if size[last].iloc[0] else float("inf"))
    return one(max(ratios)) if ratios else NONE


MEASURES: dict[str, Measure] = {
    "model_accuracy": lambda table, layer: _whole(table, "accuracy"),
    "ra_effect": _input_effect,
    "ra_two_strongest": _two_strongest_layers,
    "ra_ratio_cab": partial(_first_over_bottleneck, slot="n1"),
    "ra_ratio_acb": partial(_first_over_bottleneck, slot="n2"),
    "ra_ratio_abd": partial(_first_over_bottleneck, slot="n3"),
    "zero_ablation_baseline": lambda table, layer: _whole(table, "probability"),
    "zero_ablation_0": partial(_removed, which=0),
    "zero_ablation_39": partial(_removed, which=None),
    "zero_ablation_others": _lowest_other,
    "zero_ablation_worst": _worst_two,
    "zero_ablation_notebook": partial(_notebook_removal, column="probability"),
    "zero_ablation_accuracy": partial(_notebook_removal, column="accuracy"),
    "half_layers_removable": _spare_layers,
    "ct_39_always": _in_circuits,
    "ct_15_always": partial(_in_circuits, which=15),
    "ct_39_first": partial(_in_circuits, first=True),
    "ct_39_gain": _gain,
    "ct_layer0": partial(_in_circuits, which=0),
    "ct_proportions": _proportion_difference,
    "ct_spearman": _proportion_correlation,
    "ct_size": _circuit_size,
    "ct_stop": _stopped,
    "ct_notebook": _notebook_steps,
    "cos_lines": _lines_after_names,
    "cos_cells": _notebook_similarity,
    "conv_peak_cell": _slice_is_peak,
    "conv_effect": _slice_effect,
    "conv_others": _slice_others,
    "conv_minus3_zero": _oldest_slice,
    "steer_sub_add": partial(_steering, method="subtract-add", near=True),
    "steer_sub_add_cross": partial(_steering, method="subtract-add", near=False),
    "steer_sub_add_cells": partial(_steering_cells, method="subtract-add"),
    "steer_replace": partial(_steering, method="replace", near=True),
    "steer_replace_cross": partial(_steering, method="replace", near=False),
    "steer_replace_cells": partial(_steering_cells, method="replace"),
    "h_before": partial(_worst_ratio, after=False),
    "h_after": partial(_worst_ratio, after=True),
    "outproj_last_only": _before_last,
}
