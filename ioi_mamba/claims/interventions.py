"""The numbers of sections 4.1 to 4.4: layers, conv slices, names and states that are resampled or rewritten.

An experiment that did nothing has no number: effects that are all alike, searches that found nothing to do and ratios
to a peak of noise are not comparable, so that no claim passes on them.
"""

from __future__ import annotations

import math
import re
from functools import partial
from itertools import takewhile
from typing import NamedTuple

import pandas as pd

from ioi_mamba import paper
from ioi_mamba.analyses import state_similarity
from ioi_mamba.analyses.layer_removal import SPARE
from ioi_mamba.claims.values import (
    FLOOR,
    NONE,
    Layer,
    Measure,
    Value,
    half_width,
    largest_difference,
    mean_effect,
    mean_hit,
    one,
    proportion,
    ratio,
    share,
    spread,
    standard_errors,
    worst,
)
from ioi_mamba.passes.metrics import reaches

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


class Panel(NamedTuple):
    """The cells of one corruption, with `size`, the |effect|, and `half`, half its interval; the changed name.

    trouble: why its effects say nothing, else empty.
    """

    corruption: str
    cells: pd.DataFrame
    name: int
    slot: str
    trouble: str


def _panels(table: pd.DataFrame) -> list[Panel]:
    """Of each corruption of which it is known what it changes."""
    panels = []
    for corruption, part in table.groupby("corruption", sort=False):
        slot = changed_slot(str(corruption))
        at = part.loc[part["label"] == slot, "position"]
        if slot is not None and len(at):
            cells = part.assign(size=part["effect"].abs(), half=half_width(part))
            panels.append(Panel(str(corruption), cells, int(at.iloc[0]), slot, _trouble(str(corruption), cells)))
    return panels


def _trouble(corruption: str, cells: pd.DataFrame) -> str:
    if cells["effect"].isna().any():
        return f"effects of {corruption} are missing"
    if not reaches(cells["effect"].max() - cells["effect"].min(), FLOOR):
        return f"the effects of {corruption} differ by less than {FLOOR}: there is no peak to compare with"
    return ""


def _says_nothing(panels: list[Panel]) -> Value | None:
    """A value that says why, if one of the panels, or the lack of any, rules a number out."""
    trouble = next((panel.trouble for panel in panels if panel.trouble), "")
    return Value(why=trouble) if trouble or not panels else None


def _place(layer: Layer, panel: Panel) -> int:
    """The layer to ask this corruption about."""
    return layer if isinstance(layer, int) else layer.get(panel.corruption, -1)


def _beats(own: tuple[float, float, float], others: pd.DataFrame) -> tuple[bool, bool, bool]:
    """Whether own, (size, its least, its most), is above all others: as measured, at worst and at best."""
    size, least, most = own
    return (
        bool(size > others["size"].max()),
        bool(least > (others["size"] + others["half"]).max()),
        bool(most > (others["size"] - others["half"]).max()),
    )


# 4.1.1, layer-ablation


def _input_effect(table: pd.DataFrame, layer: Layer) -> Value:
    panels = _panels(table)
    if nothing := _says_nothing(panels):
        return nothing
    cells = [
        panel.cells[(panel.cells["layer"] == _place(layer, panel)) & (panel.cells["position"] == panel.name)]
        for panel in panels
    ]
    if any(cell.empty for cell in cells):
        return NONE
    return mean_effect([cell["effect"].iloc[0] for cell in cells], [cell["half"].iloc[0] for cell in cells])


def _two_strongest_layers(table: pd.DataFrame, layer: Layer) -> Value:
    panels = [panel for panel in _panels(table) if panel.slot in FIRST_CLAUSE]
    if nothing := _says_nothing(panels):
        return nothing
    hits = []
    for panel in panels:
        two = [0, _place(layer, panel)]
        cells = panel.cells.assign(least=panel.cells["size"] - panel.cells["half"])
        strongest = cells.loc[cells.groupby("layer")["size"].idxmax()].set_index("layer")
        if not set(two) <= set(strongest.index):
            return NONE
        weaker = strongest.loc[two].sort_values("size").iloc[0]
        own = (weaker["size"], weaker["size"] - weaker["half"], weaker["size"] + weaker["half"])
        hits.append(_beats(own, cells[~cells["layer"].isin(two)]))
    return mean_hit(hits)


def _first_over_bottleneck(table: pd.DataFrame, layer: Layer, slot: str) -> Value:
    panels = [panel for panel in _panels(table) if panel.slot == slot]
    if nothing := _says_nothing(panels):
        return nothing
    ratios = []
    for panel in panels:
        cells = panel.cells[panel.cells["position"] == panel.name].set_index("layer")
        at = _place(layer, panel)
        if not {0, at} <= set(cells.index):
            return NONE
        top, bottom = cells.loc[0], cells.loc[at]
        if not reaches(bottom["size"], FLOOR):
            return Value(why=f"the effect of layer {at} is below {FLOOR}: a ratio to it says nothing")
        ratios.append(ratio(top["effect"], bottom["effect"], top["half"], bottom["half"]))
    return ratios[0]


# 4.1.2, layer-removal


def _whole(table: pd.DataFrame, column: str) -> Value:
    row = table[table["mode"] == "none"].iloc[0]
    return proportion(row, "accuracy") if column == "accuracy" else one(row[column])


def _without(table: pd.DataFrame) -> tuple[pd.Series, Value | None]:
    """(probability by layer removed, a value that says why if these say nothing)."""
    single = table[table["mode"] == "single"]
    probability = single.set_index(single["layer"].astype(int))["probability"]
    if probability.isna().any():
        return probability, NONE
    if not reaches(_whole(table, "probability").value - probability.min(), FLOOR):
        return probability, Value(why=f"no layer costs {FLOOR} of the probability when it is removed")
    return probability, None


def _removed(table: pd.DataFrame, layer: Layer, which: int | None) -> Value:
    probability, nothing = _without(table)
    at = layer if which is None else which
    return nothing or (one(probability[at]) if at in probability.index else NONE)


def _lowest_other(table: pd.DataFrame, layer: Layer) -> Value:
    probability, nothing = _without(table)
    return nothing or one(probability.drop([0, layer], errors="ignore").min())


def _worst_two(table: pd.DataFrame, layer: Layer) -> Value:
    probability, nothing = _without(table)
    if nothing or 0 not in probability.index or layer not in probability.index:
        return nothing or NONE
    others = probability.drop([0, layer]).min()
    lowest = probability[0] < min(probability[layer], others)
    second = layer != 0 and probability[0] < probability[layer] < others
    return one(int(lowest) + int(second))


def _spare_layers(table: pd.DataFrame, layer: Layer) -> Value:
    whole = table.loc[table["mode"] == "none", "accuracy"].iloc[0]
    greedy = table[table["mode"] == "greedy"].sort_values("step")["accuracy"]
    if math.isnan(whole) or greedy.isna().any():
        return NONE
    kept = len(list(takewhile(lambda value: reaches(value, whole - SPARE), greedy)))
    n_layers = int((table["mode"] == "single").sum())
    if kept >= n_layers - 1:
        return Value(why="the accuracy never falls, however many layers are removed")
    # A search cut off before the accuracy fell says only that so many can go, which decides nothing if they are few.
    if kept == len(greedy) and kept < n_layers / 2:
        return Value(why="the search ended before the accuracy fell")
    return one(kept / n_layers)


def _notebook_removal(table: pd.DataFrame, layer: Layer, column: str) -> Value:
    single = table[table["mode"] == "single"].astype({"layer": int})
    return largest_difference(single, paper.table("layer-removal"), ["layer"], (f"{column}_published", column))


# 4.1.3, cross-talk

CIRCUIT = ["template", "corruption"]


def _members(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["chosen"] & table["in_circuit"]]


def _n_circuits(table: pd.DataFrame) -> int:
    """Circuits with at least one layer: a search that gave none back says of no layer that it is not needed."""
    return len(_members(table)[CIRCUIT].drop_duplicates())


def _in_circuits(table: pd.DataFrame, layer: Layer, which: int | None = None, first: bool = False) -> Value:
    members = _members(table)
    members = members[members["layer"] == (layer if which is None else which)]
    return share(int((members["step"] == 1).sum()) if first else len(members), _n_circuits(table))


def _gain(table: pd.DataFrame, layer: Layer) -> Value:
    return spread(table[table["chosen"] & (table["step"] == 1) & (table["layer"] == layer)]["accuracy"])


def _circuits_by_layer(table: pd.DataFrame) -> pd.DataFrame:
    """By layer: how many circuits have it, published and own."""
    published = paper.table("cross-talk").set_index("layer")["circuits"]
    own = _members(table)["layer"].astype(int).value_counts()
    return pd.DataFrame({"published": published, "own": own.reindex(published.index, fill_value=0)})


def _proportion_difference(table: pd.DataFrame, layer: Layer) -> Value:
    both, n = _circuits_by_layer(table), _n_circuits(table)
    if not n:
        return NONE
    published = len(paper.table("cross-talk-steps")[CIRCUIT].drop_duplicates())
    counts = pd.DataFrame({"own": n, "published": published}, index=both.index)
    return one(standard_errors(both["own"], counts["own"], both["published"], counts["published"]).abs().max())


def _proportion_correlation(table: pd.DataFrame, layer: Layer) -> Value:
    both = _circuits_by_layer(table).rank()
    return one(both["published"].corr(both["own"]))


def _circuit_size(table: pd.DataFrame, layer: Layer) -> Value:
    return spread(_members(table).groupby(CIRCUIT).size())


def _stopped(table: pd.DataFrame, layer: Layer) -> Value:
    """Of the searches that had to give a layer back at all."""
    searched = table[table["chosen"]].groupby(CIRCUIT)["reached"].first()
    return share(int(searched.sum()), len(searched))


def _notebook_steps(table: pd.DataFrame, layer: Layer) -> Value:
    own = table[table["template"].str.startswith("Then") & (table["corruption"] == "CAB AB C -> DAB AB D")]
    published = paper.table("cross-talk-notebook").query("step <= 2")
    own = own.dropna(subset="layer").astype({"layer": int})
    return largest_difference(own, published, ["step", "layer"], ("accuracy_published", "accuracy"))


# 4.2, state-similarity and conv-shift


def _lines_after_names(table: pd.DataFrame, layer: Layer) -> Value:
    hits = n = 0
    lines = state_similarity.lines(table[table["layer"] == layer])
    for _, rows in lines.groupby("prompt", sort=False):
        similarity = rows["mean"]
        if similarity.isna().any() or reaches(0.0, similarity.max() - similarity.min()):
            return Value(why="the contributions of a prompt are all as similar: none stays longest")
        top = rows.head(int(rows["after_name"].sum()))
        hits, n = hits + int(top["after_name"].sum()), n + len(top)
    return share(hits, n)


def _notebook_similarity(table: pd.DataFrame, layer: Layer) -> Value:
    own = table[(table["layer"] == layer) & (table["prompt"] == NOTEBOOK_PROMPT)]
    columns = ("similarity_published", "similarity")
    return largest_difference(own, paper.table("state-similarity"), ["measure", "row", "column"], columns)


def _of_layer(table: pd.DataFrame, layer: Layer) -> list[Panel]:
    return _panels(table[table["layer"] == layer])


def _shifted(panel: Panel) -> pd.Series:
    """Which cell is that of slice -1, one after the name."""
    return (panel.cells["slice"] == -1) & (panel.cells["position"] == panel.name + 1)


def _slices(table: pd.DataFrame, layer: Layer) -> tuple[list[Panel], Value | None]:
    panels = [panel for panel in _of_layer(table, layer) if _shifted(panel).any()]
    return panels, _says_nothing(panels)


def _slice_is_peak(table: pd.DataFrame, layer: Layer) -> Value:
    panels, nothing = _slices(table, layer)
    if nothing:
        return nothing
    hits = []
    for panel in panels:
        own = panel.cells[_shifted(panel)].iloc[0]
        bounds = (own["size"], own["size"] - own["half"], own["size"] + own["half"])
        hits.append(_beats(bounds, panel.cells[~_shifted(panel)]))
    return mean_hit(hits)


def _slice_effect(table: pd.DataFrame, layer: Layer) -> Value:
    panels, nothing = _slices(table, layer)
    if nothing:
        return nothing
    cells = [panel.cells[_shifted(panel)].iloc[0] for panel in panels]
    return mean_effect([cell["effect"] for cell in cells], [cell["half"] for cell in cells])


def _slice_others(table: pd.DataFrame, layer: Layer) -> Value:
    panels, nothing = _slices(table, layer)
    return nothing or worst([_over(panel, ~_shifted(panel), _shifted(panel)) for panel in panels], largest=True)


def _oldest_slice(table: pd.DataFrame, layer: Layer) -> Value:
    panels = _of_layer(table, layer)
    if nothing := _says_nothing(panels):
        return nothing
    sizes = pd.concat([panel.cells.loc[panel.cells["slice"] == -3, "size"] for panel in panels])
    return NONE if sizes.empty else one(sizes.max())


# 4.3, name-steering


def _steering(table: pd.DataFrame, layer: Layer, method: str, near: bool) -> Value:
    """Slots 1 to 3 written over, with averages from 1 to 3 (near) or from 4 and 5, pooled."""
    sources = table["source_slot"] <= 3 if near else table["source_slot"] > 3
    own = table[(table["method"] == method) & (table["slot"] <= 3) & sources & (table["n"] > 0)]
    own = own[own["layer"] == layer]
    if "block_n" in own and len(own):
        # A prompt that stands in several cells counts once there.
        value, n, low, high = own[["block_success", "block_n", "block_low", "block_high"]].iloc[0]
        return Value(float(value), float(low), float(high), n)
    n = int(own["n"].sum())
    return share(round(float((own["success"] * own["n"]).sum())), n)._replace(n=n)


def _steering_cells(table: pd.DataFrame, layer: Layer, method: str) -> Value:
    """The largest difference, in standard errors of a difference of two proportions."""
    published = paper.table("name-steering")
    published = published[published["method"] == method]
    own = table[(table["layer"] == layer) & (table["offset"] == 1) & (table["n"] > 0)]
    both = published.merge(own, on=["method", "slot", "source_slot"], suffixes=("_published", ""))
    if len(both) < len(published) or both["success"].isna().any():
        return NONE
    hits = both["success"] * both["n"]
    return one(standard_errors(hits, both["n"], both["successes"], both["n_published"]).abs().max())


# 4.4, state-ablation and output-ablation


def _over(panel: Panel, above: pd.Series, below: pd.Series, largest: bool = True) -> Value:
    """The largest, or least, |effect| of some cells over the largest of others."""
    top, bottom = panel.cells[above].sort_values("size"), panel.cells[below].sort_values("size")
    if top.empty or bottom.empty:
        return NONE
    one_of, peak = top.iloc[-1 if largest else 0], bottom.iloc[-1]
    return ratio(one_of["size"], peak["size"], one_of["half"], peak["half"])


def _worst_ratio(table: pd.DataFrame, layer: Layer, after: bool) -> Value:
    """State effects of the layer over their peak, worst corruption: after the name the least, else the largest."""
    panels = _of_layer(table, layer)
    if nothing := _says_nothing(panels):
        return nothing
    ratios = []
    for panel in panels:
        behind = panel.cells["position"] > panel.name
        anywhere = pd.Series(True, index=panel.cells.index)
        ratios.append(_over(panel, behind if after else ~behind, anywhere, largest=not after))
    return worst(ratios, largest=not after)


def _before_last(table: pd.DataFrame, layer: Layer) -> Value:
    """The largest effect before the last position over the one there, worst corruption."""
    panels = _of_layer(table, layer)
    if nothing := _says_nothing(panels):
        return nothing
    lasts = [panel.cells["position"] == panel.cells["position"].max() for panel in panels]
    return worst([_over(panel, ~last, last) for panel, last in zip(panels, lasts, strict=True)], largest=True)


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
