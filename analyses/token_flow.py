"""Which token hands what to which, by convolution or by state, and which of it does the answer need?

The paper's first open question (section 6): what is done before the bottleneck, by which ways. Inside a layer a token
reaches another by two ways. A tap of the convolution takes from a fixed distance. The state takes from every earlier
token: y_t is a sum over sources s <= t of C_t (A_bar_t ... A_bar_(s+1)) B_bar_s x_s, one exact term each
(`ioi_mamba.circuits.flow`). Every tap at every target, and every term, is an item that is patched from the corrupted run,
or with `ablation=zero` knocked out, as attention is between two tokens.

A score is the gradient times the change that patching brings, for all items from one backward pass, or with method=exact
what patching the item alone does. Scores are summed by role: what is between roles is "other", so prompts of unequal length
and all templates are averaged.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import altair as alt
import pandas as pd
import torch
from torch import Tensor

from ioi_mamba.analyses import _circuits, _effects
from ioi_mamba.analyses._roles import by_role, means
from ioi_mamba.charts.flow_charts import arcs
from ioi_mamba.circuits.flow import METHODS, flow_scores
from ioi_mamba.circuits.graph import Item, universe_of
from ioi_mamba.circuits.methods import Options as Scoring
from ioi_mamba.circuits.scoring import Evaluator
from ioi_mamba.experiments.experiment import Column, Context, Experiment
from ioi_mamba.experiments.needs import Need
from ioi_mamba.experiments.options import ablation_option, option
from ioi_mamba.model.families import layers_with, sizes_of
from ioi_mamba.passes.ablations import RESAMPLE, ZERO
from ioi_mamba.passes.ranges import left_out_sentence, usable
from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import Pairs

CONV, STATE = "conv", "state"
SHOWN = 6
"""Flows that the findings name,"""
LEAST = 0.01
"""if they are at least this large."""


@dataclass(frozen=True)
class Options:
    """Options of token-flow."""

    method: str = option("eap", "gradient at the clean point, or each item patched alone", choices=METHODS)
    ablation: str = ablation_option((RESAMPLE.name, ZERO.name))


def default_pairs(tokenizer, n_pairs: int | None, seed: int) -> Pairs:
    """100 pairs of all five corruptions and all templates (200 evaluated prompts)."""
    return ioi.generate(tokenizer, n_pairs or 100, seed, symmetric=True)


def run(context: Context) -> pd.DataFrame:
    """One row for each layer, path, source and target role: the sum of its items' scores, mean over pairs."""
    model, options, found = context.model, context.options, usable(context.model, context.pairs)
    layers, (labels, layouts) = layers_with(model, "h"), by_role(found.pairs)
    per_pair = torch.full((2, len(layers), len(labels), len(labels), len(found.pairs)), torch.nan)
    for k, (part, own_rows, at) in enumerate(layouts):
        stage = context.stage(k / len(layouts), (k + 1) / len(layouts))
        conv = _by_taps(context, part, layers)
        state = flow_scores(model, part, layers, False, options.method, ablation=options.ablation, progress=stage)[:, 0]
        with_role = at.any(1)
        for path, scores in enumerate((conv, state)):
            summed = torch.einsum("at,bs,ltsp->lbap", at, at, scores.float())
            summed[:, ~with_role] = torch.nan
            summed[:, :, ~with_role] = torch.nan
            per_pair[path][..., own_rows] = summed
    cells = itertools.product((CONV, STATE), layers, enumerate(labels), enumerate(labels))
    found_means = means(per_pair.flatten(0, 3), found.pairs.clusters)
    rows = [
        (layer, source, target, s, t, path, *mean)
        for (path, layer, (s, source), (t, target)), mean in zip(cells, found_means, strict=True)
        if mean is not None
    ]
    columns = ["layer", "source", "target", "source_place", "target_place", "path", "score", "low", "high", "n"]
    table = pd.DataFrame(rows, columns=columns)
    # What no item connects (a later source, a tap too far) is no row.
    table = table[(table["score"] != 0) | (table["low"] != 0) | (table["high"] != 0)].reset_index(drop=True)
    return table.assign(left_out=found.left_out, method=context.options.method)


def _by_taps(context: Context, pairs: Pairs, layers: list[int]) -> Tensor:
    """Scores of the taps as flows, [layer, target, source, pair]: tap -k at t is the flow from t - k."""
    model, method, L = context.model, context.options.method, pairs.clean.shape[1]
    universe, K = universe_of(model, parts=True), sizes_of(model).conv_width
    nodes = {int(node.partition(".")[0]): node for node in universe.mixers}
    found = torch.zeros(len(layers), L, L, len(pairs))
    if method == "exact":
        taps = [(i, k, t) for i in range(len(layers)) for k in range(K) for t in range(k, L)]
        items = [Item(nodes[layers[i]], nodes[layers[i]], t, f"conv{-k}") for i, k, t in taps]
        alone = Evaluator(model, pairs, universe, ablation=context.options.ablation)
        for (i, k, t), effects in zip(taps, alone.exact_effects(items), strict=True):
            found[i, t, t - k] = effects
        return found
    scoring = Scoring(method, positions=True, parts=True, ablation=context.options.ablation)
    kinds, scores = _circuits.attributed(context, pairs, scoring)
    for kind, score in zip(kinds.itertuples(), scores, strict=True):
        if kind.part is None or not str(kind.part).startswith("conv"):
            continue
        k = -int(str(kind.part).removeprefix("conv"))
        i = layers.index(int(str(kind.source).partition(".")[0]))
        for t in range(k, L):
            found[i, t, t - k] = score[t]
    return found


def chart(table: pd.DataFrame) -> alt.VConcatChart:
    """Arcs over the tokens, a row a layer: what passes by convolution and by state."""
    return arcs(table)


def findings(table: pd.DataFrame) -> list[str]:
    """The strongest flows between tokens, and how much passes by each way."""
    between = table[table["source"] != table["target"]]
    strongest = between.loc[between["score"].abs().sort_values(ascending=False).index[:SHOWN]]
    strongest = strongest[strongest["score"].abs() >= LEAST]
    if strongest.empty:
        sentence = f"No flow from one token to another inside a mixer has a score of {LEAST} or more in size."
        return [sentence, *left_out_sentence(table)]
    named = ", ".join(
        f"{row.source} to {row.target} in layer {row.layer} by {row.path} ({row.score:.2f})"
        for row in strongest.itertuples()
    )
    by_path = between.assign(size=between["score"].abs()).groupby("path")["size"].sum()
    by_layer = between.assign(size=between["score"].abs()).groupby(["path", "layer"])["size"].sum()
    first = next(strongest.itertuples())
    sentences = [
        f"Most is handed from {first.source} to {first.target} by the {first.path} of layer {first.layer}: score "
        f"{_effects.with_interval(first, 'score')}.",
        f"The answer leans most on {named}; a negative score means that patching hurts.",
    ]
    for path in by_path.index:
        layer = by_layer[path].idxmax()
        sentences.append(
            f"By {path}, scores between different tokens sum to {by_path[path]:.2f} in size, {by_layer[path][layer]:.2f} of it in "
            f"layer {layer}."
        )
    return sentences + left_out_sentence(table)


EXPERIMENT = Experiment(
    name="token-flow",
    title="Token flow",
    question="Which token hands what to which?",
    look_for=(
        "Long arcs by state: the layer that carries {varies} to the end. Short arcs by convolution: neighbours that are "
        "joined before."
    ),
    method=(
        "A tap of the convolution at a target, or the state's share of a read-out that comes from one source, is "
        "replaced by {written}.\n"
        "Score: gradient at the clean point times that change, in normalized logit differences; or exactly, each alone.\n"
        "Sums over the tokens of a role, mean over prompts; tokens without a role are other."
    ),
    paper="6",
    needs=frozenset({Need.SITES, Need.ABLE, Need.GRADIENTS}),
    options=Options,
    columns=(
        Column("layer", "int", "the layer inside which it passes"),
        Column("source", "text", "role of the token that it comes from"),
        Column("target", "text", "role of the token whose read-out takes it"),
        Column("source_place", "int", "the place of the source's role in the order of tokens"),
        Column("target_place", "int", "the place of the target's role"),
        Column("path", "text", "conv: a tap of the convolution; state: the recurrence"),
        Column("score", "float", "mean over prompts of the summed scores of the items", "normalized logit difference"),
        Column("low", "float", "lower end of the 95 % interval of the mean, by cluster", nullable=True),
        Column("high", "float", "upper end of the same interval", nullable=True),
        Column("n", "int", "prompts of the mean"),
        Column("left_out", "int", "prompts without a range"),
        Column("method", "text", "eap: by gradient; exact: each item patched alone"),
    ),
    draws={ioi.TASK.name: default_pairs},
    run=run,
    chart=chart,
    findings=findings,
)
