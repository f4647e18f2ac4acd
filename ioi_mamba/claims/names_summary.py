"""What carries the names: the paper's lines of evidence side by side, each with its number on this model.

Four claims of sections 4.1 to 4.4, read off the tables of the experiments that test them: one layer is the
bottleneck; its convolution shifts names by one token; a name is one vector there; only its last output is used. The
summary runs nothing: `summarize(tables)` takes what is there and says "not run" of the rest.

Published values and thresholds are those of the claims (`ioi_mamba.paper`), held here against any model; a model that
does the task in another way fails them, which says nothing against the model. Two are to be taken with care: figure
4's magnitudes very likely come from stale activations, so that its line has the number of a single pair; and section
4.4's claims are qualitative, so that these rows have no number of the paper.

A bottleneck layer that layer-ablation's own table chose is tested on held-out prompts: each corruption of that table
is asked about the layer that the other corruptions choose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import altair as alt
import pandas as pd

from ioi_mamba import claims, paper
from ioi_mamba.charts import drawing, theme

COLUMNS = ("evidence", "measure", "value", "low", "high", "threshold", "paper", "holds", "source")

BOTTLENECK, SHIFT = "bottleneck layer", "shift by one"
LINEAR, LAST = "linear names", "last position only"

WORDS = {claims.HOLDS: "yes", claims.FAILS: "no"}
JUDGED = ("yes", "no", "undecided")
"""What `holds` says of a line that has a number which can be held against its threshold."""

LABELS = 300  # pixels of the chart for the names of lines
FARTHEST = 2.0
"""Where the chart's axis ends; some ratios have no bound."""


@dataclass(frozen=True)
class Summary:
    """A section over the tables of several experiments; fields as those of an `Experiment`."""

    name: str
    title: str
    paper: str
    question: str
    look_for: str
    method: str
    required: tuple[str, ...]
    chart: Callable[[pd.DataFrame], Any]
    findings: Callable[[pd.DataFrame], list[str]]

    def texts(self, varies: str) -> dict[str, str]:
        """The texts of its section."""
        return {name: getattr(self, name) for name in ("title", "question", "look_for", "method")}


@dataclass(frozen=True)
class Line:
    """One line of evidence: in words, and the claim of `paper.table("claims")` that it is."""

    evidence: str
    text: str
    claim: str


def summarize(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The lines of evidence, one row each, from the experiments' tables by name ("layer-ablation", ...).

    value, low, high, paper: NaN where there is none; threshold: in words; source: the experiment; holds: "yes",
    "no" or "undecided", "not comparable" where the source has no such number, "not run" where it is missing. The layer
    in question is the one that the experiments on one layer agree on, and else the bottleneck of layer-ablation.
    """
    chosen = claims.bottleneck(tables)
    layer = claims.common_layer(tables)
    layer = chosen if layer is None else layer
    known = paper.table("claims").set_index("id")
    verdicts: dict[str, str] = {}
    rows = []
    for line in LINES:
        claim = known.loc[line.claim]
        value, threshold = claims.NONE, claims.tolerance(claim["at_least"], claim["at_most"])
        verdicts[line.claim] = claims.NOT_RUN
        source = tables.get(claim["analysis"])
        if layer is not None and source is not None:
            is_chosen = claim["analysis"] == claims.CHOOSES and layer == chosen
            value = claims.measure(line.claim, source, claims.held_out_layers(source) if is_chosen else layer)
            verdicts[line.claim], _ = claims.judge(claim, value, verdicts.get(claim["requires"]))
        holds = WORDS.get(verdicts[line.claim], verdicts[line.claim])
        rows.append((line.evidence, line.text, *value[:3], threshold, claim["published"], holds, claim["analysis"]))
    table = pd.DataFrame(rows, columns=list(COLUMNS)).astype({"low": float, "high": float, "paper": float})
    return table.assign(layer=pd.array([layer] * len(table), dtype="Int64"))


def chart(table: pd.DataFrame) -> alt.FacetChart:
    """This model's number and the paper's, line by line; green where the line holds."""
    shown = table[table["holds"].isin(JUDGED)].copy()
    shown["at"] = shown["value"].clip(upper=FARTHEST)
    title = f"value (tick: the paper's; at {FARTHEST:g}: or more)"
    # A margin on both sides keeps points at the ends off the names of the lines.
    scale = alt.Scale(domain=[-0.05, FARTHEST + 0.05], nice=False)
    x = alt.X("at:Q", title=title, scale=scale, axis=alt.Axis(values=[k / 4 * FARTHEST for k in range(5)]))
    y = alt.Y(
        "measure:N",
        sort=list(shown["measure"]),
        title=None,
        axis=alt.Axis(labelLimit=LABELS, ticks=False, domain=False, grid=True),
    )
    tooltip = ["evidence", "measure", alt.Tooltip("value:Q", format=".3f"), alt.Tooltip("paper:Q", format=".3f")]
    base = alt.Chart().encode(y=y, tooltip=[*tooltip, "threshold", "holds", "source"])
    holds = alt.Scale(domain=list(JUDGED), range=[theme.CATEGORIES[3], theme.FAILS, theme.PLAIN])
    shapes = alt.Scale(domain=list(JUDGED), range=["circle", "cross", "diamond"])
    legend = alt.Legend(orient="top", title="holds on this model")
    layers = [
        base.mark_rule(strokeWidth=2, opacity=0.6, clip=True).encode(
            x=alt.X("low:Q", title=title, scale=scale), x2="high:Q"
        ),
        base.mark_tick(thickness=2, size=14, color="currentColor").encode(x="paper:Q"),
        base.mark_point(filled=True, size=70, opacity=1).encode(
            x=x,
            color=alt.Color("holds:N", scale=holds, legend=legend),
            shape=alt.Shape("holds:N", scale=shapes, legend=legend),
        ),
    ]
    header = alt.Header(labelOrient="top", labelAnchor="start", labelPadding=2)
    row = alt.Row("evidence:N", sort=list(dict.fromkeys(shown["evidence"])), title=None, header=header)
    lines = alt.layer(*layers, data=drawing.check_size(shown))
    panels = lines.properties(width=theme.PLOT_WIDTH - LABELS, height=alt.Step(22)).facet(row=row, spacing=10)
    return panels.resolve_scale(y="independent")


def findings(table: pd.DataFrame) -> list[str]:
    """For each of the four claims, how many of its lines hold, and which do not, are undecided or not comparable."""
    layer = table["layer"].iloc[0]
    found = []
    if not pd.isna(layer):
        ran = table[table["holds"] != "not run"]
        counts = ", ".join(f"{number} {word}" for word, number in ran["holds"].value_counts().items())
        found.append(f"The layer in question is {layer}; of {len(ran)} lines of evidence: {counts}.")
    for evidence in dict.fromkeys(table["evidence"]):
        part = table[table["evidence"] == evidence]
        title = f"{evidence[0].upper()}{evidence[1:]}"
        run = part[part["holds"] != "not run"]
        if run.empty:
            found.append(f"{title}: not run.")
            continue
        kept = run[run["holds"] == "yes"]
        parts = [f"{title}: {len(kept)} of {len(run)} lines of evidence hold"]
        parts += [
            f"{row.measure} is {row.value:.2f}, not {row.threshold}" for row in run[run["holds"] == "no"].itertuples()
        ]
        for word in ("undecided", "not comparable"):
            names = list(run.loc[run["holds"] == word, "measure"])
            parts += [f"{word}: {', '.join(names)}"] if names else []
        found.append(f"{'; '.join(parts)}.")
    return found


LINES = (
    Line(BOTTLENECK, "effect of its input at the changed name, mean", "ra_effect"),
    Line(BOTTLENECK, "corruptions in which it and layer 0 are the strongest", "ra_two_strongest"),
    Line(BOTTLENECK, "cross-talk circuits that have it", "ct_39_always"),
    Line(BOTTLENECK, "cross-talk circuits that begin with it", "ct_39_first"),
    Line(SHIFT, "corruptions with their peak in slice -1 at name + 1", "conv_peak_cell"),
    Line(SHIFT, "effect of slice -1 at name + 1, mean", "conv_effect"),
    Line(SHIFT, "largest other slice over it, worst corruption", "conv_others"),
    Line(SHIFT, "state up to the name over the peak, worst", "h_before"),
    Line(SHIFT, "state after the name over the peak, worst", "h_after"),
    Line(SHIFT, "strongest rows that are one after a name", "cos_lines"),
    Line(LINEAR, "subtract-add, slots 1-3 from 1-3", "steer_sub_add"),
    Line(LINEAR, "replace, slots 1-3 from 1-3", "steer_replace"),
    Line(LINEAR, "subtract-add, slots 1-3 from 4-5", "steer_sub_add_cross"),
    Line(LINEAR, "replace, slots 1-3 from 4-5", "steer_replace_cross"),
    Line(LAST, "output before the last position over the last", "outproj_last_only"),
)
"""The claims on how names are carried; the state rows' published share is of the notebook's own prompt."""

SUMMARY = Summary(
    name="names-summary",
    title="What carries the names",
    paper="4.1 to 4.4",
    question="Do the paper's four lines of evidence hold?",
    look_for=(
        "Which lines of evidence hold: a model may have a bottleneck layer that works in another way than the paper's."
    ),
    method=(
        "Bottleneck: the layer after 0 with the largest effect in layer-ablation, or the one the experiments were given; "
        "all lines are about this layer.\n"
        "In layer-ablation's own table each corruption is asked about the layer that the other corruptions choose.\n"
        "Each line is one number of one experiment's table, held against a threshold from the published numbers; it is "
        "undecided if its interval straddles the threshold or too few prompts were used.\n"
        "Intervals are of 95 %: Wilson's of proportions, and those of mean effects over prompts."
    ),
    required=COLUMNS,
    chart=chart,
    findings=findings,
)
