"""The axes and colours that charts of circuits share: nodes in their order, labels of positions, scores."""

from __future__ import annotations

from collections.abc import Iterable

import altair as alt
import pandas as pd

from ioi_mamba.charts.drawing import diverging_scale
from ioi_mamba.charts.theme import DIVERGING, EFFECT, HELPS

SCORE_TITLE = "score (orange: patching it hurts)"


SUB_BLOCKS = ("", "mamba", "attn", "mlp")
"""The sub-blocks of a block in their order; "" is a block that has only one."""


def node_place(node: str) -> tuple[float, int]:
    """Where a node stands: (block, place in it), embed before the first block and output after the last."""
    if node in ("embed", "output"):
        return (-1.0 if node == "embed" else float("inf"), 0)
    layer, _, name = node.partition(".")
    return float(layer), SUB_BLOCKS.index(name)


def mixer_node(nodes: Iterable[str], layer: int) -> str:
    """The node of a layer's state-space mixer: the layer, or where it has several sub-blocks that one."""
    return f"{layer}.mamba" if f"{layer}.mamba" in set(nodes) else str(layer)


def node_order(items: pd.DataFrame) -> list[str]:
    """embed, the layers, output: those of the table."""
    return sorted({*items["source"], *items["target"]}, key=node_place)


SCORED = alt.when("datum.score < 0").then(alt.value(EFFECT)).otherwise(alt.value(HELPS))
"""The colour of a mark by the sign of its score."""


def score_scale(scores: pd.Series) -> alt.Scale:
    """As `diverging_scale`, a negative score having the colour of an effect: patching the item takes the answer away."""
    scale = diverging_scale(scores)
    scale.range = list(reversed(DIVERGING))
    return scale


def score_color(scale: alt.Scale) -> alt.Color:
    legend = alt.Legend(orient="top", gradientLength=180, gradientThickness=10, titleLimit=400)
    return alt.Color("score:Q", scale=scale, title=SCORE_TITLE, legend=legend)


def node_axis(cell: int, vertical: bool = False) -> alt.Axis:
    """An axis of nodes in cells of that many pixels: every name where there is room for it."""
    overlap = "greedy" if cell < 10 else False
    return alt.Axis(ticks=False, domain=False, labelOverlap=overlap, labelAngle=0 if vertical or cell >= 18 else -90)


def label_expression(labels: Iterable[str]) -> str:
    """Vega's expression for the label of a place, of an axis whose values are the places."""
    quoted = (str(label).replace("'", "\\'") for label in labels)
    return "[" + ",".join(f"'{label}'" for label in quoted) + "][datum.value]"


def label_angle(labels: Iterable[str], width: float) -> int:
    """0 where the labels fit beside each other in so many pixels, else -90."""
    labels = list(labels)
    return 0 if width / max(1, len(labels)) > 6.2 * min(9, max(map(len, labels), default=1)) else -90


def label_axis(labels: Iterable[str] = (), width: float = 0) -> alt.Axis:
    """The axis of positions, whose labels are turned unless they fit into so many pixels."""
    return alt.Axis(labelAngle=label_angle(labels, width), ticks=False, domain=False, labelLimit=90, labelOverlap=False)


def places(table: pd.DataFrame) -> pd.Series:
    """The text below each position: its label, with the position where a label stands at two."""
    names, at = table["label"].astype(str), table["position"].astype("Int64").astype(str)
    twice = table.groupby("label")["position"].nunique()
    return names.where(~names.isin(set(twice[twice > 1].index)), names + " @" + at)


def position_labels(table: pd.DataFrame) -> list[str]:
    """The texts below the positions, in order."""
    return list(table.assign(place=places(table)).drop_duplicates("position").sort_values("position")["place"])
