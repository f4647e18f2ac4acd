"""Charts of circuits: matrices linked to details, exact effects against attributions, curves over sizes.

As in `charts`, builders take tidy tables and never a model. Tables of items have source, target, score and kept, and
where it applies part, position, label, exact and rank; tables of circuits are the rows that score them (circuit,
size, measure, value, low, high). A click selects an edge, in the offline page too. `position_charts` has the charts of
(edge, position) items.
"""

from __future__ import annotations

import math
from typing import Any

import altair as alt
import pandas as pd

from ioi_mamba.charts.circuit_axes import node_axis, node_order, score_color, score_scale
from ioi_mamba.charts.drawing import check_size, how_many, rounded, strongest
from ioi_mamba.charts.edge_details import EDGE, edge_details
from ioi_mamba.charts.theme import CATEGORIES, EFFECTS, KEPT, PLOT_WIDTH

SMALLEST = 1e-6  # below it a change of the metric is rounding
NAMES_OF_MEASURES = {"accuracy": "accuracy", "normalized_logit_diff": "normalized logit diff", "f": "faithfulness f"}


def with_edge_selection(chart: Any, items: pd.DataFrame) -> Any:
    """The chart, with a click on a cell of either matrix selecting an edge.

    It stands at the top, because Altair would otherwise put together one selection for each view, with a warning.
    The strongest edge is selected to begin with.
    """
    edges = items[items["position"].isna() & items["part"].isna()]
    first = edges.loc[edges["score"].abs().idxmax()]
    selection = alt.TopLevelSelectionParameter(
        name="edge",
        select=alt.PointSelectionConfig(type="point", fields=["source", "target"]),
        value=[{"source": first["source"], "target": first["target"]}],
        views=["scores", "kept"],
    )
    chart.params = [selection, *(chart.params if chart.params is not alt.Undefined else [])]
    return chart


def linked_matrices(items: pd.DataFrame) -> alt.HConcatChart:
    """Attributions and kept edges as two matrices, and beside them the positions, parts and exact effect of one edge.

    items: all of them over all positions (position null), and at positions. One slider hides small scores in both
    matrices, the other sets where colours end, to see more than the strongest. Positions are those of the strongest
    edges, as many as a chart carries. To be used in `with_edge_selection`.
    """
    totals = items[items["position"].isna()]
    edges = totals[totals["part"].isna()]
    nodes = node_order(edges)
    columns = ["source", "target", "score", "rank", "kept", "exact"]
    n_edges = len(edges)
    edges = rounded(strongest(edges[columns].assign(name=edges["source"] + " to " + edges["target"]), "score"))
    cell = max(3, min(28, 250 // len(nodes)))
    top = float(edges["score"].abs().max()) or 1.0
    lowest = float(edges.loc[edges["score"] != 0, "score"].abs().min())
    low = math.floor(math.log10(lowest)) if lowest > 0 else -6
    high = math.ceil(math.log10(top))
    slider = alt.param(
        name="smallest",
        value=low,
        bind=alt.binding_range(min=low, max=high, step=0.1, name="hide below 10^ "),
    )
    full = alt.param(
        name="full",
        value=round(math.log10(top), 1),
        bind=alt.binding_range(min=low, max=high, step=0.1, name="colour 10^ "),
    )
    colors = score_scale(edges["score"])
    colors.domain, colors.domainMin, colors.domainMax = (
        alt.Undefined,
        alt.ExprRef("-pow(10, full)"),
        alt.ExprRef("pow(10, full)"),
    )
    base = alt.Chart(edges).encode(
        x=alt.X("target:N", sort=nodes[1:], title="to", scale=alt.Scale(domain=nodes[1:]), axis=node_axis(cell)),
        y=alt.Y(
            "source:N", sort=nodes[:-1], title="from", scale=alt.Scale(domain=nodes[:-1]), axis=node_axis(cell, True)
        ),
        opacity=alt.when("abs(datum.score) >= pow(10, smallest)").then(alt.value(1)).otherwise(alt.value(0.04)),
        stroke=alt.when(EDGE).then(alt.value("currentColor")).otherwise(alt.value("gray")),
        strokeWidth=alt.when(EDGE).then(alt.value(2.5)).otherwise(alt.value(0.15)),
        tooltip=[
            alt.Tooltip("name:N", title="edge"),
            alt.Tooltip("score:Q", format=".5f"),
            alt.Tooltip("exact:Q", title="exact effect", format=".5f"),
            "rank:Q",
            "kept:N",
        ],
    )
    size = {"width": cell * (len(nodes) - 1), "height": cell * (len(nodes) - 1)}
    title = alt.Title("Attribution", subtitle=how_many(len(edges), n_edges, "edges"))
    scores = base.mark_rect(cursor="pointer").encode(color=score_color(colors))
    kept_scale = alt.Scale(domain=[True, False], range=[KEPT, "rgba(128,128,128,0.10)"])
    kept_legend = alt.Legend(orient="top", title="in the circuit", labelExpr="datum.value ? 'kept' : 'patched'")
    kept = base.mark_rect(cursor="pointer").encode(color=alt.Color("kept:N", scale=kept_scale, legend=kept_legend))
    matrices = alt.hconcat(
        scores.properties(name="scores", title=title, **size).add_params(slider, full),
        kept.properties(name="kept", title="Kept edges", **size),
        spacing=24,
    ).resolve_scale(color="independent")
    return alt.hconcat(matrices, edge_details(items, edges), spacing=24).resolve_scale(color="independent")


def exact_scatter(totals: pd.DataFrame) -> alt.LayerChart:
    """|attribution| against |exact effect| of every edge and part, on logarithmic axes.

    Values below SMALLEST, which is rounding, are drawn there.
    """
    points = totals.dropna(subset="exact")[["source", "target", "part", "estimate", "exact", "kept"]].copy()
    is_part = points["part"].notna()
    points["kind"] = is_part.map({True: "part of a layer", False: "edge"})
    points["name"] = (points["source"] + " " + points["part"]).where(
        is_part, points["source"] + " to " + points["target"]
    )
    points["same sign"] = (points["estimate"] * points["exact"] >= 0).map({True: "same sign", False: "opposite signs"})
    points["part"] = points["part"].fillna("")
    for name in ("estimate", "exact"):
        points[f"|{name}|"] = points[name].abs().clip(lower=SMALLEST)
    n_points = len(points)
    points = rounded(strongest(points, "exact"))
    low = float(points[["|estimate|", "|exact|"]].min().min())
    high = float(points[["|estimate|", "|exact|"]].max().max())
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    scale = alt.Scale(type="log", domain=[10.0 ** powers[0], 10.0 ** powers[-1]])
    axis = alt.Axis(format="~g", values=[10.0**k for k in powers])
    diagonal = pd.DataFrame({"|exact|": [low, high], "|estimate|": [low, high]})
    marks = (
        alt.Chart(points)
        .mark_point(size=55, filled=True)
        .encode(
            x=alt.X("|exact|:Q", scale=scale, axis=axis, title="|exact effect| of patching it alone"),
            y=alt.Y("|estimate|:Q", scale=scale, axis=axis, title="|attribution|"),
            color=alt.Color(
                "same sign:N",
                scale=alt.Scale(domain=["same sign", "opposite signs"], range=list(CATEGORIES[:2])),
                legend=alt.Legend(orient="top", title=None),
            ),
            shape=alt.Shape(
                "kind:N",
                scale=alt.Scale(domain=["edge", "part of a layer"], range=["circle", "triangle-up"]),
                legend=alt.Legend(orient="top", title=None),
            ),
            opacity=alt.value(0.75),
            tooltip=["name:N", alt.Tooltip("estimate:Q", format=".5f"), alt.Tooltip("exact:Q", format=".5f"), "kept:N"],
        )
    )
    line = (
        alt.Chart(diagonal)
        .mark_line(strokeDash=[4, 4], strokeWidth=1, color="gray")
        .encode(x=alt.X("|exact|:Q", scale=scale), y=alt.Y("|estimate|:Q", scale=scale))
    )
    about = ["on the same prompts; dashed: equal", *how_many(len(points), n_points, "edges and parts")]
    title = alt.Title("Exact effect and attribution", subtitle=about)
    return alt.layer(line, marks).properties(width=PLOT_WIDTH, height=320, title=title)


def size_curves(circuits: pd.DataFrame, x_title: str) -> alt.LayerChart:
    """Accuracy and normalized logit diff of the first k items against k, with bands; random circuits as crosses.

    circuits: rows with circuit "first k" and "random". The axis of sizes is that of 1 + k, to have 0 and small k.
    """
    measures = ("accuracy", "normalized_logit_diff")
    rows = circuits[circuits["measure"].isin(measures) & circuits["size"].notna() & (circuits["sample"] == "held out")]
    rows = rows.assign(size=rows["size"].astype(int), measure=rows["measure"].map(NAMES_OF_MEASURES))
    columns = ["size", "measure", "value", "low", "high", "n"]
    curve = check_size(rows.loc[rows["circuit"] == "first k", columns])
    random, kept = (rows.loc[rows["circuit"] == name, columns] for name in ("random", "kept"))
    order = [NAMES_OF_MEASURES[m] for m in measures]
    color = alt.Color("measure:N", sort=order, legend=alt.Legend(orient="top", title=None, symbolOpacity=1))
    tooltip = ["measure:N", "size:Q", *(alt.Tooltip(f"{c}:Q", format=".3f") for c in ("value", "low", "high")), "n:Q"]
    largest = int(curve["size"].max())
    ticks = [0, *(m * 10**k for k in range(6) for m in (1, 2, 5) if m * 10**k < 0.8 * largest), largest]
    scale = alt.Scale(type="symlog", constant=1, domain=[0, largest])
    x = alt.X("size:Q", scale=scale, title=x_title, axis=alt.Axis(format="d", values=ticks))
    y = alt.Y("value:Q", title="value on held-out pairs")
    base = alt.Chart(curve).encode(x=x, color=color, tooltip=tooltip)
    layers = [
        base.mark_area(opacity=0.18).encode(y=alt.Y("low:Q", title="value on held-out pairs"), y2="high:Q"),
        base.mark_line(strokeWidth=2).encode(y=y, strokeDash=alt.StrokeDash("measure:N", legend=None)),
        base.mark_point(filled=True, size=40, opacity=1).encode(y=y),
        alt.Chart(random)
        .mark_point(shape="cross", size=45, strokeWidth=1.4)
        .encode(x=x, y=y, color=color, tooltip=tooltip),
        alt.Chart(kept)
        .mark_point(shape="diamond", size=160, strokeWidth=2)
        .encode(x=x, y=y, color=color, tooltip=tooltip),
    ]
    title = alt.Title(
        "How few are enough",
        subtitle="band: 95 % over pairs; diamond: the circuit; crosses: random circuits of its size",
    )
    return alt.LayerChart(layer=layers).properties(width=PLOT_WIDTH, height=240, title=title)


def searched_edges(edges: pd.DataFrame) -> alt.Chart:
    """Every edge as a cell: how much it mattered to the search (drop), or that it was removed."""
    nodes = node_order(edges)
    cell = max(5, min(28, 300 // len(nodes)))
    whole = edges[["source", "target", "drop", "kept", "score"]].assign(drop=edges["drop"].fillna(0.0))
    shown = strongest(whole, "drop")
    title = alt.Title("Edges of the search", subtitle=how_many(len(shown), len(whole), "edges"))
    return (
        alt.Chart(shown)
        .mark_rect(stroke="gray", strokeWidth=0.2)
        .encode(
            x=alt.X("target:N", sort=nodes[1:], title="to", axis=node_axis(cell)),
            y=alt.Y("source:N", sort=nodes[:-1], title="from", axis=node_axis(cell, True)),
            color=alt.Color(
                "drop:Q",
                scale=alt.Scale(type="sqrt", domainMin=0, range=list(EFFECTS)),
                title="drop when patched (removed edges: 0)",
                legend=alt.Legend(orient="top", gradientLength=180, titleLimit=400),
            ),
            tooltip=[
                "source:N",
                "target:N",
                alt.Tooltip("drop:Q", format=".5f"),
                "kept:N",
                alt.Tooltip("score:Q", format=".5f"),
            ],
        )
        .properties(width=cell * (len(nodes) - 1), height=cell * (len(nodes) - 1), title=title)
    )


def same_size(compared: pd.DataFrame, differences: pd.DataFrame) -> alt.HConcatChart:
    """f of circuits of the same size, with intervals, and differences of them; a row a threshold.

    compared, differences: rows of circuits with circuit, threshold, size, measure, value, low, high, n.
    """
    panels = []
    for rows, title in ((compared, "faithfulness f"), (differences, "difference of f")):
        rows = rows[rows["measure"] == "f"].astype({"size": int})
        sizes = rows.groupby("threshold")["size"].transform("max").astype(str)
        thresholds = rows["threshold"].map("{:g}".format)
        rows = rows.assign(row=[f"{n} items, threshold {t}" for n, t in zip(sizes, thresholds, strict=True)])
        circuits = list(dict.fromkeys(rows["circuit"]))
        columns = ["row", "circuit", "size", "value", "low", "high", "n"]
        numbers = [alt.Tooltip(f"{c}:Q", format=".4f") for c in ("value", "low", "high")]
        base = alt.Chart().encode(
            y=alt.Y("circuit:N", sort=circuits, title=None, axis=alt.Axis(ticks=False, labelLimit=150)),
            color=alt.Color("circuit:N", sort=circuits, legend=None),
            tooltip=["circuit:N", "size:Q", *numbers, "n:Q"],
        )
        zero = alt.Chart().mark_rule(strokeDash=[4, 4], opacity=0.2, strokeWidth=1).encode(x=alt.datum(0))
        marks = alt.layer(
            zero,
            base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title=title), x2="high:Q"),
            base.mark_point(filled=True, size=60, opacity=1).encode(
                x="value:Q", shape=alt.Shape("circuit:N", sort=circuits, legend=None)
            ),
            data=check_size(rows[columns]),
        ).properties(width=PLOT_WIDTH // 2 - 160, height=60)
        order = list(rows.sort_values("size")["row"].unique())
        header = alt.Header(labelOrient="top", labelAnchor="start", labelPadding=2)
        panels.append(marks.facet(row=alt.Row("row:N", sort=order, title=None, header=header), spacing=24))
    title = "Search and attribution at the same size, on held-out pairs"
    return (
        alt.hconcat(*panels, spacing=24).resolve_scale(color="independent", shape="independent").properties(title=title)
    )
