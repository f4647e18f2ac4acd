"""Which edges between layers matter? EAP-IG over all positions, and the smallest circuit that still does the task.

Paper appendix D.1. Every edge (and every conv slice, ssm and skip inside a layer) is scored by integrated gradients
(`ioi_mamba.circuits.attribution`); edges are ranked, most negative first, and the smallest number that keeps the accuracy
among names above the target on the training pairs is found by binary search. The circuit is then evaluated on
held-out pairs. Every item is also patched alone, on fewer prompts: its exact effect, which attribution estimates.
Parts are scored but not selected: the circuit is one of edges, as in the paper.

Not repeated here: published scores carry a factor of one over the batch size, 1/30, and 1/10 in the last batch, whose
pairs so weigh three times as much; here every pair weighs the same. And plain EAP as published is degenerate.

Scores of parts do not add up to those of edges. An edge into a layer acts through all of its parts, a part carries all
edges into its layer, both are products with one gradient of a curved function, and edges are scored on a path on which
parts are not patched. Each ranks among its own kind.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import altair as alt
import pandas as pd
import torch
from torch import Tensor

from ioi_mamba.analyses import _circuits
from ioi_mamba.analyses._effects import shared_positions
from ioi_mamba.charts import circuit_charts
from ioi_mamba.circuits.attribution import ranked
from ioi_mamba.circuits.faithfulness import rank_correlation
from ioi_mamba.circuits.graph import items_of, universe_of
from ioi_mamba.circuits.methods import METHODS
from ioi_mamba.circuits.methods import Options as Scoring
from ioi_mamba.circuits.ranking import Ranking
from ioi_mamba.circuits.scoring import Evaluator
from ioi_mamba.experiments.experiment import Context, Experiment
from ioi_mamba.experiments.options import option
from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import Pairs

LARGE = 0.001  # of the normalized logit diff: smaller exact effects are told apart by attribution, and do not matter
LARGE_EDGES = f"edges with an effect of {LARGE} or more"


@dataclass(frozen=True)
class Options(_circuits.AttributionOptions):
    """Options of edge-attribution."""

    part_prompts: int = option(_circuits.PART_PROMPTS, "about how many pairs parts are scored on", at_least=1)
    exact_prompts: int = option(25, "of these, how many exact effects are measured on", at_least=1)


def run(context: Context) -> pd.DataFrame:
    """Scores of all edges and parts; `kept` marks the smallest circuit of edges with train accuracy > target.

    Rows of items: edges by rank, then parts (no rank, never kept), each over all positions (position null) with
    `exact`, its effect alone on n_exact prompts, and `estimate`, its attribution on the same ones; then edges at every
    position, with a score only. Rows of circuits as in `ioi_mamba.analyses._circuits`, and the Spearman correlation of
    |estimate| and |exact|. The method "exact" gives no scores by position.
    """
    model, options = context.model, context.options
    pairs, held_out, left_out = _circuits.with_range(model, context.pairs, context.held_out)
    stage, method = context.stage, options.method
    by_position, ablation = METHODS[method].by_position, options.ablation
    scoring = Scoring(method, options.variant, options.steps, positions=by_position, ablation=ablation)
    items, per_pair = _circuits.attributed(context, pairs, scoring, stage(0, 0.4))
    some = _circuits.some_of(pairs, options.part_prompts)
    inner, per_part = _circuits.attributed(context, some, scoring._replace(parts=True), stage(0.4, 0.5))
    inside = torch.tensor(inner["part"].notna().to_numpy())
    few = _circuits.some_of(some, options.exact_prompts)
    alone = Evaluator(model, few, universe_of(model, parts=True), ablation=ablation)
    exact = alone.exact_effects(items_of(inner), stage(0.5, 0.8)).mean(1)
    of_some = _circuits.every(len(pairs), options.part_prompts)
    of_few = _circuits.every(len(some), options.exact_prompts)
    everywhere, clusters = per_pair.sum(1), pairs.clusters
    totals = pd.concat(
        [
            _circuits.with_scores(kind, scores, of).assign(
                estimate=there[:, of_few].mean(1).numpy(), exact=effects.numpy()
            )
            for kind, scores, of, there, effects in (
                (items, everywhere, clusters, everywhere[:, of_some], exact[~inside]),
                (
                    inner[inner["part"].notna()],
                    per_part[inside].sum(1),
                    some.clusters,
                    per_part[inside].sum(1),
                    exact[inside],
                ),
            )
        ],
        ignore_index=True,
    ).assign(n_exact=len(few))
    is_edge = totals["part"].isna()
    edges = ranked(totals[is_edge], options.ranking)
    train = Evaluator(model, pairs, universe_of(model), ablation=ablation)
    order = Ranking.from_frame(edges, train.universe)
    circuit = _circuits.chosen_circuit(train, order, options.target)
    edges["kept"] = edges["rank"] <= len(circuit)
    held = train if held_out is pairs else Evaluator(model, held_out, train.universe, ablation=ablation)
    rows = _circuits.faithfulness_rows(train, held, circuit, order, stage(0.8, 1))
    rows += _circuits.jaccard_rows(train, items, everywhere, options.target, options.ranking)
    large = edges[edges["exact"].abs() >= LARGE]
    for name, chosen in (("edges", edges), (LARGE_EDGES, large), ("edges and parts", totals)):
        rows += [_spearman_row(name, chosen)] if len(chosen) > 2 else []
    by_position = [_by_position(items, per_pair, pairs)] if by_position else []
    table = pd.concat([edges, totals[~is_edge], *by_position], ignore_index=True)
    table = table.reindex(columns=dict.fromkeys((*table, "position", "label")))
    table = _circuits.with_target(table.assign(ranking=options.ranking, method=method), rows, options.target)
    return _circuits.table_of(table, rows).assign(left_out=left_out)


def _spearman_row(name: str, totals: pd.DataFrame) -> dict:
    """The rank correlation of |estimate| and |exact|.

    It has no interval: resampled pairs add noise to items whose effects hardly differ, and all resamples come out lower.
    """
    score, exact = (torch.tensor(totals[column].abs().to_numpy()) for column in ("estimate", "exact"))
    row = {"what": "circuit", "circuit": name, "size": len(totals), "sample": "train", "measure": "spearman"}
    return row | {"value": float(rank_correlation(score, exact)), "n": int(totals["n_exact"].iloc[0])}


def _by_position(items: pd.DataFrame, per_pair: Tensor, pairs: Pairs) -> pd.DataFrame:
    """One row an item and position: its score there; of prompts of several layouts by the role of a position."""
    sums: dict[tuple[int, str], list[Tensor]] = {}
    for _, rows, places in shared_positions(pairs):
        for p, place in places.items():
            sums.setdefault(place, []).append(per_pair[:, p, rows])
    tables = []
    for position, label in sorted(sums, key=lambda place: place[0]):
        scores = torch.cat(sums[position, label], 1)
        here = items.assign(position=position, label=label, score=scores.mean(1).numpy(), n=scores.shape[1])
        tables.append(here)
    return pd.concat(tables).sort_index(kind="stable").reset_index(drop=True)


def chart(table: pd.DataFrame):
    """The linked matrices, with what there is of the chosen edge."""
    items = _circuits.item_rows(table)
    whole = circuit_charts.linked_matrices(items).resolve_scale(opacity="independent")
    return circuit_charts.with_edge_selection(whole, items)


def more(table: pd.DataFrame) -> dict[str, alt.TopLevelMixin]:
    """Exact effects against attribution, and the curve over sizes."""
    items = _circuits.item_rows(table)
    return {
        "Exact effect and attribution": circuit_charts.exact_scatter(items[items["position"].isna()]),
        "How few are enough": circuit_charts.size_curves(table[table["what"] == "circuit"], "edges kept"),
    }


def findings(table: pd.DataFrame) -> list[str]:
    """The strongest edges, whether attribution ranks as patching does, the size of the circuit and how it does."""
    items = _circuits.item_rows(table)
    totals = items[items["position"].isna()]
    edges = totals[totals["part"].isna()].sort_values("rank")
    names = ", ".join(
        f"{r['source']} to {r['target']} ({r['score']:z.3f}, exact {r['exact']:z.3f})"
        for _, r in edges.head(5).iterrows()
    )
    out = [
        _circuits.lead(table, len(edges), "edges"),
        *_circuits.how_scored(totals),
        f"The strongest edges are {names}.",
    ]
    correlations = [
        f"{row['value']:.3f} over all {row['size']} {row['circuit']}"
        for _, row in table[table["measure"] == "spearman"].iterrows()
    ]
    slope = float((edges["estimate"] * edges["exact"]).sum() / (edges["exact"] ** 2).sum())
    out.append(
        f"The rank correlation of |attribution| with the exact effect of patching one item alone is "
        f"{', '.join(correlations)} ({edges['n_exact'].iloc[0]} prompts); edge scores are about {slope:.2f} of exact effects."
    )
    parts = totals[totals["part"].notna()].sort_values("score")
    names = ", ".join(f"{r['source']} {r['part']} ({r['score']:z.3f})" for _, r in parts.head(3).iterrows())
    out.append(f"Inside layers the strongest parts are {names}.")
    return out + _circuits.how_it_does(table, len(edges), "edges")


EXPERIMENT = Experiment(
    name="edge-attribution",
    title="Edges between layers",
    paper="D.1",
    question="Which edges are needed, and how few are enough?",
    look_for=(
        "Strong cells in the matrix (row = from, column = to); click one for its positions, the parts of its two layers "
        "and its exact effect. Points on a rising line: attribution ranks edges as patching them does. How fast the "
        "curve falls when fewer edges are kept."
    ),
    method=(
        "Patching i -> j replaces output_i, in input_j, by {written}. Score: gradient at input_j times that change, averaged "
        "over 5 points (EAP-IG).\n"
        "Exact effect: change of the normalized logit diff with the edge or part alone patched, on fewer prompts.\n"
        "Edges outside the circuit are patched; accuracy is among the candidates of the pair; intervals are 95 % over "
        "pairs."
    ),
    needs=_circuits.NEEDS,
    options=Options,
    columns=(
        *(_circuits.SOURCE, _circuits.TARGET, _circuits.SCORE, _circuits.RANK, _circuits.KEPT),
        *(replace(column, later=True) for column in (_circuits.PART, _circuits.POSITION, _circuits.LABEL)),
        *_circuits.CIRCUIT_ROWS,
    ),
    draws={ioi.TASK.name: _circuits.default_pairs},
    run=run,
    chart=chart,
    findings=findings,
    more=more,
)
