"""The one chart that rankings, circuits and searches share: edges as a matrix, parts by layer."""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

from ioi_mamba.charts.circuit_axes import node_place
from ioi_mamba.charts.drawing import matrix_heatmap


def circuit_matrices(table: pd.DataFrame, value: str) -> Any:
    """Edges from source to target, and below them the parts of the layers; over positions `value` is summed.

    Args:
        table: Columns source, target, part and `value`, one row an item or an item and position.
        value: The column that colours a cell.
    """
    whole = table.assign(part=table["part"].fillna("")).groupby(
        ["source", "target", "part"], as_index=False, sort=False
    )
    cells = pd.DataFrame(whole[value].sum())
    edges, parts = (pd.DataFrame(cells[(cells["part"] == "") == is_edge]) for is_edge in (True, False))
    nodes = sorted({*edges["source"], *edges["target"]}, key=node_place)
    charts = []
    for part, x, order, columns in (
        (edges, "target", [n for n in nodes if n in set(edges["target"])], "to"),
        (parts, "part", list(dict.fromkeys(parts["part"])), "part"),
    ):
        if not len(part):
            continue
        rows, numbers = sorted(set(part["source"]), key=node_place), part[value].tolist()
        charts.append(
            matrix_heatmap(
                part,
                x=x,
                y="source",
                color=value,
                x_order=order,
                y_order=rows,
                x_title=columns,
                y_title="from" if part is edges else "layer",
                color_title=value,
                domain=(min(0.0, *numbers), max(0.0, *numbers)),
                text=False,
                cell=24 if len(rows) <= 20 else 10,
            )
        )
    return alt.vconcat(*charts, spacing=30).resolve_scale(color="independent")
