"""The figure at the top of a page: tokens from left to right, layers upwards, and what matters where; one SVG a view.

Geometry alone: what is drawn comes from `ioi_mamba.report.story`. Layers without anything are folded into one thin row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jinja2

from ioi_mamba.charts.circuit_axes import node_place
from ioi_mamba.charts.theme import EFFECT, HELPS, KEPT
from ioi_mamba.experiments.story import Kind
from ioi_mamba.report.story import LIT, ROWS, Mark, View, says

CHARACTER, FONT = 8.5, 14
"""Pixels: the width of a character of the monospaced font, and its size."""
VALUE_CHARACTER = 7.3
"""Pixels: the width of a character of the smaller numbers in cells."""
LEFT, RIGHT, TOP, BOTTOM = 84, 30, 46, 62
"""Pixels around the rows: for names of layers, for bows, for the answer, for two lines of tokens."""
LAYERS_HEIGHT, LOWEST, HIGHEST, FOLDED = 300, 20, 66, 16
"""Pixels: about what all layers may take, the ends of a layer's height, and the height of a folded row."""
CLEAREST = 0.25
"""The opacity of the weakest mark that is drawn; the strongest has 1."""


class Row(NamedTuple):
    """One layer, or several that are folded. y: its middle."""

    layers: list[int]
    y: float
    height: float
    folded: bool

    @property
    def name(self) -> str:
        ends = f"{self.layers[0]}–{self.layers[-1]}"
        return f"layer {self.layers[0]}" if len(self.layers) == 1 else f"layers {ends}"


class Column(NamedTuple):
    """One token. x: its middle."""

    x: float
    width: float


class Shape(NamedTuple):
    """One mark as it is drawn. number: of the mark among those of its view; path: of SVG; style: its presentation attributes."""

    number: int
    kind: str
    layers: list[int]
    path: str
    style: str
    text: tuple[float, float, str] | None
    says: str


@dataclass(frozen=True)
class Figure:
    """A view, laid out. left_out: marks on layers that had to be folded, the weakest."""

    view: View
    width: float
    height: float
    columns: list[Column]
    rows: list[Row]
    shapes: list[Shape]
    left_out: int

    @property
    def kinds(self) -> list[str]:
        """Of the marks that are drawn."""
        return [shape.kind for shape in self.shapes]

    def svg(self, alone: bool = False, title: str = "") -> str:
        """As SVG; alone: as a file of its own, black on white, with a title."""
        return _template().render(figure=self, alone=alone, title=title, font=FONT, top=TOP, left=LEFT)


def drawn(view: View, n_layers: int) -> Figure:
    """The figure of a view of a model of so many layers."""
    columns, x = [], float(LEFT)
    for token in view.tokens:
        texts = ["BOS" if token.label == "BOS" else token.shown, *([token.corrupted.strip()] if token.changed else [])]
        width = max(24.0, CHARACTER * max(map(len, texts)) + 8)
        columns.append(Column(x + width / 2, width))
        x += width
    rows, shown = _rows(view, n_layers)
    height = TOP + sum(row.height for row in rows) + BOTTOM
    at = {layer: row.y for row in rows for layer in row.layers}
    height_of = {layer: row.height for row in rows for layer in row.layers}
    ends = {"embed": height - BOTTOM + 6, "output": TOP - 20}

    def y_of(node: str) -> float:
        return ends[node] if node in ends else at[int(node_place(node)[0])]

    order = [Kind.EDGE, Kind.CARRIES, Kind.READS, Kind.MOVES, Kind.WRITES]
    top = {kind: max((abs(mark.value) for mark in view.of(kind)), default=1.0) or 1.0 for kind in Kind}
    shapes = []
    for k, mark in sorted(enumerate(view.marks), key=lambda pair: order.index(pair[1].kind)):
        # A slice that takes from its own token moves nothing; it stands among the parts of its layer.
        if mark not in shown or (mark.kind == Kind.MOVES and mark.start == mark.end):
            continue
        path, style = _path(mark, columns, y_of, height_of.get(int(mark.layer) if mark.layer < 1e9 else -1, 0.0), top)
        column, text = columns[mark.end], None
        if mark.kind == Kind.READS and abs(mark.value) >= 0.4 and height_of[int(mark.layer)] >= LOWEST:
            number = f"{mark.value * 100:.0f}"
            # A number wider than its cell would run into the next one; pointing at the cell says it.
            if VALUE_CHARACTER * len(number) <= column.width - 6:
                text = (column.x, y_of(mark.target) + 4, number)
        layers = [int(node_place(node)[0]) for node in dict.fromkeys((mark.source, mark.target)) if node not in ends]
        shapes.append(Shape(k, str(mark.kind), layers, path, style, text, says(view, mark)))
    left_out = len([mark for mark in view.marks if mark not in shown])
    return Figure(view, x + RIGHT, height, columns, rows, shapes, left_out)


def _rows(view: View, n_layers: int) -> tuple[list[Row], set[Mark]]:
    """The rows from the top, and the marks that are on rows of their own."""
    strongest: dict[int, float] = {}
    top_edge = max((abs(mark.value) for mark in view.of(Kind.EDGE)), default=1.0) or 1.0
    for mark in view.marks:
        # Edges are scores and the others effects; an edge makes a layer worth a row where nothing else does.
        size = abs(mark.value) if mark.kind != Kind.EDGE else LIT * abs(mark.value) / top_edge
        for node in (mark.source, mark.target):
            if node not in ("embed", "output"):
                layer = int(node_place(node)[0])
                strongest[layer] = max(size, strongest.get(layer, 0.0))
    n_layers = max([n_layers, *(layer + 1 for layer in strongest)])
    own = sorted(sorted(strongest, key=lambda layer: -strongest[layer])[:ROWS])
    runs: list[list[int]] = []
    for layer in range(n_layers):
        if layer not in own and runs and runs[-1][-1] not in own:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    n_folded = sum(run[0] not in own for run in runs)
    each = (LAYERS_HEIGHT - FOLDED * n_folded) / max(1, len(own))
    each = min(HIGHEST, max(LOWEST, each))
    rows, y = [], float(TOP)
    for run in reversed(runs):
        height = each if run[0] in own else FOLDED
        rows.append(Row(run, y + height / 2, height, run[0] not in own))
        y += height
    is_own = lambda node: node in ("embed", "output") or int(node_place(node)[0]) in own
    return rows, {mark for mark in view.marks if is_own(mark.source) and is_own(mark.target)}


def _path(mark: Mark, columns: list[Column], y_of, height: float, top: dict[Kind, float]) -> tuple[str, str]:
    """The path of a mark and its presentation attributes."""
    column, y = columns[mark.end], y_of(mark.target)
    strength = CLEAREST + (1 - CLEAREST) * min(1.0, abs(mark.value) / top[mark.kind])
    color = EFFECT if mark.value > 0 else HELPS
    half, quarter = column.width / 2 - 3, min(13.0, height * 0.24)
    if mark.kind == Kind.READS:
        return _box(
            column.x - half, y - quarter, 2 * half, 2 * quarter
        ), f'fill="{color}" fill-opacity="{strength:.2f}"'
    if mark.kind == Kind.CARRIES:
        box = _box(column.x - column.width / 2, y + quarter + 2, column.width, max(3.0, quarter * 0.6))
        return box, f'fill="{color}" fill-opacity="{strength:.2f}"'
    if mark.kind == Kind.WRITES:
        rise = min(11.0, height * 0.22)
        return (
            f"M{column.x:.1f} {y - quarter - 1 - rise:.1f}l7 {rise:.1f}h-14z",
            f'fill="{color}" fill-opacity="{strength:.2f}"',
        )
    if mark.kind == Kind.MOVES:
        x = columns[mark.start].x
        path = f"M{x:.1f} {y:.1f}Q{(x + column.x) / 2:.1f} {y - min(44.0, height * 0.8):.1f} {column.x:.1f} {y:.1f}m-5 -6l5 6l-7 1"
        width = 1 + 2 * min(1.0, abs(mark.value) / top[mark.kind])
        return path, f'fill="none" stroke="{color}" stroke-opacity="{strength:.2f}" stroke-width="{width:.1f}"'
    begin = y_of(mark.source)
    bow = column.x + min(column.width * 0.75, 8 + abs(begin - y) * 0.12)
    path = f"M{column.x:.1f} {begin:.1f}C{bow:.1f} {begin:.1f} {bow:.1f} {y:.1f} {column.x:.1f} {y:.1f}"
    width = 1 + 3 * min(1.0, abs(mark.value) / top[Kind.EDGE])
    return path, f'fill="none" stroke="{KEPT}" stroke-opacity="{max(0.45, strength):.2f}" stroke-width="{width:.1f}"'


def _box(x: float, y: float, width: float, height: float) -> str:
    return f"M{x:.1f} {y:.1f}h{width:.1f}v{height:.1f}h{-width:.1f}z"


def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("ioi_mamba.report")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("hero.svg.j2")
