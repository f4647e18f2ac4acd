"""Help as plain text that is wrapped once, between words, as wide as the reader's terminal."""

from __future__ import annotations

import io
import textwrap
from typing import Any

from cyclopts.help.formatters.plain import PlainFormatter

_WIDE = 100_000


class Wrapped(PlainFormatter):
    """cyclopts' plain help. It wraps a description before it puts the name in front, and rich wraps both once more."""

    def __call__(self, console: Any, options: Any, panel: Any) -> None:
        from rich.console import Console

        wide = io.StringIO()
        super().__call__(Console(file=wide, width=_WIDE), options, panel)
        for line in wide.getvalue().splitlines():
            indent = len(line) - len(line.lstrip())
            text = textwrap.fill(
                line.strip(),
                console.width,
                initial_indent=" " * indent,
                subsequent_indent=" " * 3 * indent,
                break_on_hyphens=False,
            )
            console.print(text, highlight=False, markup=False)
