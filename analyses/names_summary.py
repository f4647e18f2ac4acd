"""What carries the names: the paper's lines of evidence side by side, each with its number on this model.

Four claims of sections 4.1 to 4.4, read off the tables of the experiments that test them: one layer is the
bottleneck; its convolution shifts names by one token; a name is one vector there; only its last output is used. The
summary runs nothing: `summarize(tables)` takes what is there and says "not run" of the rest.

Thresholds are those published values and the tolerances that a correct rerun of mamba-370m should meet; a model that
does the task in another way fails them, which says nothing against the model. Two published numbers are to be taken
with care: figure 4's 0.43 was very likely made with stale activations (a correct run should give 0.8 or more), and
sections 4.4's claims are qualitative, so that these rows have no number of the paper.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import altair as alt
import pandas as pd

from analyses import layer_ablation, state_similarity
from ioi_mamba import charts
from ioi_mamba.metrics import wilson_interval

NAME = "names-summary"
TITLE = "What carries the names"
PAPER = "4.1 to 4.4"
QUESTION = "Do the paper's four lines of evidence on how names are carried hold for this model?"
LOOK_FOR = (
    "Which lines of evidence hold: a model may have a bottleneck layer that works in another way than the paper's."
)
METHOD = (
    "Bottleneck: the layer after 0 with the largest effect in layer-ablation, or the one the experiments were given; "
    "all lines are about this layer.\n"
    "Each line is one number of one experiment's table, held against a threshold from the published numbers.\n"
    "Intervals are 95 % Wilson intervals, of the proportions that have one."
)
COLUMNS = ("evidence", "measure", "value", "low", "high", "threshold", "paper", "holds", "source")

BOTTLENECK, SHIFT = "bottleneck layer", "shift by one"
LINEAR, LAST = "linear names", "last position only"

ONE_LAYER = ("name-steering", "conv-shift", "state-similarity")
"""The experiments that are run on the bottleneck layer alone."""

FARTHEST = 2.0
"""Where the chart's axis ends; some ratios have no bound."""

Value = tuple[float, float, float]
"""(value, low, high), NaN where there is none."""
NAN = float("nan")
NONE: Value = (NAN, NAN, NAN)


@dataclass(frozen=True)
class Line:
    """One line of evidence. Holds if at_least <= value < below; `paper` is the published value, NaN without one.

    measure: how `value` is made of the table of `source` and the bottleneck layer.
    """

    evidence: str
    text: str
    source: str
    measure: Callable[[pd.DataFrame, int], Value]
    paper: float
    at_least: float = float("-inf")
    below: float = float("inf")

    @property
    def threshold(self) -> str:
        bounds = [f"at least {self.at_least:g}"] if self.at_least > float("-inf") else []
        bounds += [f"below {self.below:g}"] if self.below < float("inf") else []
        return ", ".join(bounds)


def summarize(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The lines of evidence, one row each, from the experiments' tables by name ("layer-ablation", ...).

    value, low, high, paper: NaN where there is none; threshold: in words; source: the experiment; holds: "yes",
    "no", or "not run" where the source is missing or has no such prompts. The layer in question is the one that the
    experiments on one layer agree on, and else the bottleneck of layer-ablation.
    """
    layer = _layer(tables)
    rows = []
    for line in LINES:
        value = NONE
        if layer is not None and line.source in tables:
            value = line.measure(tables[line.source], layer)
        holds = "not run" if pd.isna(value[0]) else "yes" if line.at_least <= value[0] < line.below else "no"
        rows.append((line.evidence, line.text, *value, line.threshold, line.paper, holds, line.source))
    table = pd.DataFrame(rows, columns=list(COLUMNS)).astype({"low": float, "high": float, "paper": float})
    return table.assign(layer=pd.array([layer] * len(table), dtype="Int64"))


def chart(table: pd.DataFrame) -> alt.LayerChart:
    """This model's number and the paper's, line by line; filled where the line holds."""
    shown = table[table["holds"] != "not run"].copy()
    shown["at"] = shown["value"].clip(upper=FARTHEST)
    shown["line"] = shown["evidence"] + ": " + shown["measure"]
    order = list(shown["line"])
    y = alt.Y("line:N", sort=order, title=None, axis=alt.Axis(labelLimit=360, ticks=False, domain=False, grid=True))
    tooltip = ["evidence", "measure", alt.Tooltip("value:Q", format=".3f"), alt.Tooltip("paper:Q", format=".3f")]
    tooltip += ["threshold", "holds", "source"]
    base = alt.Chart(charts.check_size(shown)).encode(y=y, tooltip=tooltip)
    title = f"value (tick: the paper's; at {FARTHEST:g}: or more)"
    x = alt.X("at:Q", title=title, scale=alt.Scale(domain=[0, FARTHEST]))
    intervals = base.mark_rule(strokeWidth=2, opacity=0.6).encode(x=alt.X("low:Q", title=""), x2="high:Q")
    holds = alt.Scale(domain=["yes", "no"], range=[charts.BLUE, charts.ORANGE])
    shapes = alt.Scale(domain=["yes", "no"], range=["circle", "cross"])
    legend = alt.Legend(orient="top", title="holds on this model")
    points = base.mark_point(filled=True, size=70, opacity=1).encode(
        x=x,
        color=alt.Color("holds:N", scale=holds, legend=legend),
        shape=alt.Shape("holds:N", scale=shapes, legend=legend),
    )
    ticks = base.mark_tick(thickness=2, size=14, color="currentColor").encode(x="paper:Q")
    return alt.layer(intervals, ticks, points).properties(width=charts.PLOT_WIDTH - 360, height=24 * len(order) + 12)


def findings(table: pd.DataFrame) -> list[str]:
    """For each of the four claims, how many of its lines hold, and which do not."""
    layer = table["layer"].iloc[0]
    found = [] if pd.isna(layer) else [f"The layer in question is {layer}."]
    for evidence in dict.fromkeys(table["evidence"]):
        part = table[table["evidence"] == evidence]
        run = part[part["holds"] != "not run"]
        if run.empty:
            found.append(f"{evidence[0].upper()}{evidence[1:]}: not run.")
            continue
        kept = run[run["holds"] == "yes"]
        sentence = f"{evidence[0].upper()}{evidence[1:]}: {len(kept)} of {len(run)} lines of evidence hold"
        failed = [
            f"{row.measure} is {row.value:.2f}, not {row.threshold}" for row in run[run["holds"] == "no"].itertuples()
        ]
        found.append(f"{sentence}{'; ' if failed else ''}{'; '.join(failed)}.")
    return found


def changed_slot(corruption: str) -> str | None:
    """The role of the first name that a corruption such as "ABC AB C -> ABD AB D" changes: "n3"."""
    letters = re.fullmatch(r"([A-Z ]+) -> ([A-Z ]+)", corruption)
    if not letters:
        return None
    clean, corrupted = (side.replace(" ", "")[:-1] for side in letters.groups())
    differing = [k for k, (a, b) in enumerate(zip(clean, corrupted, strict=False), 1) if a != b]
    return f"n{differing[0]}" if differing else None


def _layer(tables: Mapping[str, pd.DataFrame]) -> int | None:
    used = [set(tables[name]["layer"].unique()) for name in ONE_LAYER if name in tables]
    single = set().union(*(layers for layers in used if len(layers) == 1))
    if len(single) == 1:
        return int(single.pop())
    return layer_ablation.bottleneck(tables["layer-ablation"]) if "layer-ablation" in tables else None


def _by_corruption(table: pd.DataFrame) -> list[tuple[pd.DataFrame, int]]:
    """The table of each corruption of which it is known which name it changes, and where that name is."""
    parts = []
    for corruption, part in table.groupby("corruption", sort=False):
        at = part.loc[part["label"] == changed_slot(str(corruption)), "position"]
        if len(at):
            parts.append((part.assign(size=part["effect"].abs()), int(at.iloc[0])))
    return parts


def _mean(values: list[float]) -> Value:
    return (sum(values) / len(values), NAN, NAN) if values else NONE


def _share(hits: int, n: int) -> Value:
    return (hits / n, *wilson_interval(hits, n)) if n else NONE


def _peak_effect(table: pd.DataFrame, layer: int) -> Value:
    cells = [part[(part["layer"] == layer) & (part["position"] == name)] for part, name in _by_corruption(table)]
    return _mean([cell["effect"].iloc[0] for cell in cells if len(cell)])


def _two_strongest_layers(table: pd.DataFrame, layer: int) -> Value:
    """Of the corruptions that change a name of the first clause."""
    hits = []
    for part, _ in _by_corruption(table):
        if changed_slot(part["corruption"].iloc[0]) in ("n1", "n2", "n3"):
            strongest = part.groupby("layer")["size"].max().sort_values(ascending=False).index[:2]
            hits.append(float({0, layer} <= set(strongest)))
    return _mean(hits)


def _in_circuits(table: pd.DataFrame, layer: int, first: bool) -> Value:
    members = table[table["chosen"] & table["in_circuit"] & (table["layer"] == layer)]
    if first:
        members = members[members["step"] == 1]
    return _share(len(members), len(table[["template", "corruption"]].drop_duplicates()))


def _slice_cells(table: pd.DataFrame, layer: int) -> list[tuple[float, float, bool]]:
    """Per corruption: the effect of slice -1 one after the name, the largest other one, whether it is the peak."""
    cells = []
    for part, name in _by_corruption(table[table["layer"] == layer]):
        shifted = (part["slice"] == -1) & (part["position"] == name + 1)
        if shifted.any():
            own, others = part[shifted].iloc[0], part.loc[~shifted, "size"].max()
            cells.append((own["effect"], others, own["size"] > others))
    return cells


def _slice_is_peak(table: pd.DataFrame, layer: int) -> Value:
    return _mean([float(is_peak) for _, _, is_peak in _slice_cells(table, layer)])


def _slice_effect(table: pd.DataFrame, layer: int) -> Value:
    return _mean([effect for effect, _, _ in _slice_cells(table, layer)])


def _slice_others(table: pd.DataFrame, layer: int) -> Value:
    cells = _slice_cells(table, layer)
    return (max(other / abs(own) if own else float("inf") for own, other, _ in cells), NAN, NAN) if cells else NONE


def _worst_ratio(table: pd.DataFrame, layer: int, after: bool) -> Value:
    """State effects of the layer over their peak, worst corruption: after the name the least, else the largest."""
    ratios = []
    for part, name in _by_corruption(table[table["layer"] == layer]):
        behind = part["position"] > name
        cells, peak = part.loc[behind if after else ~behind, "size"], part["size"].max()
        ratios.append((cells.min() if after else cells.max()) / peak if peak else NAN)
    return (min(ratios) if after else max(ratios), NAN, NAN) if ratios else NONE


def _before_last(table: pd.DataFrame, layer: int) -> Value:
    """The largest effect before the last position over the one there, worst corruption."""
    ratios = []
    for _, part in table[table["layer"] == layer].groupby("corruption", sort=False):
        last = part["position"] == part["position"].max()
        size = part["effect"].abs()
        ratios.append(size[~last].max() / size[last].iloc[0] if size[last].iloc[0] else float("inf"))
    return (max(ratios), NAN, NAN) if ratios else NONE


def _lines_after_names(table: pd.DataFrame, layer: int) -> Value:
    """Of the strongest rows of each prompt, as many as it has names, the share that is one token after a name."""
    hits = n = 0
    for _, rows in state_similarity.lines(table[table["layer"] == layer]).groupby("prompt", sort=False):
        top = rows.head(int(rows["after_name"].sum()))
        hits, n = hits + int(top["after_name"].sum()), n + len(top)
    return _mean([hits / n]) if n else NONE


def _steering(table: pd.DataFrame, layer: int, method: str, near: bool) -> Value:
    """Slots 1 to 3 written over, with averages from 1 to 3 (near) or from 4 and 5, pooled."""
    sources = table["source_slot"] <= 3 if near else table["source_slot"] > 3
    own = table[(table["method"] == method) & (table["slot"] <= 3) & sources & (table["n"] > 0)]
    own = own[own["layer"] == layer]
    return _share(round(float((own["success"] * own["n"]).sum())), int(own["n"].sum()))


LINES = (
    Line(BOTTLENECK, "effect of its input at the changed name, mean", "layer-ablation", _peak_effect, 0.43, 0.8),
    Line(
        BOTTLENECK,
        "corruptions in which it and layer 0 are the strongest",
        "layer-ablation",
        _two_strongest_layers,
        1.0,
        1.0,
    ),
    Line(BOTTLENECK, "cross-talk circuits that have it", "cross-talk", partial(_in_circuits, first=False), 1.0, 1.0),
    Line(
        BOTTLENECK, "cross-talk circuits that begin with it", "cross-talk", partial(_in_circuits, first=True), 1.0, 1.0
    ),
    Line(SHIFT, "corruptions with their peak in slice -1 at name + 1", "conv-shift", _slice_is_peak, 1.0, 1.0),
    Line(SHIFT, "effect of slice -1 at name + 1, mean", "conv-shift", _slice_effect, 0.96, 0.8, 1.1),
    Line(SHIFT, "largest other slice over it, worst corruption", "conv-shift", _slice_others, 0.121, below=0.2),
    Line(
        SHIFT,
        "state up to the name over the peak, worst",
        "state-ablation",
        partial(_worst_ratio, after=False),
        NAN,
        below=0.05,
    ),
    Line(
        SHIFT,
        "state after the name over the peak, worst",
        "state-ablation",
        partial(_worst_ratio, after=True),
        NAN,
        at_least=0.4,
    ),
    Line(SHIFT, "strongest rows that are one after a name", "state-similarity", _lines_after_names, 0.6, 0.6),
    Line(
        LINEAR,
        "subtract-add, slots 1-3 from 1-3",
        "name-steering",
        partial(_steering, method="subtract-add", near=True),
        0.991,
        0.95,
    ),
    Line(
        LINEAR,
        "replace, slots 1-3 from 1-3",
        "name-steering",
        partial(_steering, method="replace", near=True),
        0.993,
        0.95,
    ),
    Line(
        LINEAR,
        "subtract-add, slots 1-3 from 4-5",
        "name-steering",
        partial(_steering, method="subtract-add", near=False),
        0.731,
        below=0.9,
    ),
    Line(
        LINEAR,
        "replace, slots 1-3 from 4-5",
        "name-steering",
        partial(_steering, method="replace", near=False),
        0.523,
        below=0.9,
    ),
    Line(LAST, "output before the last position over the last", "output-ablation", _before_last, NAN, below=0.05),
)
"""Each with the published value and what a correct rerun should meet (state rows: the notebook's own prompt)."""
