"""Tables of text for a terminal."""

from __future__ import annotations

import itertools
import shutil
import sys
import textwrap
from collections.abc import Sequence

NARROWEST = 20  # characters of a column that is broken to fit a terminal


def columns(rows: Sequence[Sequence[str]]) -> str:
    """A table; in a terminal that is too narrow for it the widest columns are broken into lines."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    words = [
        max((len(word) for cell in column for word in cell.split()), default=0) for column in zip(*rows, strict=True)
    ]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    while sum(widths) + 2 * (len(widths) - 1) > room:
        spare = [width if width > max(word, NARROWEST) else 0 for width, word in zip(widths, words, strict=True)]
        if not any(spare):
            break
        widths[spare.index(max(spare))] -= 1
    lines = []
    for row in rows:
        broken = [textwrap.wrap(cell, width or 1) for cell, width in zip(row, widths, strict=True)]
        for cells in itertools.zip_longest(*broken, fillvalue=""):
            lines.append("  ".join(map(str.ljust, cells, widths)).rstrip())
    return "\n".join(lines)
