"""The few kinds of chart the experiments share, in the house theme. Builders take tidy tables and never a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from .errors import InputError
from .theme import BLUE, DIVERGING, ORANGE, PLOT_WIDTH, SEQUENTIAL

MAX_ROWS = 5000


def check_size(table: pd.DataFrame) -> pd.DataFrame:
    """The table itself. Raises InputError for one of more rows than a page should carry."""
    if len(table) > MAX_ROWS:
        raise InputError(f"A chart of {len(table)} rows is too large: aggregate to {MAX_ROWS} at most.")
    return table


def _columns(table: pd.DataFrame, names: Sequence[str | None]) -> pd.DataFrame:
    missing = [name for name in names if name is not None and name not in table]
    if missing:
        raise InputError(f"The table has no column {missing[0]!r}; it has {', '.join(map(str, table.columns))}.")
    return check_size(table)


def _tooltips(table: pd.DataFrame, names: Sequence[str | None]) -> list[alt.Tooltip]:
    shown = dict.fromkeys(name for name in names if name is not None and name in table)
    return [
        alt.Tooltip(f"{name}:Q", format=".3f") if pd.api.types.is_float_dtype(table[name]) else alt.Tooltip(f"{name}:N")
        for name in shown
    ]


def diverging_scale(values: Any, largest: float | None = None) -> alt.Scale:
    """Blue below 0, transparent at 0, orange above, as far as the largest finite magnitude (or `largest`)."""
    magnitudes = values[values.abs() < float("inf")].abs()
    top = largest or (float(magnitudes.max()) if len(magnitudes) and magnitudes.max() > 0 else 1.0)
    return alt.Scale(domain=[-top, top], range=list(DIVERGING), interpolate="rgb", clamp=True)


def _color(name: str, scale: alt.Scale, title: str) -> alt.Color:
    legend = alt.Legend(orient="top", direction="horizontal", gradientLength=220, gradientThickness=12, titleLimit=420)
    return alt.Color(f"{name}:Q", scale=scale, title=title, legend=legend)


def _position_names(table: Any, x: str, labels: str | None) -> tuple[Any, list[str]]:
    """What to write below each column of a heatmap, and in which order."""
    if labels is None:
        names = table[x].astype(str)
    else:
        names = table[labels].astype(str)
        if table.groupby(labels)[x].nunique().max() > 1:
            # The same token at two positions must stay two columns.
            names = names + " @" + table[x].astype(str)
    order = table.assign(_name=names).groupby("_name")[x].min().sort_values(kind="stable").index
    return names, list(order)


def position_heatmap(
    table: pd.DataFrame,
    *,
    x: str = "position",
    y: str = "layer",
    color: str = "effect",
    facet: str | None = "corruption",
    labels: str | None = "label",
    title: str = "",
    color_title: str | None = None,
    largest: float | None = None,
    tooltip: Sequence[str] = (),
    columns: int = 2,
    panel_width: int = 280,
) -> alt.FacetChart | alt.Chart:
    """Layer by position, one panel for each value of `facet`, all panels on one scale centred at 0.

    table: at most one row for each (facet, y, x). labels: the column with the text below each position, such
    as "n1" or a token; None writes the position itself. largest: the magnitude at which colours end; default
    the largest of the table. Tooltips show all of these columns, `n` and those of `tooltip`. The report lays
    out as many panels side by side as fit; elsewhere there are `columns`. Raises InputError for a missing
    column and for more than 5,000 rows.
    """
    _columns(table, (x, y, color, facet, labels))
    names, order = _position_names(table, x, labels)
    data = table.assign(_position=names)
    rows = len(set(data[y]))
    shown = sorted(set(data[y]))[:: -(-rows // 16)]
    base = (
        alt.Chart(data)
        .mark_rect(stroke="currentColor", strokeOpacity=0.06, strokeWidth=0.5)
        .encode(
            x=alt.X(
                "_position:N",
                sort=order,
                title="position",
                axis=alt.Axis(labelAngle=-90, ticks=False, domain=False, labelLimit=90),
            ),
            y=alt.Y(f"{y}:O", title=y, axis=alt.Axis(values=shown, ticks=False, domain=False)),
            color=_color(color, diverging_scale(data[color], largest), color_title or color),
            tooltip=_tooltips(data, (facet, y, x, labels, color, "n", *tooltip)),
        )
        .properties(width=panel_width, height=max(120, min(420, rows * 18)))
    )
    if facet is None:
        return base.properties(title=title) if title else base
    panels = base.facet(
        alt.Facet(f"{facet}:N", sort=list(dict.fromkeys(data[facet])), title=None, header=alt.Header(labelPadding=6)),
        columns=columns,
        spacing=24,
    ).resolve_axis(x="independent", y="independent")
    return panels.properties(title=title) if title else panels


def matrix_heatmap(
    table: pd.DataFrame,
    *,
    x: str,
    y: str,
    color: str,
    facet: str | None = None,
    x_order: Sequence[Any] | None = None,
    y_order: Sequence[Any] | None = None,
    x_title: str | None = None,
    y_title: str | None = None,
    color_title: str | None = None,
    domain: tuple[float, float] = (0.0, 1.0),
    text: bool = False,
    text_format: str = ".2f",
    cell: int = 44,
    tooltip: Sequence[str] = (),
    columns: int = 2,
) -> alt.FacetChart | alt.LayerChart:
    """A matrix of squares of `cell` pixels, its values written in them if `text`; one panel for each `facet`.

    A square without a value is empty.

    domain: the values at which colours end; a scale that reaches below 0 is centred at 0. Orders default to
    those of the table. Raises InputError for a missing column and for more than 5,000 rows.
    """
    _columns(table, (x, y, color, facet))
    x_order = list(x_order if x_order is not None else dict.fromkeys(table[x]))
    y_order = list(y_order if y_order is not None else dict.fromkeys(table[y]))
    if domain[0] < 0:
        scale = diverging_scale(table[color], max(-domain[0], domain[1]))
    else:
        scale = alt.Scale(domain=list(domain), range=list(SEQUENTIAL), interpolate="rgb", clamp=True)
    base = alt.Chart(table).encode(
        x=alt.X(
            f"{x}:N",
            sort=x_order,
            title=x_title or x,
            axis=alt.Axis(labelAngle=-90 if cell < 30 else 0, ticks=False, domain=False, labelLimit=80),
        ),
        y=alt.Y(f"{y}:N", sort=y_order, title=y_title or y, axis=alt.Axis(ticks=False, domain=False, labelLimit=80)),
        tooltip=_tooltips(table, (facet, y, x, color, "n", *tooltip)),
    )
    squares = base.mark_rect(stroke="currentColor", strokeOpacity=0.06, strokeWidth=0.5).encode(
        color=_color(color, scale, color_title or color)
    )
    layers = [squares]
    if text:
        written = base.transform_filter(f"isValid(datum[{color!r}])")
        layers.append(written.mark_text(fontSize=11).encode(text=alt.Text(f"{color}:Q", format=text_format)))
    size = {"width": cell * len(x_order), "height": cell * len(y_order)}
    matrix = alt.layer(*layers).properties(**size)
    if facet is None:
        return matrix
    return matrix.facet(
        alt.Facet(f"{facet}:N", sort=list(dict.fromkeys(table[facet])), title=None),
        columns=columns,
        spacing=24,
    ).resolve_axis(x="independent", y="independent")


def bars_with_baseline(
    table: pd.DataFrame,
    *,
    x: str,
    y: str,
    baseline: float,
    baseline_label: str,
    x_title: str | None = None,
    y_title: str | None = None,
    title: str = "",
    domain: tuple[float, float] = (0.0, 1.0),
    tooltip: Sequence[str] = (),
    width: int = PLOT_WIDTH,
) -> alt.LayerChart:
    """A bar for each row, a dashed line at `baseline`; bars more than 0.1 below the line are orange.

    Raises InputError for a missing column and for more than 5,000 rows.
    """
    _columns(table, (x, y))
    shown = sorted(set(table[x]))
    shown = shown[:: -(-len(shown) // 24)]
    vertical = alt.Scale(domain=list(domain))
    bars = (
        alt.Chart(table)
        .mark_bar(cornerRadiusEnd=2)
        .encode(
            x=alt.X(f"{x}:O", title=x_title or x, axis=alt.Axis(labelAngle=0, values=shown, ticks=False)),
            y=alt.Y(f"{y}:Q", title=y_title or y, scale=vertical),
            color=alt.when(alt.datum[y] < baseline - 0.1).then(alt.value(ORANGE)).otherwise(alt.value(BLUE)),
            tooltip=_tooltips(table, (x, y, *tooltip)),
        )
    )
    rule = alt.Chart(pd.DataFrame({"baseline": [baseline]})).mark_rule(strokeDash=[5, 4], strokeWidth=1.5)
    rule = rule.encode(y=alt.Y("baseline:Q", scale=vertical))
    heading = alt.Title(title, subtitle=f"dashed line: {baseline_label}, {baseline:.2f}")
    return alt.LayerChart(layer=[bars, rule]).properties(width=width, height=220, title=heading)


def line_with_points(
    table: pd.DataFrame,
    *,
    x: str,
    y: str,
    color: str | None = None,
    x_title: str | None = None,
    y_title: str | None = None,
    title: str = "",
    domain: tuple[float, float] | None = (0.0, 1.0),
    log_x: bool = False,
    tooltip: Sequence[str] = (),
    width: int = PLOT_WIDTH,
) -> alt.LayerChart:
    """Lines with a point at each row; series differ in colour, dash and shape, so that they print in grey.

    Raises InputError for a missing column and for more than 5,000 rows.
    """
    _columns(table, (x, y, color))
    horizontal = alt.Scale(type="log") if log_x else alt.Scale(nice=False, zero=False)
    integers = pd.api.types.is_integer_dtype(table[x])
    axis = alt.Axis(tickMinStep=1, format="d") if integers else alt.Axis()
    vertical = alt.Scale(zero=False) if domain is None else alt.Scale(domain=list(domain))
    base = alt.Chart(table).encode(
        x=alt.X(f"{x}:Q", title=x_title or x, scale=horizontal, axis=axis),
        y=alt.Y(f"{y}:Q", title=y_title or y, scale=vertical),
        tooltip=_tooltips(table, (color, x, y, *tooltip)),
    )
    line = base.mark_line(strokeWidth=2)
    points = base.mark_point(filled=True, size=50, opacity=1)
    if color is not None:
        order = list(dict.fromkeys(table[color]))
        by_color = alt.Color(f"{color}:N", sort=order, title=None, legend=alt.Legend(orient="top"))
        by_shape = alt.Shape(f"{color}:N", sort=order, legend=None)
        line = line.encode(by_color, alt.StrokeDash(f"{color}:N", sort=order, legend=None))
        points = points.encode(by_color, by_shape)
    chart = alt.LayerChart(layer=[line, points]).properties(width=width, height=220)
    return chart.properties(title=title) if title else chart
