"""Charts of (edge, position) items: the circuit drawn on positions and layers, one node of it, names, scores.

As in `circuit_charts`; items have source, target, position, label, score, rank and kept. A click hides a node, a menu
chooses the node whose edges are shown, in the offline page too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import altair as alt
import pandas as pd

from ioi_mamba.charts.circuit_axes import (
    SCORED,
    label_angle,
    label_axis,
    label_expression,
    node_axis,
    node_order,
    node_place,
    places,
    position_labels,
    score_color,
    score_scale,
)
from ioi_mamba.charts.drawing import MAX_ROWS, check_size
from ioi_mamba.charts.theme import KEPT, PLOT_WIDTH

POINTS = 9  # of each bow in the drawing of a circuit
MANY = 150  # kept items above which the busiest nodes are hidden to begin with


def _bows(kept: pd.DataFrame, nodes: Sequence[str], labels: Sequence[str]) -> pd.DataFrame:
    """Each item as POINTS points of a bow in the column of its position; longer edges bow out farther."""
    rows = []
    heights, columns = {node: k for k, node in enumerate(nodes)}, {label: k for k, label in enumerate(labels)}
    for number, item in enumerate(kept.itertuples()):
        start, end, x = heights[item.source], heights[item.target], columns[item.place]
        reach = 0.15 + 0.65 * (end - start) / (len(nodes) - 1)
        for k in range(POINTS):
            along = k / (POINTS - 1)
            y, out = start + along * (end - start), reach * math.sin(math.pi * along)
            rows.append((number, k, x + out, y, item.source, item.target, item.place, item.score, item.rank))
    return pd.DataFrame(rows, columns=["item", "point", "x", "y", "source", "target", "place", "score", "rank"])


def circuit_graph(items: pd.DataFrame) -> alt.HConcatChart:
    """The kept items drawn on axes of position and node.

    items: (edge, position) items with source, target, position, label, score, rank, kept. Clicking a node in the strip on
    the left hides it and its edges, or shows them again; of a circuit of more than MANY items the three busiest nodes
    start hidden. At most MAX_ROWS / POINTS items are drawn, by rank, and the title says how many of how many.
    """
    nodes, labels = node_order(items), position_labels(items)
    whole = items[items["kept"]].assign(place=places(items)).sort_values("rank")
    kept = whole.head(MAX_ROWS // POINTS)
    busy = pd.concat([kept["source"], kept["target"]]).value_counts()
    first = [{"node": node} for node in busy.index[:3]] if len(kept) > MANY else []
    hidden = alt.selection_point(name="hidden", fields=["node"], toggle="true", value=first, empty=False)
    visible = " && ".join(
        f"(!isArray(hidden.node) || indexof(hidden.node, datum.{end}) < 0)" for end in ("source", "target")
    )
    height = max(260, 12 * len(nodes))
    vertical = alt.Scale(domain=[-0.5, len(nodes) - 0.5], nice=False)
    of_node = {node: k for k, node in enumerate(nodes)}
    listed = pd.DataFrame({"node": nodes, "y": range(len(nodes)), "edges": [int(busy.get(n, 0)) for n in nodes]})
    strip = (
        alt.Chart(listed)
        .mark_text(align="right", fontSize=12 if len(nodes) <= 26 else 9, cursor="pointer", x=44)
        .encode(
            y=alt.Y("y:Q", scale=vertical, axis=None),
            text="node:N",
            opacity=alt.when(hidden).then(alt.value(0.25)).otherwise(alt.value(1)),
            tooltip=["node:N", alt.Tooltip("edges:Q", title="kept edges")],
        )
        .add_params(hidden)
        .properties(width=50, height=height)
    )
    horizontal = alt.Scale(domain=[-0.5, len(labels) + 0.3], nice=False)
    axis = alt.Axis(
        values=list(range(len(labels))),
        labelExpr=label_expression(labels),
        labelAngle=label_angle(labels, PLOT_WIDTH - 60),
        labelOverlap=False,
        ticks=False,
        tickCount=len(labels),
    )
    bows = (
        alt.Chart(check_size(_bows(kept, nodes, labels)))
        .transform_filter(visible)
        .mark_line(interpolate="cardinal", strokeWidth=1.8)
        .encode(
            x=alt.X("x:Q", scale=horizontal, title="position", axis=axis),
            y=alt.Y("y:Q", scale=vertical, axis=None),
            detail="item:N",
            order="point:Q",
            color=SCORED,
            opacity=alt.Opacity(
                "strength:Q", scale=alt.Scale(type="sqrt", domain=[0, 1], range=[0.25, 1]), legend=None
            ),
            tooltip=["source:N", "target:N", "place:N", alt.Tooltip("score:Q", format=".5f"), "rank:Q"],
        )
        .transform_calculate(strength=f"min(1, abs(datum.score) / {float(kept['score'].abs().max()) or 1.0})")
    )
    ends = pd.concat(
        [kept[["place", "source", "target"]].assign(node=kept[end]) for end in ("source", "target")]
    ).drop_duplicates()
    ends["x"] = ends["place"].map({label: k for k, label in enumerate(labels)})
    ends["y"] = ends["node"].map(of_node)
    dots = (
        alt.Chart(check_size(ends))
        .transform_filter(visible)
        .mark_circle(size=38, opacity=1, color="gray")
        .encode(
            x=alt.X("x:Q", scale=horizontal), y=alt.Y("y:Q", scale=vertical, axis=None), tooltip=["node:N", "place:N"]
        )
    )
    title = alt.Title(
        f"The circuit, layers upwards: {len(kept)} of {len(whole)} kept edges are drawn",
        subtitle="click a node on the left to hide it or show it again; orange: patching hurts; faint: small score",
    )
    drawing = alt.layer(bows, dots).properties(width=PLOT_WIDTH - 60, height=height)
    return alt.hconcat(strip, drawing, spacing=0).properties(title=title)


def node_view(items: pd.DataFrame) -> alt.HConcatChart:
    """The kept edges into and out of one node, which a menu chooses, by position; items as of `circuit_graph`."""
    nodes, labels = node_order(items), position_labels(items)
    kept = items[items["kept"]].assign(place=places(items)).sort_values("rank").head(MAX_ROWS // POINTS)
    busy = pd.concat([kept["source"], kept["target"]]).value_counts()
    inner = [node for node in busy.index if node not in ("embed", "output")]
    chosen = alt.param(
        name="node",
        value=inner[0] if inner else nodes[0],
        bind=alt.binding_select(options=nodes, name="Edges of node "),
    )
    shown = check_size(kept[["source", "target", "place", "score", "rank"]])
    tooltip = ["source:N", "target:N", "place:N", alt.Tooltip("score:Q", format=".5f"), "rank:Q"]

    def side(this: str, other: str, words: str) -> alt.Chart:
        return (
            alt.Chart(shown)
            .transform_filter(f"datum.{this} == node")
            .mark_rect(stroke="currentColor", strokeOpacity=0.2, strokeWidth=0.5)
            .encode(
                x=alt.X("place:N", sort=labels, scale=alt.Scale(domain=labels), title=None, axis=label_axis()),
                y=alt.Y(f"{other}:N", sort=nodes[::-1], title=None, axis=alt.Axis(ticks=False, labelOverlap=False)),
                color=score_color(score_scale(shown["score"])),
                tooltip=tooltip,
            )
            .properties(
                width=PLOT_WIDTH // 2 - 80, height=alt.Step(16), title=alt.Title(alt.expr(f"'{words} ' + node"))
            )
        )

    into, out = side("target", "source", "Into node"), side("source", "target", "Out of node")
    return alt.hconcat(into.add_params(chosen), out, spacing=24)


def presence_strips(missing: pd.DataFrame) -> alt.VConcatChart:
    """Which names each layer gets: one strip a table, a column a layer, a row a name; empty cells are missing names.

    missing: columns table, node, label, has. The nodes of a table "to ..." are those that send.
    """
    nodes = sorted(set(missing["node"]), key=node_place)
    names = list(dict.fromkeys(missing["label"]))
    cell = max(9, min(24, (PLOT_WIDTH - 60) // len(nodes)))
    strips = []
    for name, rows in missing.groupby("table", sort=False):
        strips.append(
            alt.Chart(check_size(rows))
            .mark_rect(stroke="currentColor", strokeOpacity=0.25, strokeWidth=0.5)
            .encode(
                x=alt.X("node:N", sort=nodes, scale=alt.Scale(domain=nodes), title=None, axis=node_axis(cell)),
                y=alt.Y("label:N", sort=names, title=None, axis=alt.Axis(ticks=False, domain=False)),
                color=alt.Color(
                    "has:N",
                    scale=alt.Scale(domain=[True, False], range=[KEPT, "rgba(128,128,128,0.10)"]),
                    legend=None,
                ),
                tooltip=["table:N", "node:N", "label:N", "has:N"],
            )
            .properties(width=cell * len(nodes), height=16 * len(names), title=_strip_title(str(name)))
        )
    wide = 2 if cell * len(nodes) < PLOT_WIDTH / 2 - 40 else 1
    return alt.concat(*strips, columns=wide, spacing=20)


def _strip_title(table: str) -> str:
    return f"Names {table}, by {'sending' if table.startswith('to') else 'receiving'} layer"


def strongest_edges(items: pd.DataFrame, n_edges: int = 24) -> alt.Chart:
    """Scores by edge and position, of at most n_edges edges with the strongest cells; kept items are outlined."""
    edge = items["source"] + " to " + items["target"]
    n_edges = max(1, min(n_edges, MAX_ROWS // max(1, len(set(items["position"])))))
    strongest = items["score"].abs().groupby(edge).max().nlargest(n_edges).index
    shown = items.assign(edge=edge, place=places(items))[edge.isin(strongest)]
    labels = position_labels(items)
    columns = ["edge", "place", "score", "low", "high", "rank", "kept"]
    return (
        alt.Chart(check_size(shown[columns]))
        .mark_rect()
        .encode(
            x=alt.X("place:N", sort=labels, title=None, axis=label_axis(labels, PLOT_WIDTH - 60)),
            y=alt.Y("edge:N", sort=list(strongest), title=None, axis=alt.Axis(ticks=False, domain=False)),
            color=score_color(score_scale(shown["score"])),
            stroke=alt.when("datum.kept").then(alt.value("currentColor")).otherwise(alt.value(None)),
            tooltip=[
                "edge:N",
                "place:N",
                *(alt.Tooltip(f"{c}:Q", format=".5f") for c in columns[2:5]),
                "rank:Q",
                "kept:N",
            ],
        )
        .properties(
            width=PLOT_WIDTH - 60,
            height=alt.Step(14),
            title=alt.Title("Attribution by edge and position", subtitle="outlined: kept"),
        )
    )
