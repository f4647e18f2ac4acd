"""Draws the rooms of the package, and what they import, from the code: docs/architecture.svg.

`python docs/architecture.py` writes the picture and prints how many files, arrows and upward imports there are.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from html import escape
from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent
PICTURE = Path(__file__).parent / "architecture.svg"
WIDTH, ROW, BOX = 800, 46, 34


def layers() -> list[list[str]]:
    """The rooms from top to bottom, those of one layer side by side, as the contract in pyproject.toml has them."""
    (contract,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return [[room.strip() for room in line.split("|")] for line in contract["layers"]]


def imports() -> tuple[int, Counter[tuple[str, str]]]:
    """How many files there are, and how often a file of one room imports one of another."""
    graph = grimp.build_graph("ioi_mamba", cache_dir=None)
    arrows: Counter[tuple[str, str]] = Counter()
    for module in graph.modules:
        for other in graph.find_modules_directly_imported_by(module):
            rooms = [name.split(".")[1] if "." in name else "(package)" for name in (module, other)]
            if rooms[0] != rooms[1] and "(package)" not in rooms:
                arrows[rooms[0], rooms[1]] += 1
    return len(graph.modules), arrows


def upward(arrows: Counter[tuple[str, str]]) -> int:
    """How many imports go from a room to one above it or beside it."""
    place = {room: k for k, line in enumerate(layers()) for room in line}
    return sum(n for (room, other), n in arrows.items() if place[room] >= place[other])


def draw(path: Path = PICTURE) -> None:
    """Write the picture: a line a layer, each room with what it imports."""
    _, arrows = imports()
    rows = [line for line in layers() if line != ["__main__"]]
    parts = []
    for k, line in enumerate(rows):
        y = 10 + k * ROW
        for room in line:
            x, width = 10 + 130 * line.index(room), 120
            parts.append(
                f'<rect x="{x}" y="{y}" width="{width}" height="{BOX}" rx="5" fill="none" stroke="#2f7fc1"/>'
                f'<text x="{x + width / 2}" y="{y + 22}" text-anchor="middle" font-weight="600">{escape(room)}</text>'
            )
        told = []
        for room in line:
            down = sorted((other, n) for (one, other), n in arrows.items() if one == room)
            if down:
                told.append((f"{room}: " if len(line) > 1 else "") + ", ".join(f"{other} {n}" for other, n in down))
        for j, text in enumerate(told):
            middle = y + 21 + 13 * (j - (len(told) - 1) / 2)
            parts.append(f'<text x="410" y="{middle:.0f}" font-size="10">{escape("imports " + text)}</text>')
    height = 20 + ROW * len(rows)
    style = "text{fill:#666;font:12px system-ui,sans-serif}@media(prefers-color-scheme:dark){text{fill:#bbb}}"
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
        f"<style>{style}</style>{''.join(parts)}</svg>\n"
    )


if __name__ == "__main__":
    draw()
    n_files, found = imports()
    print(f"{n_files} files, {sum(found.values())} imports between rooms, {len(found)} arrows, {upward(found)} upward")
