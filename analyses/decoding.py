"""How is the answer read off the stream: what adds to it directly, from which token, and after which layer is it there?

The paper's second open question (section 6): what the later layers do with what the bottleneck gives them. Readings on the
clean prompts, all in logits of the answer over the wrong one:

direct: what each node adds to the logit difference by itself, the last norm's scale fixed; all nodes sum to it exactly.
source: of each mixer, what its state gives from each earlier token, and D x; these sum to the mixer's own share.
lens: the difference that the stream after each layer would give, read by the last norm and the head; tuned lens: the same of
what an affine map makes of it, the nearest to the last stream on other prompts.
carried: exact edge patching from the bottleneck: what is lost when one later node reads its corrupted output, and when
the output node reads that node's.
exchanged: whether a node hands on who it is or where. Its output at the last token is taken from a prompt in which the answer's
name and a repeated one are exchanged: everywhere (another answer at the same place: what is lost is identity), or only where
they first stand (the same answer at another place: what is lost is position).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import altair as alt
import pandas as pd
import torch
from torch import Tensor

from ioi_mamba.analyses._roles import by_role, means
from ioi_mamba.charts.drawing import check_size, position_heatmap
from ioi_mamba.charts.theme import EFFECT, HELPS, PLOT_WIDTH
from ioi_mamba.circuits.decoding import direct_attribution, exchanged, logit_lens, tuned_lens
from ioi_mamba.circuits.graph import Item, universe_of
from ioi_mamba.circuits.scoring import Evaluator
from ioi_mamba.experiments.experiment import Column, Context, Experiment
from ioi_mamba.experiments.needs import Need
from ioi_mamba.experiments.options import option
from ioi_mamba.model.families import layers_with, mixer_layer, sizes_of
from ioi_mamba.passes.ranges import left_out_sentence, usable
from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import Pairs
from ioi_mamba.tasks.prompts import is_name

DIRECT, SOURCE, LENS, CARRIED, EXCHANGED = "direct", "source", "lens", "carried", "exchanged"
TUNED = "tuned lens"
OUT = "out"
DX = "D x"


@dataclass(frozen=True)
class Options:
    """Options of decoding."""

    layer: int | None = option(None, "the bottleneck; none: the mixer that adds most directly or by others", at_least=0)


def default_pairs(tokenizer, n_pairs: int | None, seed: int) -> Pairs:
    """100 pairs of all five corruptions and all templates (200 evaluated prompts)."""
    return ioi.generate(tokenizer, n_pairs or 100, seed, symmetric=True)


FROM, TO = "from bottleneck", "to output"
IDENTITY, PLACE = "identity", "place"
Row = tuple[str, int | None, str, str, str, Tensor]
"""(what, layer, position, part, way, values [pair] with NaN where a pair has none)"""


def run(context: Context) -> pd.DataFrame:
    """The readings, one row a number. Raises InputError for a layer that has no state-space mixer."""
    model, found = context.model, usable(context.model, context.pairs)
    mixers, given = layers_with(model, "h"), context.options.layer
    chosen = None if given is None else mixer_layer(model, given)
    labels, layouts = by_role(found.pairs)
    universe, n = universe_of(model), len(found.pairs)
    nodes = universe.nodes
    direct = torch.zeros(len(nodes) - 1, n)
    source = torch.full((len(mixers), len(labels), n), torch.nan)
    skip, lens = torch.zeros(len(mixers), n), torch.zeros(sizes_of(model).n_layers, n)
    for k, (part, rows, at) in enumerate(layouts):
        got = direct_attribution(model, part, context.stage(0.4 * k / len(layouts), 0.4 * (k + 1) / len(layouts)))
        direct[:, rows], skip[:, rows] = got["nodes"], got["skip"]
        by_label = torch.einsum("as,lsp->lap", at, got["state"])
        by_label[:, ~at.any(1)] = torch.nan
        source[:, :, rows] = by_label
        lens[:, rows] = logit_lens(model, part)
    rows: list[Row] = [(DIRECT, *_node(node), "", values) for node, values in zip(nodes[:-1], direct, strict=True)]
    for i, layer in enumerate(mixers):
        rows += [(SOURCE, layer, label, "state", "", values) for label, values in zip(labels, source[i], strict=True)]
        rows.append((SOURCE, layer, OUT, DX, "", skip[i]))
    rows += [(LENS, layer, OUT, "stream", "", values) for layer, values in enumerate(lens)]
    # Layer 0 reads the token itself; a bottleneck is a later one.
    totals = direct[[nodes.index(node) for node in universe.mixers]].mean(1).abs()
    layer = chosen if chosen is not None else mixers[int(totals[1:].argmax()) + 1 if len(mixers) > 1 else 0]
    if int(found.pairs.clusters.max()) > 0:
        tuned = tuned_lens(model, found.pairs)
        rows += [(TUNED, layer_, OUT, "stream", "", values) for layer_, values in enumerate(tuned)]
    rows += _carried(context, found.pairs, universe.mixers[mixers.index(layer)])
    rows += _exchanged(context, found.pairs)
    found_means = means(torch.stack([values for *_, values in rows]), found.pairs.clusters)
    places = {label: place for place, label in enumerate(labels)} | {OUT: len(labels)}
    table = pd.DataFrame(
        [
            (what, of_layer, position, places[position], part, way, *mean)
            for (what, of_layer, position, part, way, _), mean in zip(rows, found_means, strict=True)
            if mean is not None
        ],
        columns=["what", "layer", "position", "place", "part", "way", "contribution", "low", "high", "n"],
    )
    return table.astype({"layer": "Int64"}).assign(bottleneck=layer, left_out=found.left_out)


def _node(node: str) -> tuple[int | None, str, str]:
    """(layer, position, part) of a node that adds to the stream."""
    if node == "embed":
        return None, OUT, "embed"
    layer, _, name = node.partition(".")
    return int(layer), OUT, name or "mamba"


def _carried(context: Context, pairs: Pairs, bottleneck: str) -> Iterator[Row]:
    """What the edges from the bottleneck to each later node, and from these to the output, carry: exact, in logits."""
    universe = universe_of(context.model)
    later = universe.nodes[universe.nodes.index(bottleneck) + 1 :]
    edges = {(item.source, item.target) for item in universe.items()}
    tested = [(node, bottleneck, node) for node in later if (bottleneck, node) in edges]
    tested += [(node, node, "output") for node in later[:-1]]
    sets = [[], *([Item(source, target)] for _, source, target in tested)]
    scores = Evaluator(context.model, pairs, universe).scores(sets, context.stage(0.6, 0.9))["logit_diff"]
    for (node, _, target), patched in zip(tested, scores[1:], strict=True):
        place = (None, OUT, "output") if node == "output" else _node(node)
        yield (CARRIED, *place, TO if target == "output" and node != "output" else FROM, scores[0] - patched)


def _exchanged(context: Context, pairs: Pairs) -> list[Row]:
    """What is lost, of each mixer, attention and MLP, with names exchanged everywhere and where they first stand.

    The first row of each way is of the prompts with exchanged names themselves. None for pairs without such names.
    """
    nodes = universe_of(context.model).nodes[1:-1]
    found = {way: torch.full((1 + len(nodes), len(pairs)), torch.nan) for way in (IDENTITY, PLACE)}
    for part, rows in zip(pairs.layouts(), pairs.layout_rows(), strict=True):
        prompts = exchanged_names(part)
        here = prompts["rows"]
        if not len(here):
            continue
        own = replace(part[here], wrong=prompts["other name"], readout=None)
        for way, values in found.items():
            got = exchanged(context.model, own, prompts[way], nodes)
            values[:, torch.tensor(rows)[here]] = got[0] - got[1:]
    out: list[Row] = []
    for way, values in found.items():
        places = [(None, OUT, "all"), *map(_node, nodes)]
        out += [(EXCHANGED, *place, way, each) for place, each in zip(places, values, strict=True)]
    return out


def exchanged_names(pairs: Pairs) -> dict[str, Tensor]:
    """Prompts with the answer's name and a repeated one exchanged.

    Returns:
        rows: Int64[row], the pairs whose answer stands once among the names and where another name stands several times.
        other name: Int64[row], the first such name.
        identity: Long[row, pos], the two names exchanged wherever they stand.
        place: Long[row, pos], exchanged where they first stand.
    """
    at = [places for role, places in pairs.roles.items() if is_name(role)]
    rows, others, everywhere, first = [], [], [], []
    for row in range(len(pairs)) if at and pairs.readout is None else ():
        places = sorted(int(each[row]) for each in at if each[row] >= 0)
        names = [int(pairs.clean[row, place]) for place in places]
        answer = int(pairs.answer[row])
        repeated = [name for name in names if names.count(name) > 1]
        if names.count(answer) != 1 or not repeated:
            continue
        other, tokens = repeated[0], pairs.clean[row]
        whole = torch.where(tokens == answer, other, torch.where(tokens == other, answer, tokens))
        two = tokens.clone()
        two[places[names.index(answer)]], two[places[names.index(other)]] = other, answer
        rows.append(row)
        others.append(other)
        everywhere.append(whole)
        first.append(two)
    tokens = lambda found: torch.stack(found) if found else pairs.clean[:0]
    return {
        "rows": torch.tensor(rows, dtype=torch.long),
        "other name": torch.tensor(others, dtype=torch.long),
        IDENTITY: tokens(everywhere),
        PLACE: tokens(first),
    }


def chart(table: pd.DataFrame) -> alt.LayerChart:
    """What nodes add, and the lens, by layer."""
    direct = table[table["what"] == DIRECT]
    return _by_layer(direct[direct["layer"].notna()], table[table["what"].isin((LENS, TUNED))])


def more(table: pd.DataFrame) -> dict[str, alt.TopLevelMixin]:
    """What comes from which token; what later layers do with the bottleneck; whether they hand on who it is, or where."""
    carried = table[table["what"] == CARRIED]
    source = table[(table["what"] == SOURCE) & (table["layer"].notna())]
    of_tokens = source[source["part"] == "state"].astype({"layer": int})
    charts = {
        "By token": position_heatmap(
            of_tokens,
            x="place",
            color="contribution",
            facet=None,
            labels="position",
            title="What the state gives to the answer, by the token it comes from",
            color_title="logits of the answer over the wrong one",
            tooltip=("low", "high"),
        )
    }
    if carried["layer"].notna().any():
        title = "What later layers read of the bottleneck, and what they pass on"
        charts["After the bottleneck"] = _ways_chart(carried[carried["layer"].notna()], title)
    moved = table[(table["what"] == EXCHANGED) & table["layer"].notna()]
    if len(moved):
        title = "What each layer hands on at the last token: who it is, or where"
        charts["Who, or where"] = _ways_chart(moved, title)
    return charts


_TOOLTIP = [
    *("layer:O", "part:N"),
    *(alt.Tooltip(f"{name}:Q", format=".3f") for name in ("contribution", "low", "high")),
    "n:Q",
]


def _axis() -> alt.X:
    return alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0, ticks=False, labelOverlap=True))


def _by_layer(direct: pd.DataFrame, lens: pd.DataFrame) -> alt.LayerChart:
    title = alt.Title(
        "What each layer adds to the answer by itself, and what the stream would answer after it",
        subtitle="bars: direct contribution, with its 95 % interval; lines: logit lens and tuned lens",
        anchor="start",
    )
    y = alt.Y("contribution:Q", title="logits of the answer over the wrong one")
    bars = (
        alt.Chart(check_size(direct))
        .mark_bar()
        .encode(
            x=_axis(),
            y=y,
            color=alt.when("datum.contribution < 0").then(alt.value(HELPS)).otherwise(alt.value(EFFECT)),
            detail="part:N",
            tooltip=_TOOLTIP,
        )
    )
    ends = alt.Chart(direct).mark_rule().encode(x=_axis(), y=alt.Y("low:Q", title=""), y2="high:Q", tooltip=_TOOLTIP)
    dash = alt.StrokeDash("what:N", title=None, sort=[LENS, TUNED], legend=alt.Legend(orient="top"))
    line = alt.Chart(check_size(lens)).mark_line(point=True).encode(x=_axis(), y=y, strokeDash=dash, tooltip=_TOOLTIP)
    return alt.LayerChart(layer=[bars, ends, line]).properties(width=PLOT_WIDTH, height=200, title=title)


def _ways_chart(table: pd.DataFrame, title: str) -> alt.Chart:
    """What is lost by layer, in bars beside each other by way."""
    return (
        alt.Chart(check_size(table))
        .mark_bar()
        .encode(
            x=_axis(),
            xOffset="end:N",
            y=alt.Y("contribution:Q", title="logits lost"),
            color=alt.Color("way:N", title=None, legend=alt.Legend(orient="top")),
            tooltip=["way:N", *_TOOLTIP],
        )
        .transform_calculate(end="datum.part + ' ' + datum.way")
        .properties(
            width=PLOT_WIDTH,
            height=180,
            title=alt.Title(title, anchor="start"),
        )
    )


def findings(table: pd.DataFrame) -> list[str]:
    """Who adds the answer, from which tokens, after which layer it is there, and who reads the bottleneck."""
    direct = table[table["what"] == DIRECT]
    total, top = direct["contribution"].sum(), direct.loc[direct["contribution"].idxmax()]
    lens = table[table["what"] == LENS].sort_values("layer")
    half = lens[lens["contribution"] > total / 2]
    of_state = table[(table["what"] == SOURCE) & (table["part"] == "state") & (table["layer"] == top["layer"])]
    out = [
        f"{_name(top)[:1].upper()}{_name(top)[1:]} adds {top['contribution']:.2f} logits directly ({top['low']:.2f} to "
        f"{top['high']:.2f}, {top['n']} prompts), of {total:.2f} in all."
    ]
    if len(of_state) and top["part"] == "mamba":
        strongest = of_state.loc[of_state["contribution"].abs().sort_values(ascending=False).index[:3]]
        named = ", ".join(f"{row.position} ({row.contribution:.2f})" for row in strongest.itertuples())
        out.append(f"Most of what its state gives comes from {named}.")
    if len(half):
        out.append(
            f"Read by the logit lens, more than half of the difference is there after layer {half['layer'].iloc[0]}{_tuned(table)}."
        )
    carried = table[(table["what"] == CARRIED) & (table["way"] == FROM) & table["layer"].notna()]
    layer = table["bottleneck"].iloc[0]
    if len(carried):
        reader = carried.loc[carried["contribution"].abs().idxmax()]
        out.append(
            f"Of what comes after the mixer of layer {layer}, {_name(reader)} needs its output most: reading the corrupted run's "
            f"instead costs {reader['contribution']:.2f} logits."
        )
    return out + _moved(table, layer) + left_out_sentence(table)


def _tuned(table: pd.DataFrame) -> str:
    tuned = table[table["what"] == TUNED].sort_values("layer")
    half = tuned[tuned["contribution"] > tuned["contribution"].iloc[-1:].sum() / 2]
    return f", by the tuned lens after layer {half['layer'].iloc[0]}" if len(half) else ""


def _moved(table: pd.DataFrame, layer: int) -> list[str]:
    """Whether the bottleneck, and the later node that moves the answer most, hand on an identity or a place."""
    moved = table[(table["what"] == EXCHANGED) & table["layer"].notna() & (table["layer"] >= layer)]
    if moved.empty:
        return []
    lost = moved.pivot_table(index=["layer", "part"], columns="way", values="contribution")
    later = lost[lost.index.get_level_values("layer") > layer].abs().sum(axis=1)
    chosen = [key for key in lost.index if key == (layer, "mamba")] + ([later.idxmax()] if len(later) else [])
    return [
        f"With the output of layer {of_layer} ({part}) at the last token from a prompt in which the two names are exchanged, "
        f"{lost.loc[(of_layer, part), IDENTITY]:z.2f} logits are lost if another name is the answer, and "
        f"{lost.loc[(of_layer, part), PLACE]:z.2f} if the same name stands at another place."
        for of_layer, part in chosen
    ]


def _name(row: pd.Series) -> str:
    return "the embedding" if pd.isna(row["layer"]) else f"layer {row['layer']} ({row['part']})"


EXPERIMENT = Experiment(
    name="decoding",
    title="Reading the answer",
    question="Which layers write the answer, from which tokens?",
    look_for=(
        "A tall bar is a layer that writes the answer itself; a step of the line without a bar is work on what is there. In "
        "the squares, the tokens whose content is read at the end."
    ),
    method=(
        "Direct: what a node adds to the stream at the last token, times the way to the logits with the last norm's scale "
        "fixed; sums to the logit difference.\n"
        "By token: the state's read-out split into one exact term a source position.\n"
        "Lens: last norm and head on the stream after each layer; tuned: on the nearest affine map of it to the last stream.\n"
        "Carried: one edge patched from the corrupted run, exactly; what the logit difference loses.\n"
        "Exchanged: a node's output at the last token from a prompt in which the answer's name and a repeated one are "
        "exchanged, everywhere (identity) or where they first stand (place); here the wrong answer is the repeated name."
    ),
    paper="6",
    needs=frozenset({Need.SITES, Need.ABLE, Need.LAYER, Need.GRADIENTS}),
    options=Options,
    columns=(
        Column("what", "text", "direct, source, lens, tuned lens, carried or exchanged"),
        Column("layer", "int", "the layer; empty for the embedding and the output node", nullable=True),
        Column("position", "text", "the role of the token that it comes from; out: the last"),
        Column("place", "int", "the place of that role in the order of tokens"),
        Column("part", "text", "the node, or the part of a mixer"),
        Column("way", "text", "of carried: from bottleneck, or to output; of exchanged: identity or place; else empty"),
        Column("contribution", "float", "mean over prompts", "logits of the answer over the wrong one"),
        Column("low", "float", "lower end of the 95 % interval of the mean, by cluster", nullable=True),
        Column("high", "float", "upper end of the same interval", nullable=True),
        Column("n", "int", "prompts of the mean"),
        Column("bottleneck", "int", "the layer whose edges are patched"),
        Column("left_out", "int", "prompts without a range"),
    ),
    draws={ioi.TASK.name: default_pairs},
    run=run,
    chart=chart,
    findings=findings,
    more=more,
)
