"""The look of every chart.

One theme serves light pages, dark pages and paper: text and axes take the colour of the text around them, the
middle of every colour scale is transparent, and both ends are of middle lightness (blue and orange, which the
common forms of colour blindness tell apart). Charts of this package carry it (`themed`); Altair's active theme stays.
"""

from __future__ import annotations

from typing import Any

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
BLUE, ORANGE, PURPLE, TEAL, RED, SLATE = "#2f7fc1", "#dd6b20", "#8a63c9", "#2a9d8f", "#c8372d", "#6b7c93"
CATEGORIES = (SLATE, "#b08b2e", "#c0527f", "#4f9d4a", BLUE, PURPLE)
EFFECT, HELPS, KEPT, HELD_OUT, FAILS, PLAIN = ORANGE, BLUE, TEAL, PURPLE, RED, SLATE
"""What a colour means, on the whole page: patching it takes the answer away, or brings it; it is in the circuit; it was measured
on held-out prompts; it does not hold; none of these. Series without such a meaning have the first of CATEGORIES."""
DIVERGING = (BLUE, "rgba(47,127,193,0.5)", "rgba(128,128,128,0)", "rgba(221,107,32,0.5)", ORANGE)
EFFECTS = ("rgba(221,107,32,0.02)", "rgba(221,107,32,0.5)", ORANGE)
"""For effects of which none is negative."""
SIGNED = ("#b08b2e", "rgba(176,139,46,0.5)", "rgba(128,128,128,0)", "rgba(107,124,147,0.5)", SLATE)
"""For what is no effect and has a sign."""
SEQUENTIAL = ("rgba(107,124,147,0.04)", "rgba(107,124,147,0.5)", SLATE)
PLOT_WIDTH = 960
"""Pixels: with its axis and a legend, a chart of this width fills a page 1400 pixels wide; a page makes it narrower where it must."""


def config() -> dict[str, Any]:
    """What the house theme says of fonts, colours and sizes, as Vega-Lite has it."""
    ink = "currentColor"
    axis = {
        "labelColor": ink,
        "titleColor": ink,
        "domainColor": ink,
        "tickColor": ink,
        "gridColor": ink,
        "domainOpacity": 0.4,
        "tickOpacity": 0.4,
        "gridOpacity": 0.12,
        "labelFontSize": 12,
        "titleFontSize": 12.5,
        "titleFontWeight": 500,
        "titlePadding": 8,
    }
    return {
        "background": "transparent",
        "font": FONT,
        "view": {"stroke": None, "continuousWidth": PLOT_WIDTH, "continuousHeight": 220},
        "axis": axis,
        "header": {"labelColor": ink, "titleColor": ink, "labelFontSize": 12, "labelFontWeight": 600},
        "legend": {
            "labelColor": ink,
            "titleColor": ink,
            "labelFontSize": 12,
            "titleFontSize": 12.5,
            "titleFontWeight": 500,
            "symbolBaseFillColor": ink,
            "symbolBaseStrokeColor": ink,
        },
        "title": {
            "color": ink,
            "subtitleColor": ink,
            "subtitleFontSize": 12,
            "subtitlePadding": 4,
            "fontSize": 13,
            "fontWeight": 600,
            "anchor": "start",
            "offset": 10,
        },
        "text": {"color": ink},
        "rule": {"color": ink},
        "range": {"category": list(CATEGORIES)},
    }


def themed(chart: Any) -> Any:
    """A copy of an Altair chart that has the house theme in it, whatever theme is active."""
    own = chart.copy()
    own.config = config()
    return own
