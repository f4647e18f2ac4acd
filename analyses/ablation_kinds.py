"""Do all kinds of ablation point to the same layers?

Section 4.1 finds its layers in two ways: what a layer adds to the stream set to zero (4.1.2), and its input exchanged for
the corrupted prompt's (4.1.1). Zeros are nothing that a layer ever gives, a corrupted prompt's value is; a mean is in between.
Here every node's output, and every node's own copy of the stream, is overwritten at all positions by every kind of
`ioi_mamba.passes.ablations`, on the same prompts: as many edges of the graph patched at once, so that all kinds and both
sides are one computation.
"""

from __future__ import annotations

import altair as alt
import pandas as pd

from ioi_mamba.analyses import _effects
from ioi_mamba.charts.circuit_axes import node_place
from ioi_mamba.charts.drawing import matrix_heatmap
from ioi_mamba.circuits.graph import Item, universe_of
from ioi_mamba.circuits.scoring import Evaluator
from ioi_mamba.experiments.experiment import Column, Context, Experiment
from ioi_mamba.passes import metrics
from ioi_mamba.passes.ablations import ABLATIONS, RESAMPLE, ZERO
from ioi_mamba.passes.intervals import mean_interval
from ioi_mamba.passes.ranges import left_out_sentence, usable
from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import Pairs

OUTPUT, INPUT = "output", "input"
SIDES = {OUTPUT: "what the node adds to the stream", INPUT: "the node's own copy of the stream"}
FIRST = 2
"""Layers that the findings name, of each kind; the paper names two."""


def default_pairs(tokenizer, n_pairs: int | None, seed: int) -> Pairs:
    """100 pairs of all five corruptions and all templates (200 evaluated prompts)."""
    return ioi.generate(tokenizer, n_pairs or 100, seed, symmetric=True)


def run(context: Context) -> pd.DataFrame:
    """One row for each kind of ablation, side and node. Of prompts without roles there is no mean by role."""
    model, (pairs, _, left_out) = context.model, usable(context.model, context.pairs)
    universe = universe_of(model)
    edges = [(universe.nodes[i], universe.nodes[j]) for i, j in universe.edges()]
    inner = universe.nodes[1:-1]
    sides = [(OUTPUT, node, [Item(*edge) for edge in edges if edge[0] == node]) for node in ("embed", *inner)]
    sides += [(INPUT, node, [Item(*edge) for edge in edges if edge[1] == node]) for node in inner]
    kinds = [kind for kind in ABLATIONS.values() if kind.over != "role" or pairs.roles]
    rows = []
    for k, kind in enumerate(kinds):
        evaluator = Evaluator(model, pairs, universe, ablation=kind)
        stage = context.stage(k / len(kinds), (k + 1) / len(kinds))
        scores = evaluator.scores([items for *_, items in sides], stage)
        clean, corrupted, _ = evaluator.ends()
        effects = metrics.effect(patched=scores["logit_diff"], clean=clean, corrupted=corrupted)
        low, high = mean_interval(effects, evaluator.clusters)
        numbers = zip(
            effects.double().mean(1).tolist(),
            low.tolist(),
            high.tolist(),
            scores["accuracy"].double().mean(1).tolist(),
            strict=True,
        )
        rows += [(kind.name, side, node, *cell) for (side, node, _), cell in zip(sides, numbers, strict=True)]
    columns = ["ablation", "side", "node", "effect", "low", "high", "accuracy"]
    return pd.DataFrame(rows, columns=columns).assign(n=len(pairs), left_out=left_out)


def chart(table: pd.DataFrame) -> alt.Chart | alt.LayerChart:
    """Kind by node, of what nodes add to the stream."""
    return _matrix(table, OUTPUT)


def more(table: pd.DataFrame) -> dict[str, alt.Chart | alt.LayerChart]:
    """The same of nodes' own copies of the stream."""
    return {f"Ablated: {SIDES[INPUT]}": _matrix(table, INPUT)}


def _matrix(table: pd.DataFrame, side: str) -> alt.Chart | alt.LayerChart:
    part = table[table["side"] == side]
    nodes = sorted(set(part["node"]), key=node_place)
    return matrix_heatmap(
        part,
        x="node",
        y="ablation",
        color="effect",
        x_order=nodes,
        y_order=list(dict.fromkeys(part["ablation"])),
        x_title="node",
        y_title="ablation",
        color_title="effect: 0 acts clean, 1 acts corrupted",
        domain=(-1.0, 1.0),
        text=len(nodes) <= 16,
        cell=36 if len(nodes) <= 16 else 14,
        tooltip=("low", "high", "accuracy", "n"),
    ).properties(title=f"Ablated: {SIDES[side]}")


def findings(table: pd.DataFrame) -> list[str]:
    """The strongest nodes by each kind, and whether zero and resample agree, as the paper says they do."""
    sentences, first = [], {}
    for side, meaning in SIDES.items():
        part = table[(table["side"] == side) & (table["node"] != "embed")]
        effects = part.pivot_table(index="node", columns="ablation", values="effect", sort=False).abs()
        first[side] = {kind: list(effects[kind].sort_values(ascending=False).index[:FIRST]) for kind in effects}
        named = "; ".join(f"by {kind} {' and '.join(nodes)}" for kind, nodes in first[side].items())
        if len({frozenset(nodes) for nodes in first[side].values()}) == 1:
            named = f"{' and '.join(first[side][RESAMPLE.name])}, by every kind"
        sentences.append(f"Ablating {meaning}, the largest effects are in {named}.")
        others = [kind for kind in effects if kind != RESAMPLE.name]
        agreement = ", ".join(
            f"{kind} {effects[kind].rank().corr(effects[RESAMPLE.name].rank()):.2f}" for kind in others
        )
        if len(effects) > 2:
            sentences.append(f"The rank correlation of the sizes of these effects with those by resample: {agreement}.")
    zero, resample = set(first[OUTPUT][ZERO.name]), set(first[INPUT][RESAMPLE.name])
    both = sorted(zero & resample, key=node_place)
    if both == sorted(zero | resample, key=node_place):
        said = f"point to the same layers, {' and '.join(both)}"
    else:
        said = f"agree on {' and '.join(both) if both else 'no layer'}"
    sentences.append(
        f"An output set to zero and an input resampled, as in the paper, {said} (the first {FIRST} of each)."
    )
    return sentences + left_out_sentence(table)


EXPERIMENT = Experiment(
    name="ablation-kinds",
    title="Layers by kind of ablation",
    paper="4.1",
    question="Do all kinds of ablation point to the same layers?",
    look_for=(
        "Columns that are dark in every row: layers that matter whatever is written in place of their values. A row that is "
        "dark everywhere is a kind that breaks the model rather than the task."
    ),
    method=(
        "Overwrite what a node adds to the stream, or its own copy of the stream, at all positions, by each kind: "
        + "; ".join(f"{kind.name}, {kind.meaning}" for kind in ABLATIONS.values())
        + ".\n"
        "Effect = 1 - (d_patched - d_corrupted) / (d_clean - d_corrupted), d the logit difference of the two answers: one "
        "scale for all kinds.\n"
        "Mean over prompts of all templates; intervals are 95 % by cluster."
    ),
    columns=(
        Column("ablation", "text", "the kind of ablation"),
        Column("side", "text", "output: what the node adds to the stream; input: its own copy of the stream"),
        Column("node", "text", "embed, a layer, or a sub-block of one"),
        *_effects.MEAN_EFFECT,
        Column("accuracy", "float", "share of prompts whose answer has the largest logit of the candidates, 0..1"),
    ),
    draws={ioi.TASK.name: default_pairs},
    run=run,
    chart=chart,
    more=more,
    findings=findings,
)
