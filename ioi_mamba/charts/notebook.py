"""What a notebook shows of a result: a heading, the first rows of a table, and a chart as a picture."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

import pandas as pd
import vl_convert

from ioi_mamba.charts.theme import themed

ROWS = 10


def shown(heading: str, table: pd.DataFrame, chart: Callable[[], Any] | None = None) -> str:
    """HTML of a heading, the first ROWS rows and, where `chart` makes one, a chart as SVG; all text is escaped."""
    parts = [f"<p><strong>{html.escape(heading)}</strong></p>"]
    parts.append(table.head(ROWS).to_html(index=False, border=0, na_rep="", float_format="{:.4g}".format))
    if len(table) > ROWS:
        parts.append(f"<p>The first {ROWS} of {len(table)} rows.</p>")
    if chart is not None and len(table):
        parts.append(vl_convert.vegalite_to_svg(themed(chart()).to_dict()))
    return "".join(parts)
