"""The edge that a reader has selected in a chart of circuits, and what is shown of it."""

from __future__ import annotations

import altair as alt
import pandas as pd

from ioi_mamba.charts.circuit_axes import SCORED, label_axis, places, position_labels
from ioi_mamba.charts.drawing import MAX_ROWS, check_size, how_many, rounded
from ioi_mamba.charts.theme import CATEGORIES

DETAILS = 340
"""Pixels: the width of what is shown of the edge, beside the matrices."""
EDGE = alt.selection_point(name="edge", fields=["source", "target"], empty=False)
"""The selected edge; charts refer to it, `circuit_charts.with_edge_selection` puts it into the whole."""


def edge_details(items: pd.DataFrame, edges: pd.DataFrame) -> alt.VConcatChart:
    """The scores of the selected edge in a line, and below it those of its positions and of the parts of its layers.

    items: as of `circuit_charts.linked_matrices`; edges: over all positions, with a name.
    """
    number = lambda field: f"(isValid(datum.{field}) ? format(datum.{field}, '.4f') : 'not measured')"
    line = (
        "datum.name + ': attribution ' + " + number("score") + " + '\\nexact effect ' + " + number("exact") + " + "
        "', rank ' + datum.rank + (datum.kept ? ', kept' : ', not kept')"
    )
    text = (
        alt.Chart(edges)
        .transform_filter(EDGE)
        .transform_calculate(line=line)
        .mark_text(align="left", baseline="top", fontSize=13, fontWeight=600, x=0, y=0, lineBreak="\n")
        .encode(text="line:N")
        .properties(width=DETAILS, height=32)
    )
    at = items[items["position"].notna() & items["part"].isna()]
    labels = position_labels(at)
    n_edges = MAX_ROWS // max(1, len(labels))
    strongest = edges.loc[edges["score"].abs().nlargest(n_edges).index, ["source", "target"]]
    title = alt.Title("Its positions", subtitle=how_many(len(strongest), len(edges), "edges"))
    at = at.merge(strongest, on=["source", "target"]).assign(place=lambda t: places(t))
    positions = (
        alt.Chart(check_size(rounded(at[["source", "target", "place", "score"]])))
        .transform_filter(EDGE)
        .mark_bar()
        .encode(
            x=alt.X(
                "place:N", sort=labels, title=None, scale=alt.Scale(domain=labels), axis=label_axis(labels, DETAILS)
            ),
            y=alt.Y("score:Q", title="score"),
            color=SCORED,
            tooltip=["place:N", alt.Tooltip("score:Q", format=".5f")],
        )
        .properties(width=DETAILS, height=90, title=title)
    )
    parts = items[items["part"].notna() & items["position"].isna()]
    order = list(dict.fromkeys(parts["part"]))
    parts = parts[["source", "part", "score", "exact"]].rename(columns={"source": "layer"})
    of_edge = (
        "isArray(edge.source) && (indexof(edge.source, datum.layer) >= 0 || indexof(edge.target, datum.layer) >= 0)"
    )
    shown = (
        alt.Chart(check_size(parts))
        .transform_filter(of_edge)
        .mark_bar()
        .encode(
            x=alt.X("part:N", sort=order, title=None, axis=alt.Axis(labelAngle=0), scale=alt.Scale(domain=order)),
            y=alt.Y("score:Q", title="score"),
            xOffset=alt.XOffset("layer:N"),
            color=alt.Color(
                "layer:N", legend=alt.Legend(orient="top", title="layer"), scale=alt.Scale(range=list(CATEGORIES))
            ),
            tooltip=["layer:N", "part:N", alt.Tooltip("score:Q", format=".5f"), alt.Tooltip("exact:Q", format=".5f")],
        )
        .properties(width=DETAILS, height=90, title="Parts of its layers")
    )
    return alt.vconcat(text, positions, shown, spacing=10).resolve_scale(color="independent")
