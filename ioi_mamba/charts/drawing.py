"""The few kinds of chart the experiments share, in the house theme. Builders take tidy tables and never a model."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import altair as alt
import pandas as pd

from ioi_mamba.charts.theme import DIVERGING, EFFECT, EFFECTS, HELD_OUT, PLAIN, PLOT_WIDTH, SEQUENTIAL, SIGNED
from ioi_mamba.errors import InputError

MAX_ROWS = 5000  # of one data set
HALF = PLOT_WIDTH // 2 - 40  # pixels of each of two charts beside each other
NEGATIVE = 0.05  # of the largest: values above minus this are shown as 0, not as a colour of their own
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


def effect_scale(values: Any, largest: float | None = None) -> alt.Scale:
    """From transparent at 0 to orange where no value is clearly below 0, else as `diverging_scale`."""
    scale = diverging_scale(values, largest)
    top = scale.domain[1]
    if len(values) and float(values.min()) < -NEGATIVE * top:
        return scale
    return alt.Scale(domain=[0, top], range=list(EFFECTS), interpolate="rgb", clamp=True)


def _color(name: str, scale: alt.Scale, title: str, height: float = 120) -> alt.Color:
    """A colour with its legend beside the chart, which names both ends of the scale and its middle."""
    low, high = scale.domain
    legend = alt.Legend(
        orient="right",
        gradientLength=max(60, min(120, height - 30)),
        gradientThickness=12,
        titleLimit=150,
        values=[low, (low + high) / 2, high],
        format=".2~f",
    )
    return alt.Color(f"{name}:Q", scale=scale, title=textwrap.wrap(title, 16), legend=legend)


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
    width: int = PLOT_WIDTH,
) -> alt.LayerChart:
    """Layer by position; of several values of `facet` one is shown, which a reader chooses, all on one scale.

    table: at most one row for each (facet, y, x); a column `changed` says where the prompts of a pair differ, which is marked
    above the columns and names the choices. labels: the column with the text below each position, such as "n1" or a token;
    None writes the position itself. largest: the magnitude at which colours end; default the largest of the table. Tooltips
    show all of these columns, `n` and those of `tooltip`. A click chooses a cell. Of panels with more than 5,000 cells the
    strongest values of `y` are drawn, and the title says how many of how many. Raises InputError for a missing column.
    """
    cells = _Cells.of(table, x, y, color, facet, labels, tooltip)
    names = _choices(cells.data, facet, labels or x)
    chosen = alt.param(
        name=CHOICE,
        value=next(iter(names)),
        bind=alt.binding_radio(options=list(names), labels=list(names.values()), name="changed "),
    )
    picked = alt.selection_point(name="picked", fields=[y, cells.below], on="click", empty=False, clear="dblclick")
    layers = []
    for value in names:
        part = cells.data if facet is None else cells.data[cells.data[facet] == value].drop(columns=facet)
        constant = {} if facet is None else {facet: json.dumps(str(value))}
        shown = f"{CHOICE} === {json.dumps(str(value))}" if len(names) > 1 else "true"
        squares, changed = _squares(cells, check_size(part), color_title or color, largest, width)
        stroke = alt.when(picked).then(alt.value("currentColor")).otherwise(alt.value("rgba(128,128,128,0.15)"))
        squares = squares.encode(
            stroke=stroke, strokeWidth=alt.when(picked).then(alt.value(2.5)).otherwise(alt.value(0.5))
        )
        squares = squares.add_params(picked) if not layers else squares
        layers += [
            each.transform_filter(shown).transform_calculate(**constant)
            for each in (squares, changed)
            if each is not None
        ]
    whole = alt.layer(*layers).properties(width=width, height=cells.height, **_heading(cells, table, y, title))
    return whole.add_params(chosen) if len(names) > 1 else whole


def position_panels(
    table: pd.DataFrame,
    *,
    x: str = "position",
    y: str = "layer",
    color: str = "effect",
    facet: str = "corruption",
    labels: str | None = "label",
    title: str = "",
    color_title: str | None = None,
    tooltip: Sequence[str] = (),
    columns: int = 2,
) -> alt.ConcatChart:
    """As `position_heatmap`, every value of `facet` as a panel of its own beside the others."""
    cells = _Cells.of(table, x, y, color, facet, labels, tooltip)
    panels = []
    for value in dict.fromkeys(cells.data[facet]):
        part = check_size(cells.data[cells.data[facet] == value].drop(columns=facet))
        squares, changed = _squares(cells, part, color_title or color, None, PLOT_WIDTH // columns - 60)
        both = [
            each.transform_calculate(**{facet: json.dumps(str(value))})
            for each in (squares, changed)
            if each is not None
        ]
        panels.append(
            alt.layer(*both).properties(width=PLOT_WIDTH // columns - 60, height=cells.height, title=str(value))
        )
    whole = alt.concat(*panels, columns=columns, spacing=24).resolve_scale(color="shared")
    return whole.properties(**_heading(cells, table, y, title))


CHOICE = "shown"
"""The parameter that says which panel of several is shown; a page keeps it the same in all charts."""
CHANGED = "changed"


class _Cells(NamedTuple):
    """What a heatmap by position is drawn of. below: the column with the text below each position, order: its values."""

    data: pd.DataFrame
    x: str
    y: str
    color: str
    facet: str | None
    labels: str | None
    below: str
    order: list[str]
    tooltip: Sequence[str]
    height: float

    @classmethod
    def of(cls, table, x, y, color, facet, labels, tooltip) -> _Cells:
        _with_columns(table, (x, y, color, facet, labels))
        slim = _slim(strongest(table, color, y, facet), (facet, y, x, labels, color, "n", CHANGED, *tooltip))
        names, order = _position_names(slim, x, labels)
        own = labels is not None and names.equals(slim[labels])
        data, below = (slim, labels) if own else (slim.assign(_position=names), "_position")
        rows = len(set(data[y]))
        return cls(data, x, y, color, facet, labels, below, order, tooltip, max(60, min(420, rows * 20)))


def _choices(data: pd.DataFrame, facet: str | None, name: str) -> dict[str, str]:
    """The values of the facet, each with the word for its choice: what is changed in it, where that tells them apart."""
    if facet is None:
        return {"": ""}
    values = list(dict.fromkeys(map(str, data[facet])))
    if CHANGED in data:
        of = (
            data[data[CHANGED].eq(True)]
            .groupby(facet, sort=False)[name]
            .agg(lambda each: ", ".join(map(str, dict.fromkeys(each))))
        )
        words = [str(of.get(value, value)) for value in values]
        if len(set(words)) == len(values):
            return dict(zip(values, words, strict=True))
    return dict(zip(values, values, strict=True))


def _heading(cells: _Cells, table: pd.DataFrame, y: str, title: str) -> dict[str, Any]:
    left_out = how_many(len(set(cells.data[y])), table[y].nunique(), f"{y}s")
    return {"title": alt.Title(title, subtitle=left_out) if left_out else title} if title or left_out else {}


def _squares(
    cells: _Cells, part: pd.DataFrame, color_title: str, largest: float | None, width: int
) -> tuple[alt.Chart, alt.Chart | None]:
    """The squares of one panel, and the marks above what is changed in it, if it says that."""
    rows = sorted(set(cells.data[cells.y]))
    scale = effect_scale(cells.data[cells.color], largest)
    room, longest = width / max(1, len(cells.order)), max(map(len, cells.order), default=1)
    angle = 0 if room > 6.2 * min(longest, 9) else -90
    small = {} if room >= 13 or angle == 0 else {"labelOverlap": "greedy"}
    x = alt.X(
        f"{cells.below}:N",
        sort=cells.order,
        title=None,
        scale=alt.Scale(domain=cells.order),
        axis=alt.Axis(labelAngle=angle, ticks=False, domain=False, labelLimit=90, **({"labelOverlap": False} | small)),
    )
    names = (cells.facet, cells.y, cells.x, cells.labels, cells.color, "n", *cells.tooltip)
    tips = _tooltips(part.assign(**({} if cells.facet is None else {cells.facet: ""})), names)
    squares = (
        alt.Chart(part)
        .mark_rect(cursor="pointer")
        .encode(
            x=x,
            y=alt.Y(
                f"{cells.y}:O",
                title=cells.y,
                scale=alt.Scale(domain=rows),
                axis=alt.Axis(values=rows[:: -(-len(rows) // 16)], ticks=False, domain=False),
            ),
            color=_color(cells.color, scale, color_title, cells.height),
            tooltip=tips,
        )
    )
    if CHANGED not in part or not part[CHANGED].eq(True).any():
        return squares, None
    at = part[part[CHANGED].eq(True)].drop_duplicates(cells.below)[[cells.below]]
    above = alt.Chart(at).mark_text(text="\u25bc changed", align="center", baseline="bottom", y=-3, fontSize=12)
    return squares, above.encode(x=x)


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
    colors: Sequence[str] = SEQUENTIAL,
    cell: int = 44,
    tooltip: Sequence[str] = (),
    columns: int = 2,
) -> alt.FacetChart | alt.LayerChart:
    """A matrix of squares of `cell` pixels, its values written in them if `text`; one panel for each `facet`.

    A square without a value is empty.

    colors: from nothing to the most. domain: the values at which colours end; a scale that reaches below 0 is centred at 0. Orders default to
    those of the table. Raises InputError for a missing column and for more than 5,000 rows.
    """
    table = _slim(_columns(table, (x, y, color, facet)), (facet, y, x, color, "n", *tooltip))
    x_order = list(x_order if x_order is not None else dict.fromkeys(table[x]))
    y_order = list(y_order if y_order is not None else dict.fromkeys(table[y]))
    if domain[0] < 0:
        scale = diverging_scale(table[color], max(-domain[0], domain[1]))
        scale.range = list(SIGNED)
    else:
        scale = alt.Scale(domain=list(domain), range=list(colors), interpolate="rgb", clamp=True)
    base = alt.Chart(table).encode(
        x=alt.X(
            f"{x}:N",
            sort=x_order,
            title=x_title or x,
            axis=alt.Axis(
                labelAngle=0 if cell > 6.2 * max(map(len, map(str, x_order)), default=1) else -90,
                ticks=False,
                domain=False,
                labelLimit=80,
            ),
        ),
        y=alt.Y(f"{y}:N", sort=y_order, title=y_title or y, axis=alt.Axis(ticks=False, domain=False, labelLimit=160)),
        tooltip=_tooltips(table, (facet, y, x, color, "n", *tooltip)),
    )
    squares = base.mark_rect(stroke="currentColor", strokeOpacity=0.06, strokeWidth=0.5).encode(
        color=_color(color, scale, color_title or color, cell * len(y_order))
    )
    layers = [squares]
    if text:
        written = base.transform_filter(f"isValid(datum[{color!r}])")
        layers.append(written.mark_text(fontSize=12).encode(text=alt.Text(f"{color}:Q", format=text_format)))
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
    """A bar for each row, a dashed line at `baseline`; bars more than 0.1 below the line have the colour of an effect.

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
            color=alt.when(alt.datum[y] < baseline - 0.1).then(alt.value(EFFECT)).otherwise(alt.value(PLAIN)),
            tooltip=_tooltips(table, (x, y, *tooltip)),
        )
    )
    rule = alt.Chart(pd.DataFrame({"baseline": [baseline]})).mark_rule(strokeDash=[5, 4], strokeWidth=1.5)
    rule = rule.encode(y=alt.Y("baseline:Q", scale=vertical))
    heading = alt.Title(title, subtitle=f"dashed line: {baseline_label}, {baseline:.2f}")
    return alt.LayerChart(layer=[bars, rule]).properties(width=width, height=190, title=heading)


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
        colors = alt.Scale(
            domain=order, range=[HELD_OUT if "held" in str(each) else PLAIN for each in order][: len(order)]
        )
        colors = colors if len(order) == 2 and any("held" in str(each) for each in order) else alt.Undefined
        by_color = alt.Color(f"{color}:N", sort=order, scale=colors, title=None, legend=alt.Legend(orient="top"))
        by_shape = alt.Shape(f"{color}:N", sort=order, legend=None)
        line = line.encode(by_color, alt.StrokeDash(f"{color}:N", sort=order, legend=None))
        points = points.encode(by_color, by_shape)
    chart = alt.LayerChart(layer=[line, points]).properties(width=width, height=190)
    return chart.properties(title=title) if title else chart
