"""Which items of a circuit would other prompts choose too, and is what they agree on a better circuit?

A circuit of the first k items is one draw: other prompts give other scores, and another k other items. Here every edge and
part is scored on each pair, the pairs are drawn anew many times, and counted is how often an item is among the first k, at
several k (`ioi_mamba.circuits.stability`). Items that nearly every draw includes are the core; those that most include are the
consensus circuit, which is held against the plain first k and random circuits on held-out prompts.

The same is done for edges by role: scores at the tokens of one role are summed, so that prompts of unequal length are in one
circuit (PEAP, arXiv 2502.04577). Tokens without a role are one role, "other".

At the sizes of the MIB benchmark, CPR and CMD are given beside those of random circuits with as many items of each kind,
on the same prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import altair as alt
import pandas as pd
import torch
from torch import Tensor

from ioi_mamba.analyses import _circuits
from ioi_mamba.analyses._roles import Layout, Mean, by_role, means
from ioi_mamba.charts.drawing import check_size, how_many, matrix_heatmap
from ioi_mamba.charts.theme import PLOT_WIDTH
from ioi_mamba.circuits.faithfulness import MIB_FRACTIONS, estimates, estimates_of, mib_sizes, random_circuits
from ioi_mamba.circuits.graph import Circuit, Item, Universe, items_of, universe_of
from ioi_mamba.circuits.methods import METHODS
from ioi_mamba.circuits.methods import Options as Scoring
from ioi_mamba.circuits.ranking import ORDERS, Ranking
from ioi_mamba.circuits.scoring import Evaluator
from ioi_mamba.circuits.stability import CONSENSUS, CORE, drawn_means, inclusion
from ioi_mamba.circuits.variants import VARIANTS
from ioi_mamba.experiments.experiment import Column, Context, Experiment, share_of
from ioi_mamba.experiments.options import ablation_option, option
from ioi_mamba.passes.intervals import Estimate, difference
from ioi_mamba.passes.sweep import Progress
from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import Pairs

SHARES = (0.05, 0.1, 0.2, 0.4)
"""Sizes of circuits, as shares of all items: as many thresholds of the score."""
WHOLE, ROLE = "item", "role"
CONSENSUS_OF, PLAIN, RANDOM, STABLE = "consensus", "first k", "random", "core"
ADVANTAGE = f"{CONSENSUS_OF} - {PLAIN}"
BY_ROLE = "consensus by role"
RANDOM_GRID = f"{_circuits.MIB_GRID}, random"
N_RANDOM = 3
DRAWN_FIRST = 20
"""Items that a chart shows, the most often included first."""


@dataclass(frozen=True)
class Options:
    """Options of circuit-stability."""

    draws: int = option(200, "draws of the pairs, whole clusters with replacement", at_least=2)
    steps: int = option(5, "points on the path from clean to corrupted, of eap-ig", at_least=1)
    variant: str = option(
        "paper", "of the scores: `ioi_mamba.circuits.attribution` says which to use", choices=tuple(VARIANTS)
    )
    method: str = option("eap-ig", _circuits.METHOD, choices=METHODS)
    ranking: str = option("signed", "most negative scores first, or largest sizes first", choices=ORDERS)
    ablation: str = ablation_option()


def default_pairs(tokenizer, n_pairs: int | None, seed: int) -> Pairs:
    """100 pairs of all five corruptions and all templates (200 evaluated prompts), so of unequal length."""
    return ioi.generate(tokenizer, n_pairs or 100, seed, symmetric=True)


def run(context: Context) -> pd.DataFrame:
    """Rows of items and of (edge, role) items, one for each size, and rows of circuits as `_circuits` has them.

    The method "exact" gives no scores by position, and so none by role.
    """
    model, options, stage = context.model, context.options, context.stage
    pairs, held_out, left_out = _circuits.with_range(model, context.pairs, context.held_out)
    few = _circuits.some_of(held_out, _circuits.CURVE_PROMPTS)
    by_position, universe = METHODS[options.method].by_position, universe_of(model, parts=True)
    scoring = Scoring(
        options.method, options.variant, options.steps, by_position, parts=True, ablation=options.ablation
    )
    items, scores = _circuits.attributed(context, pairs, scoring, stage(0, 0.5))
    whole = scores.sum(1)
    often_in = lambda each: inclusion(
        drawn_means(each, pairs.clusters, options.draws, context.seed), sizes_of(len(each)), options.ranking
    )
    frequency = often_in(whole)
    tables = [_table(WHOLE, items, whole, frequency, pairs)]
    judge = Evaluator(model, few, universe, ablation=options.ablation)
    ranking = Ranking.of(items_of(items), whole.mean(1), universe, options.ranking)
    rows = _judged(judge, ranking, items_of(items), frequency, stage(0.5, 0.8))
    rows += _on_the_grid(judge, ranking, stage(0.8, 0.9))
    if by_position:
        edges = items[items["part"].isna()].reset_index(drop=True)
        labelled, of_roles = _by_role(edges, scores[: len(edges)], pairs)
        often = often_in(of_roles)
        tables.append(_table(ROLE, labelled, of_roles, often, pairs))
        rows += _judged_by_role(context, few, labelled, often, stage(0.9, 1))
    table = pd.concat([*tables, pd.DataFrame(rows)], ignore_index=True)
    table = table.reindex(columns=dict.fromkeys((*table, "label")))
    texts = ("source", "target", "part", "label", "circuit", "sample", "measure")
    types = dict.fromkeys(("size", "n"), "Int64") | dict.fromkeys(texts, "str")
    chosen = {name: table[name].eq(True) for name in ("core", "kept")}
    return table.assign(**chosen).astype(types).assign(left_out=left_out, method=options.method)


def sizes_of(n_items: int) -> list[int]:
    """How many items the circuits have, of so many in all."""
    return [max(1, round(share * n_items)) for share in SHARES]


def _table(what: str, items: pd.DataFrame, per_pair: Tensor, frequency: Tensor, pairs: Pairs) -> pd.DataFrame:
    """One row for each item that some draw includes, and size."""
    # An item that no prompt has is in no table.
    found = [mean or Mean(math.nan, math.nan, math.nan, 0) for mean in means(per_pair, pairs.clusters)]
    numbers = pd.DataFrame(found, columns=["score", "low", "high", "n"], index=items.index)
    about = items.join(numbers).assign(overall=frequency.mean(0).numpy())
    parts = []
    for size, often in zip(sizes_of(len(items)), frequency.numpy(), strict=True):
        rows = about.assign(what=what, size=size, frequency=often, kept=often > CONSENSUS, core=often >= CORE)
        parts.append(rows[(rows["overall"] > 0) & (rows["n"] > 0)])
    return pd.concat(parts, ignore_index=True)


def _circuit(items: Sequence[Item], chosen: Tensor, universe: Universe) -> Circuit:
    """The circuit of the items that are chosen, Bool[item]."""
    return Circuit(frozenset(item for item, keep in zip(items, chosen.tolist(), strict=True) if keep), universe)


def _judged(
    judge: Evaluator, ranking: Ranking, items: Sequence[Item], frequency: Tensor, progress: Progress | None
) -> list[dict]:
    """Rows of the consensus circuit, the core, the plain first items and random circuits, of each size."""
    circuits: list[tuple[str, Circuit]] = []
    for often in frequency:
        consensus, core = (_circuit(items, chosen, judge.universe) for chosen in (often > CONSENSUS, often >= CORE))
        plain = ranking.top(len(consensus))
        circuits += [(CONSENSUS_OF, consensus), (STABLE, core), (PLAIN, plain)]
        circuits += [(RANDOM, circuit) for circuit in random_circuits(plain, N_RANDOM)]
    found = estimates(judge, [circuit.patched() for _, circuit in circuits], progress=progress)
    n, rows = len(judge.rows_kept), []
    for k, (name, circuit) in enumerate(circuits):
        own = {measure: estimate[[k]] for measure, estimate in found.items()}
        rows += _circuits.circuit_rows(name, len(circuit), "held out", own, n)
        if name == PLAIN:
            other = {measure: difference(estimate[[k - 2]], estimate[[k]]) for measure, estimate in found.items()}
            rows += _circuits.circuit_rows(ADVANTAGE, len(circuit), "held out", other, n)
    return rows


def _on_the_grid(judge: Evaluator, ranking: Ranking, progress: Progress | None) -> list[dict]:
    """CPR and CMD at the benchmark's sizes, of the ranking and of random circuits with as many items of each kind."""
    sizes, n_items = mib_sizes(len(ranking)), len(ranking)
    curves: list[tuple[str, str, list[Circuit]]] = []
    for measure, order in _circuits.AREAS.items():
        own = Ranking.of(ranking.items, ranking.scores, ranking.universe, order)
        first = [own.top(k) for k in sizes]
        curves.append((_circuits.MIB_GRID, measure, first))
        for r in range(N_RANDOM):
            drawn = [random_circuits(circuit, 1, seed=r * n_items + k)[0] for k, circuit in enumerate(first)]
            curves.append((RANDOM_GRID, measure, drawn))
    # Small sizes and all items are the same circuit in several curves: each is evaluated once.
    each = list(dict.fromkeys(circuit.items for *_, circuits in curves for circuit in circuits))
    sets = [Circuit(items, ranking.universe).patched() for items in each]
    f = estimates(judge, sets, progress=progress)["f"]
    rows = []
    for name, measure, circuits in curves:
        own = f[[each.index(circuit.items) for circuit in circuits]]
        rows += _circuits.area_rows(name, measure, MIB_FRACTIONS, own, len(judge.rows_kept))
    return rows


def _by_role(edges: pd.DataFrame, scores: Tensor, pairs: Pairs) -> tuple[pd.DataFrame, Tensor]:
    """(edge, role) items, and their scores [item, pair], NaN where a prompt has no token of the role.

    scores: [edge, pos, pair].
    """
    labels, layouts = by_role(pairs)
    found = torch.full((len(edges), len(labels), len(pairs)), torch.nan)
    for part, rows, at in layouts:
        own = scores[:, : part.clean.shape[1], rows]
        there = at.any(1).nonzero()[:, 0]
        found[:, there[:, None], rows] = torch.einsum("lp,epn->eln", at[there], own.float())
    items = edges.loc[edges.index.repeat(len(labels))].assign(label=labels * len(edges)).reset_index(drop=True)
    return items, found.flatten(0, 1)


def _judged_by_role(
    context: Context, few: Pairs, labelled: pd.DataFrame, frequency: Tensor, progress: Progress | None
) -> list[dict]:
    """Rows of the consensus circuits of (edge, role) items, evaluated layout by layout, each item at its role's tokens."""
    keys = list(labelled[["source", "target", "label"]].itertuples(index=False, name=None))
    kept = [{key for key, share in zip(keys, often.tolist(), strict=True) if share > CONSENSUS} for often in frequency]
    labels, layouts = by_role(few)
    found, ends, clusters = [], [], []
    for k, layout in enumerate(layouts):
        evaluator = Evaluator(
            context.model,
            layout.pairs,
            universe_of(context.model, n_positions=layout.pairs.clean.shape[1]),
            ablation=context.options.ablation,
        )
        sets = [_outside(evaluator, layout, labels, circuit) for circuit in kept]
        found.append(evaluator.scores(sets, share_of(progress, k / len(layouts), (k + 1) / len(layouts))))
        ends.append(evaluator.ends())
        clusters.append(few.clusters[layout.rows[evaluator.rows_kept]])
    scores = {name: torch.cat([each[name] for each in found], 1) for name in found[0]}
    own = torch.cat(clusters).unique(return_inverse=True)[1]
    together = estimates_of(scores, torch.cat(ends, 1), own)
    rows = []
    for k, circuit in enumerate(kept):
        one: dict[str, Estimate] = {measure: estimate[[k]] for measure, estimate in together.items()}
        rows += _circuits.circuit_rows(BY_ROLE, len(circuit), "held out", one, len(own))
    return rows


def _outside(evaluator: Evaluator, layout: Layout, labels: list[str], kept: set) -> list[Item]:
    """The items of one layout whose edge, at the role of their position, is not kept."""
    label = [labels[int(column.argmax())] for column in layout.at.T]
    return [
        item
        for item in evaluator.universe.items()
        if item.position is not None and (item.source, item.target, label[item.position]) not in kept
    ]


def _name(row: pd.Series) -> str:
    part = f"{row['source']} {row['part']}" if pd.notna(row["part"]) else f"{row['source']} to {row['target']}"
    return part if pd.isna(row["label"]) else f"{part} at {row['label']}"


def chart(table: pd.DataFrame) -> alt.HConcatChart:
    """How often items, and edges by role, are included."""
    panels: list[alt.TopLevelMixin] = []
    for what, title in ((WHOLE, "Edges and parts"), (ROLE, "Edges by role")):
        rows = table[table["what"] == what]
        if rows.empty:
            continue
        rows = rows.assign(item=[_name(row) for _, row in rows.iterrows()])
        order = rows.drop_duplicates("item").sort_values(by="overall", ascending=False, kind="stable")
        first = order["item"].head(DRAWN_FIRST).tolist()
        shown = rows[rows["item"].isin(first)].astype({"size": int})
        about = [
            f"share of draws that include it; {CORE:.0%} and more: core",
            *how_many(len(first), len(order), "items"),
        ]
        panels.append(
            matrix_heatmap(
                shown.assign(items=[f"{size} items" for size in shown["size"]]),
                x="items",
                y="item",
                color="frequency",
                x_order=[f"{size} items" for size in sorted(set(shown["size"]))],
                y_order=first,
                x_title="size of the circuit",
                y_title="item",
                color_title="inclusion frequency",
                cell=16,
                tooltip=("score", "low", "high", "core", "kept"),
            ).properties(title=alt.Title(title, subtitle=about))
        )
    return alt.hconcat(*panels, spacing=36).resolve_scale(color="shared")


def more(table: pd.DataFrame) -> dict[str, alt.LayerChart]:
    """f of consensus, first k and random circuits against size."""
    return {"Consensus, first and random circuits by size": _against_size(table)}


def _against_size(table: pd.DataFrame) -> alt.LayerChart:
    names = [CONSENSUS_OF, PLAIN, STABLE, RANDOM, BY_ROLE]
    rows = table[(table["measure"] == "f") & table["circuit"].isin(names)].astype({"size": int})
    total = rows.groupby("circuit")["size"].transform("max")
    columns = ["circuit", "size", "value", "low", "high", "n"]
    order = [name for name in names if name in set(rows["circuit"])]
    base = alt.Chart(check_size(rows.loc[total > 0, columns])).encode(
        x=alt.X("size:Q", title="items kept", scale=alt.Scale(type="symlog", constant=1)),
        color=alt.Color("circuit:N", sort=order, legend=alt.Legend(orient="top", title=None)),
        tooltip=[
            "circuit:N",
            "size:Q",
            *(alt.Tooltip(f"{c}:Q", format=".3f") for c in ("value", "low", "high")),
            "n:Q",
        ],
    )
    return (
        alt.layer(
            base.mark_rule(strokeWidth=1.5, opacity=0.6).encode(y=alt.Y("low:Q", title="faithfulness f"), y2="high:Q"),
            base.mark_point(filled=True, size=55, opacity=0.9).encode(
                y="value:Q", shape=alt.Shape("circuit:N", sort=order, legend=None)
            ),
        )
        .properties(width=PLOT_WIDTH, height=240)
        .properties(title=alt.Title("On held-out prompts", subtitle="rules: 95 % over pairs"))
    )


def findings(table: pd.DataFrame) -> list[str]:
    """How much of a circuit is core, whether the consensus is better than the first k, and MIB's areas beside random ones."""
    sentences = _circuits.how_scored(table)
    for what, of in ((WHOLE, "edges and parts"), (ROLE, "edges by role")):
        rows = table[table["what"] == what]
        sizes = [
            f"of {size} {of} {int(part['core'].sum())} are core and {int(part['kept'].sum())} in the consensus, of "
            f"{int((part['frequency'] > 0).sum())} that some draw includes"
            for size, part in rows.groupby("size")
        ]
        if sizes:
            *smaller, largest = sizes
            sentences.append(f"Over draws of the pairs, {largest}.")
            if smaller:
                sentences.append(f"In smaller circuits, {'; '.join(smaller)}.")
            core = rows[rows["core"]].drop_duplicates(["source", "target", "part", "label"])
            core = core.reindex(core["score"].abs().sort_values(ascending=False).index).head(5)
            names = ", ".join(_name(row) for _, row in core.iterrows())
            sentences.append(f"The strongest of the core are {names}." if names else f"No {of} are core at any size.")
    one = lambda circuit: table[(table["circuit"] == circuit) & (table["measure"] == "f")]
    for (_, gain), (_, consensus) in zip(one(ADVANTAGE).iterrows(), one(CONSENSUS_OF).iterrows(), strict=True):
        if gain["low"] == gain["high"] == 0:
            told = "the same as as many first items"
        else:
            verdict = "better" if gain["low"] > 0 else "worse" if gain["high"] < 0 else "not told apart from them"
            told = f"against as many first items {verdict}, difference {_circuits.interval_text(gain)}"
        sentences.append(
            f"The consensus circuit of {consensus['size']} items has f {_circuits.interval_text(consensus)}, {told} "
            f"({consensus['n']} held-out prompts)."
        )
    areas = []
    for measure in _circuits.AREAS:
        own, drawn = (
            table[(table["circuit"] == c) & (table["measure"] == measure)] for c in (_circuits.MIB_GRID, RANDOM_GRID)
        )
        areas.append(
            f"{measure.upper()} is {_circuits.interval_text(own.iloc[0])}, of random circuits {drawn['value'].mean():.3f} "
            f"({drawn['value'].min():.3f} to {drawn['value'].max():.3f} of {len(drawn)})"
        )
    return [*sentences, f"At the sizes of the MIB benchmark, {'; '.join(areas)}.", *_circuits.left_out_sentence(table)]


EXPERIMENT = Experiment(
    name="circuit-stability",
    title="Circuits one can trust",
    paper="D.1",
    question="Which items of a circuit would other prompts choose too, and is what they agree on a better circuit?",
    look_for=(
        "Rows that are dark in every column: items of every circuit. Rows that pale to the left are ranked by few prompts. Under More, "
        "whether the consensus lies above the first k, and how far both are from random circuits of their kinds."
    ),
    method=(
        "Patching an item replaces its value by {written}. Every edge and part is scored by attribution on each pair.\n"
        "Pairs are drawn anew, whole clusters with replacement. Inclusion frequency: the share of draws in which an item is "
        "among the first k.\n"
        f"Consensus: items of more than {CONSENSUS:.0%} of draws; core: of {CORE:.0%} and more. By role: scores at all tokens of "
        "a role are summed.\n"
        "f, CPR (signed ranking) and CMD (absolute) on held-out prompts; random circuits have as many items of each kind."
    ),
    needs=_circuits.NEEDS,
    options=Options,
    columns=(
        Column("what", "text", "item, role (an edge at a role's tokens), or circuit"),
        _circuits.SOURCE,
        _circuits.TARGET,
        _circuits.PART,
        Column("label", "text", "the role, of an edge by role", nullable=True),
        Column("size", "int", "items of the circuit", nullable=True),
        Column("frequency", "float", "share of draws that include the item, 0..1", nullable=True),
        Column("overall", "float", "its mean over the sizes", nullable=True),
        Column("core", "bool", f"the item is in {CORE:.0%} of draws or more"),
        Column("kept", "bool", "the item is in the consensus circuit"),
        _circuits.SCORE,
        *(c for c in _circuits.CIRCUIT_ROWS if c.name not in ("what", "size")),
    ),
    draws={ioi.TASK.name: default_pairs},
    run=run,
    chart=chart,
    more=more,
    findings=findings,
)
