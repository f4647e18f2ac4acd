"""Draws one block of a family with every hook name at its place: names and shapes from the sites, places from here."""

from __future__ import annotations

from html import escape
from itertools import pairwise
from typing import NamedTuple

from ioi_mamba.model.family import Family, Writer
from ioi_mamba.model.sites import MODEL_SITES

WIDTH, BOX, TALL, ROW = 1000, 144, 34, 58
STREAM, FIRST, STEP = 88, 272, 158  # the middle of the stream, of the first column, and from a column to the next
HEAD = 30  # pixels of a frame above its first row
STYLE = (
    ".block text{font:11px ui-monospace,monospace;fill:currentColor;text-anchor:middle}"
    ".block .shape{font-size:9.5px;opacity:.7}.block .how{font:italic 10.5px system-ui,sans-serif;text-anchor:start}"
    ".block .said{font:12px system-ui,sans-serif;text-anchor:start}.block .said tspan{font-weight:600}"
    ".block rect{fill:none;stroke:#2f7fc1;rx:5}.block .frame{stroke:currentColor;stroke-opacity:.3;stroke-dasharray:4 4}"
    ".block .stream rect{stroke:#dd6b20}.block path{fill:none;stroke:currentColor;stroke-opacity:.6;marker-end:url(#tip)}"
    ".block .rail{stroke:#dd6b20;stroke-width:3;stroke-opacity:.5;marker-end:none}"
)


class Spot(NamedTuple):
    """Where a site stands: its column and row, and how it is made of what leads to it, in a few words."""

    column: float
    row: float
    how: str = ""


class Arrow(NamedTuple):
    """From one site to another: the sides it leaves and enters by, pixels by which it is moved aside, and above the target."""

    source: str
    target: str
    leaves: str = "bottom"
    enters: str = "top"
    aside: int = 0
    above: int = 18


_BRANCH = {
    "layer_input": Spot(2, 0),
    "normalized_input": Spot(2, 1, "RMSNorm"),
    "in_proj": Spot(2, 2, "in_proj"),
    "skip": Spot(4, 2, "in_proj"),
    "conv_start": Spot(1, 3),
    "conv_slice": Spot(2, 3, "one tap"),
    "conv": Spot(2, 4, "sum, + bias"),
    "ssm_input": Spot(2, 5, "SiLU"),
}
_SCAN = {
    "delta": Spot(1, 8, "softplus"),
    "A": Spot(0, 8, "-exp(A_log)"),
    "A_bar": Spot(0, 9, "exp(delta A)"),
    "B_bar": Spot(3, 9, "delta B"),
    "ssm_write": Spot(2, 10, "B_bar x"),
    "h_start": Spot(1, 11),
    "h": Spot(2, 11, "+ A_bar h"),
    "y": Spot(2, 12, "C h"),
    "ssm_output": Spot(2, 13, "y + D x"),
    "out_proj": Spot(2, 15, "out_proj"),
}
MAMBA_1 = {
    **_BRANCH,
    "delta_1": Spot(1, 6, "x_proj"),
    "B": Spot(3, 6, "x_proj"),
    "C": Spot(4, 6, "x_proj"),
    "delta_2": Spot(1, 7, "dt_proj"),
    **_SCAN,
    "after_skip": Spot(2, 14, "times SiLU(skip)"),
}
MAMBA_2 = {
    **_BRANCH,
    "B": Spot(3, 5, "SiLU"),
    "C": Spot(4, 5, "SiLU"),
    "delta_2": Spot(1, 7, "in_proj, + bias"),
    **_SCAN,
    "dual": Spot(3, 12, "M"),
    "after_skip": Spot(2, 14, "times SiLU(skip), RMSNorm"),
}
_ARROWS = (
    Arrow("layer_input", "normalized_input"),
    Arrow("normalized_input", "in_proj"),
    Arrow("normalized_input", "skip"),
    Arrow("in_proj", "conv_slice"),
    Arrow("conv_start", "conv_slice", "right", "left"),
    Arrow("conv_slice", "conv"),
    Arrow("conv", "ssm_input"),
    Arrow("delta_2", "delta"),
    Arrow("A", "A_bar"),
    Arrow("delta", "A_bar", enters="right"),
    Arrow("B", "B_bar"),
    Arrow("delta", "B_bar", enters="left"),
    Arrow("ssm_input", "ssm_write"),
    Arrow("B_bar", "ssm_write", enters="right"),
    Arrow("ssm_write", "h"),
    Arrow("A_bar", "h", aside=-40),
    Arrow("h_start", "h", "right", "left"),
    Arrow("h", "y"),
    Arrow("y", "ssm_output"),
    Arrow("ssm_input", "ssm_output", "right", "right", 10),
    Arrow("ssm_output", "after_skip"),
    Arrow("skip", "after_skip", "right", "right", 8),
    Arrow("after_skip", "out_proj"),
)
ARROWS_1 = (
    *_ARROWS,
    Arrow("ssm_input", "delta_1"),
    Arrow("ssm_input", "B"),
    Arrow("ssm_input", "C"),
    Arrow("delta_1", "delta_2"),
    Arrow("C", "y", enters="right"),
)
ARROWS_2 = (
    *_ARROWS,
    Arrow("normalized_input", "delta_2", "left", "left", 8),
    Arrow("conv", "B"),
    Arrow("conv", "C"),
    Arrow("A_bar", "dual", aside=-40),
    Arrow("B_bar", "dual"),
    Arrow("C", "dual", enters="right"),
    Arrow("C", "y", aside=40, above=8),
    Arrow("dual", "y", "left", "right"),
)


def places(family: Family) -> tuple[dict[str, Spot], tuple[Arrow, ...]]:
    """Where the sites of a family's mixer stand, and the arrows between them."""
    sites = {site.name: site for site in family.mixer.sites}
    spots, arrows = (MAMBA_2, ARROWS_2) if "dual" in sites else (MAMBA_1, ARROWS_1)
    if sites["B"].stage.endswith("norm"):
        normed = {name: spots[name]._replace(how="x_proj, RMSNorm") for name in ("B", "C")}
        spots = spots | normed | {"delta_2": spots["delta_2"]._replace(how="RMSNorm, dt_proj")}
    return spots, arrows


def draw(family: Family) -> str:
    """The picture as SVG: the residual stream from top to bottom at the left, and beside it what reads it and adds to it."""
    parts: list[str] = []
    stream, y = [("embed", 16)], 16 + ROW
    stream.append(("resid_pre", y))
    groups = _groups(family)
    for number, writers in enumerate(groups):
        if number:
            stream.append(("resid_mid", y))
        read = y
        y += ROW
        for writer, said in writers:
            inside, height = _sub_block(family, writer, said, y, read)
            parts += inside
            y += height + 24
    stream += [("resid_post", y), ("norm", y + ROW), ("logits", y + 2 * ROW)]
    named = [name for name, _ in stream]
    assert ("resid_mid" in named) == ("resid_mid" in family.sites), "the sub-blocks are not where the sites say"
    height = y + 2 * ROW + TALL + 16
    rail = "".join(
        f'<path class="rail" d="M{STREAM} {above + TALL}V{below}"/>' for (_, above), (_, below) in pairwise(stream)
    )
    boxes = "".join(_box(family, name, STREAM, top) for name, top in stream)
    said = [("RMSNorm", y + ROW), ("head", y + 2 * ROW)]
    hows = "".join(f'<text class="how" x="{STREAM + 6}" y="{top - 8}">{how}</text>' for how, top in said)
    label = f"One block of a {family.label}: every hook name at its place in the flow of data"
    tip = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" style="fill:currentColor;stroke:none;marker-end:none"/></marker></defs>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="block" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">'
        f"<style>{STYLE}</style>{tip}{rail}{''.join(parts)}<g class='stream'>{boxes}</g>{hows}</svg>"
    )


def _groups(family: Family) -> list[list[tuple[Writer, str]]]:
    """The sub-blocks of all kinds of block in order, those that read the same stream together, with what is said of each."""
    found: list[dict[str, Writer]] = []
    for kind in family.kinds.values():
        for number, group in enumerate(kind.writers):
            if number == len(found):
                found.append({})
            known = {name for each in found for name in each}
            found[number] |= {writer.name: writer for writer in group if writer.name not in known}
    return [[(writer, _said(family, writer)) for writer in group.values()] for group in found]


def _said(family: Family, writer: Writer) -> str:
    """In which blocks a sub-block stands, and what stands beside it."""
    having = [name for name, kind in family.kinds.items() if writer in kind.all_writers()]
    beside = {
        other.name
        for kind in family.kinds.values()
        for group in kind.writers
        for other in group
        if writer in group and other != writer
    }
    said = "in every block" if len(having) == len(family.kinds) else f"in blocks of the kind {', '.join(having)}"
    said += f", beside {' and '.join(sorted(beside))}" if beside else ""
    shared = [name for name in having if family.kinds[name].attends and "attn_in" not in family.kinds[name].sites]
    if writer.name == "mamba" and shared:
        said += (
            f"; in those of the kind {', '.join(shared)} attention reads layer_input too, and the mixer reads the sum"
        )
    return said


def _sub_block(family: Family, writer: Writer, said: str, top: int, read: int) -> tuple[list[str], int]:
    """What is drawn of one sub-block, and how tall that is. read: where the stream is that it reads."""
    if writer.name == "mamba":
        spots, arrows = places(family)
    else:
        spots = {writer.reads: Spot(1, 0), writer.adds: Spot(3, 0, f"norm, {writer.name}")}
        arrows = (Arrow(writer.reads, writer.adds, "right", "left"),)
    rows = max(spot.row for spot in spots.values()) + 1
    height = HEAD + rows * ROW - (ROW - TALL) + 14
    at = {name: (FIRST + spot.column * STEP, top + HEAD + spot.row * ROW) for name, spot in spots.items()}
    parts = [
        f'<rect class="frame" x="190" y="{top}" width="{WIDTH - 192}" height="{height:.0f}"/>',
        f'<text class="said" x="200" y="{top + 18}"><tspan>{writer.name}</tspan>, {escape(said)}</text>',
    ]
    parts += [_line(at[arrow.source], at[arrow.target], arrow) for arrow in arrows]
    x, y = at[writer.reads]
    parts.append(f'<path d="M{STREAM} {y + TALL / 2}H{x - BOX / 2}"/>')
    x, y = at[writer.adds]
    # Where input and output stand in one row, the way back to the stream goes below them.
    back = f"M{x - BOX / 2} {y + TALL / 2}H" if y > at[writer.reads][1] else f"M{x} {y + TALL}V{y + TALL + 9}H"
    parts.append(f'<path d="{back}{STREAM + 2}"/>')
    for name, (x, y) in at.items():
        parts.append(_box(family, name, x, y))
        if spots[name].how:
            left, above = (x + 5, y - 6) if writer.name == "mamba" else (x - STEP - 46, y + 12)
            parts.append(f'<text class="how" x="{left}" y="{above}">{escape(spots[name].how)}</text>')
    return parts, round(height)


def _line(source: tuple[float, float], target: tuple[float, float], arrow: Arrow) -> str:
    """An arrow by right angles."""
    (x, y), (to_x, to_y) = source, target
    half, middle = BOX / 2, to_y + TALL / 2
    if arrow.leaves == "bottom" and arrow.enters == "top":
        to_x += arrow.aside
        turn = f"V{to_y - arrow.above}H{to_x}" if x != to_x else ""
        path = f"M{x} {y + TALL}{turn}V{to_y}"
    elif arrow.leaves == "bottom":
        path = f"M{x} {y + TALL}V{middle}H{to_x + (half if arrow.enters == 'right' else -half)}"
    elif arrow.leaves == arrow.enters:
        sign = 1 if arrow.leaves == "right" else -1
        lane = sign * (max(sign * x, sign * to_x) + half + arrow.aside)
        path = f"M{x + sign * half} {y + TALL / 2}H{lane}V{middle}H{to_x + sign * half}"
    else:
        sign = 1 if arrow.leaves == "right" else -1
        path = f"M{x + sign * half} {y + TALL / 2}H{to_x - sign * half}"
    return f'<path data-from="{arrow.source}" data-to="{arrow.target}" d="{path}"/>'


def _box(family: Family, name: str, x: float, y: float) -> str:
    """A site: its hook name and shape; where it is and what it means when it is pointed at."""
    if name in MODEL_SITES:
        shape, meaning = MODEL_SITES[name]
        spelled, place = f"hook_{name}", ""
    else:
        site = family.sites[name]
        spelled, shape, meaning, place = f"hook_{site.spelled}", site.shape, site.meaning, f" ({site.place})"
    return (
        f"<g><title>{escape(meaning + place)}</title>"
        f'<rect x="{x - BOX / 2}" y="{y}" width="{BOX}" height="{TALL}"/>'
        f'<text x="{x}" y="{y + 15}">{escape(spelled)}</text><text class="shape" x="{x}" y="{y + 28}">[{escape(shape)}]</text></g>'
    )
