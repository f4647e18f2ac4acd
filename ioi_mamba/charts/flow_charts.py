"""What passes from token to token, drawn as arcs over the tokens."""

from __future__ import annotations

import altair as alt
import pandas as pd

from ioi_mamba.charts.circuit_axes import SCORED, label_expression
from ioi_mamba.charts.drawing import MAX_ROWS, check_size, how_many, rounded
from ioi_mamba.charts.theme import PLOT_WIDTH

POINTS = 9
"""Points of an arc."""
LEAST = 0.02
"""Of the largest score: flows below are not drawn."""
ROW_HEIGHT, LABEL_WIDTH = 74, 44


def arcs(table: pd.DataFrame) -> alt.VConcatChart:
    """One row a layer, tokens on the horizontal axis: what passes by convolution above, by state below.

    table: layer, source, target, source_place, target_place (their order), path ("conv" or "state"), score, low, high, n. An arc
    is as strong as its score; orange: patching it lowers the metric. A dot is what a token takes from itself.
    """
    ends = pd.concat(
        [table[[end, f"{end}_place"]].set_axis(["label", "place"], axis=1) for end in ("source", "target")]
    )
    labels = list(ends.drop_duplicates().sort_values("place")["label"])
    place = {label: k for k, label in enumerate(labels)}
    size = table["score"].abs()
    wanted = table[size > LEAST * size.max()].sort_values("score", key=lambda score: -score.abs())
    drawn = wanted.head(MAX_ROWS // POINTS)
    rows = []
    for number, flow in enumerate(drawn.itertuples()):
        start, end = place[flow.source], place[flow.target]
        up = 1 if flow.path == "conv" else -1
        for k in range(POINTS):
            along = k / (POINTS - 1)
            height = up * (0.15 + 0.85 * abs(end - start) / max(1, len(labels) - 1)) * 4 * along * (1 - along)
            rows.append((number, k, start + along * (end - start), height, *flow[1:]))
    points = pd.DataFrame(rows, columns=["flow", "point", "x", "y", *table.columns])
    points = points[["flow", "point", "x", "y", "layer", "source", "target", "path", "score", "low", "high", "n"]]
    top = float(size.max()) or 1.0
    layers = sorted(drawn["layer"].unique())
    charts = [
        _of_layer(
            rounded(points[points["layer"] == layer]),
            labels if layer == layers[-1] else [],
            int(layer),
            top,
            len(labels),
        )
        for layer in layers
    ]
    left = how_many(len(drawn), len(wanted), "flows")
    title = alt.TitleParams(
        "What passes from token to token, by layer",
        subtitle=["above: by the convolution, below: by the state; orange: patching it hurts", *left],
        anchor="start",
    )
    return alt.vconcat(*charts, spacing=6, title=title)


def _of_layer(points: pd.DataFrame, labels: list[str], layer: int, top: float, n_places: int) -> alt.LayerChart:
    """The arcs of one layer over so many places; labels: what stands below them, nothing where another layer says it."""
    named = {"labelExpr": label_expression(labels)} if labels else {"labels": False}
    axis = alt.Axis(values=list(range(n_places)), ticks=False, labelOverlap=False, grid=True, **named)
    x = alt.X("x:Q", scale=alt.Scale(domain=[-0.5, n_places - 0.5], nice=False), title=None, axis=axis)
    y = alt.Y(
        "y:Q", scale=alt.Scale(domain=[-1.1, 1.1]), title=f"layer {layer}", axis=alt.Axis(labels=False, ticks=False)
    )
    tooltip = [
        *("source:N", "target:N", "path:N"),
        *(alt.Tooltip(f"{name}:Q", format=".3f") for name in ("score", "low", "high")),
        "n:Q",
    ]
    base = alt.Chart(check_size(points)).transform_calculate(strength=f"abs(datum.score) / {top}")
    width = alt.StrokeWidth("strength:Q", scale=alt.Scale(type="sqrt", domain=[0, 1], range=[0.5, 7]), legend=None)
    between = (
        base.transform_filter("datum.source != datum.target")
        .mark_line(interpolate="monotone")
        .encode(
            x=x,
            y=y,
            detail="flow:N",
            order="point:Q",
            color=SCORED,
            strokeWidth=width,
            opacity=alt.value(0.9),
            tooltip=tooltip,
        )
    )
    dots = (
        base.transform_filter("datum.source == datum.target && datum.point == 0")
        .transform_calculate(level="datum.path == 'conv' ? 0.12 : -0.12")
        .mark_circle()
        .encode(
            x=x,
            y=alt.Y("level:Q"),
            color=SCORED,
            size=alt.Size("strength:Q", scale=alt.Scale(domain=[0, 1], range=[4, 260]), legend=None),
            tooltip=tooltip,
        )
    )
    return alt.layer(between, dots).properties(width=max(PLOT_WIDTH, LABEL_WIDTH * n_places), height=ROW_HEIGHT)
