"""The few kinds of chart the experiments share, in the house theme. Builders take tidy tables and never a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from ioi_mamba.charts.theme import BLUE, DIVERGING, ORANGE, PLOT_WIDTH, SEQUENTIAL
from ioi_mamba.errors import InputError

MAX_ROWS = 5000  # of one data set
MAX_CELLS = 3 * MAX_ROWS  # of all panels of a chart, so that a page can hold several


def check_size(table: pd.DataFrame) -> pd.DataFrame:
    """The table itself. Raises InputError for one of more rows than a chart's data set should have."""
    if len(table) > MAX_ROWS:
        raise InputError(f"A chart of {len(table)} rows is too large: aggregate to {MAX_ROWS} at most.")
    return table


def strongest(table: pd.DataFrame, value: str, by: str | None = None, panels: str | None = None) -> pd.DataFrame:
    """As much of a table as a chart may have: the rows with the largest |value|, in their order.

    by: rows that share a value of this column are kept or left out together, in all panels alike. panels: each value of
    this column is a panel with a data set of its own.
    """
    panel = [] if panels is None else [table[panels]]
    most = MAX_ROWS if panels is None else min(MAX_ROWS, MAX_CELLS // max(1, table[panels].nunique()))
    if table.empty or (table.groupby(panel).size().max() if panel else len(table)) <= most:
        return table
    groups = pd.Series(range(len(table)), table.index) if by is None else table[by]
    rows_of_a_group = int(table.groupby([groups, *panel]).size().max())
    order = table[value].abs().groupby(groups).max().sort_values(ascending=False, kind="stable").index
    return table[groups.isin(order[: max(1, most // rows_of_a_group)])]


def how_many(drawn: int, there: int, what: str) -> list[str]:
    """The line for below a title where `strongest` left something out: "the strongest 50 of 64 layers are drawn"."""
    return [] if drawn == there else [f"the strongest {drawn} of {there} {what} are drawn"]


def _with_columns(table: pd.DataFrame, names: Sequence[str | None]) -> pd.DataFrame:
    missing = [name for name in names if name is not None and name not in table]
    if missing:
        raise InputError(f"The table has no column {missing[0]!r}; it has {', '.join(map(str, table.columns))}.")
    return table


def _columns(table: pd.DataFrame, names: Sequence[str | None]) -> pd.DataFrame:
    return check_size(_with_columns(table, names))


def _slim(table: pd.DataFrame, names: Sequence[str | None]) -> pd.DataFrame:
    """The columns of these names, as far as they are there, so that a page of many cells stays small."""
    return rounded(table[[name for name in dict.fromkeys(names) if name is not None and name in table]])


def rounded(table: pd.DataFrame) -> pd.DataFrame:
    """Floats with five digits, which is more than is seen."""
    floats = [name for name in table if pd.api.types.is_float_dtype(table[name])]
    return table.assign(
        **{
            name: [float(f"{value:.5g}") for value in table[name].to_numpy(float, na_value=float("nan"))]
            for name in floats
        }
    )


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
) -> alt.FacetChart | alt.ConcatChart | alt.Chart:
    """Layer by position, one panel for each value of `facet`, all panels on one scale centred at 0.

    table: at most one row for each (facet, y, x). labels: the column with the text below each position, such
    as "n1" or a token; None writes the position itself. largest: the magnitude at which colours end; default
    the largest of the table. Tooltips show all of these columns, `n` and those of `tooltip`. The report lays
    out as many panels side by side as fit; elsewhere there are `columns`. Of panels with more than 5,000 cells the
    strongest values of `y` are drawn, and the title says how many of how many. Raises InputError for a missing column.
    """
    _with_columns(table, (x, y, color, facet, labels))
    whole = table
    table = _slim(strongest(table, color, y, facet), (facet, y, x, labels, color, "n", *tooltip))
    names, order = _position_names(table, x, labels)
    own = labels is not None and names.equals(table[labels])
    data, below = (table, labels) if own else (table.assign(_position=names), "_position")
    rows = len(set(data[y]))
    shown = sorted(set(data[y]))[:: -(-rows // 16)]
    scale = diverging_scale(data[color], largest)
    cell = panel_width // max(1, len(order))
    labels_that_fit = {} if cell > 9 else {"labelFontSize": 7, "labelOverlap": "greedy" if cell < 7 else False}
    left_out = how_many(rows, whole[y].nunique(), f"{y}s")
    heading = {"title": alt.Title(title, subtitle=left_out) if left_out else title} if title or left_out else {}
    base = (
        alt.Chart()
        .mark_rect(stroke="currentColor", strokeOpacity=0.06, strokeWidth=0.5)
        .encode(
            x=alt.X(
                f"{below}:N",
                sort=order,
                title="position",
                axis=alt.Axis(labelAngle=-90, ticks=False, domain=False, labelLimit=90, **labels_that_fit),
            ),
            y=alt.Y(f"{y}:O", title=y, axis=alt.Axis(values=shown, ticks=False, domain=False)),
            color=_color(color, scale, color_title or color),
            tooltip=_tooltips(data, (facet, y, x, labels, color, "n", *tooltip)),
        )
        .properties(width=panel_width, height=max(120, min(420, rows * 18)))
    )
    if facet is None:
        return base.properties(data=check_size(data), **heading)
    values = list(dict.fromkeys(data[facet]))
    if len(data) <= MAX_ROWS:
        panels = base.properties(data=data).facet(
            alt.Facet(f"{facet}:N", sort=values, title=None, header=alt.Header(labelPadding=6)),
            columns=columns,
            spacing=24,
        )
        return panels.resolve_axis(x="independent", y="independent").properties(**heading)
    # Together they are too many for one data set: each panel has its own, in which the facet is a constant.
    parts = [
        base.properties(
            data=check_size(data[data[facet] == value].drop(columns=facet)), title=str(value)
        ).transform_calculate(**{facet: json.dumps(str(value))})
        for value in values
    ]
    return alt.concat(*parts, columns=columns, spacing=24).resolve_scale(color="shared").properties(**heading)


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
    table = _slim(_columns(table, (x, y, color, facet)), (facet, y, x, color, "n", *tooltip))
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
