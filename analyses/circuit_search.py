"""Which edges and parts survive an exact search? ACDC from the edges that attribution keeps, down to conv slices.

Paper appendix D.2. Starts from the pruned circuit of `edge-attribution` (all parts undecided) and decides every edge
and part by the drop of the normalized logit diff when it is patched (`ioi_mamba.acdc`). The published search lost
conv-slice removals from its baseline, and compared an accuracy on training pairs with one on held-out pairs; here
removals count, and both accuracies are reported.

The paper hoped that attribution could one day do without the search. So the same pairs are also attributed down to
parts, by EAP-IG and by plain EAP (one gradient instead of four), and the first items of either ranking, as many as a
search from the whole graph keeps, are held against what it keeps, on held-out pairs and at several thresholds.
`python -m bench.circuits` measures what each takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import altair as alt
import pandas as pd

from ioi_mamba.analyses import _circuits
from ioi_mamba.charts import circuit_charts
from ioi_mamba.charts.circuit_axes import node_place
from ioi_mamba.charts.drawing import matrix_heatmap
from ioi_mamba.charts.theme import EFFECTS
from ioi_mamba.circuits.faithfulness import estimates, random_circuits
from ioi_mamba.circuits.graph import Circuit, items_of, universe_of
from ioi_mamba.circuits.methods import EAP, EAP_IG, EXACT, METHODS
from ioi_mamba.circuits.ranking import Ranking
from ioi_mamba.circuits.scoring import Evaluator
from ioi_mamba.circuits.search import acdc
from ioi_mamba.experiments.experiment import Column, Context, Experiment, share_of
from ioi_mamba.experiments.options import ablation_option, option
from ioi_mamba.passes.intervals import difference
from ioi_mamba.passes.sweep import Progress
from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import Pairs

SEARCH = "search"
STARTED = "started with"
RANKINGS = tuple(method.label for method in (EAP_IG, EAP, EXACT))
"""Circuits of the comparison, beside what a search keeps: the first items of a ranking by one of the methods."""
N_RANDOM = 3
THRESHOLDS = (1e-3, 1e-2, 1e-1)
"""Thresholds of the searches that are compared: each keeps another number of items."""


@dataclass(frozen=True)
class Options:
    """Options of circuit-search."""

    target: float = option(0.85, "the accuracy that the edges it starts from must exceed", at_least=0, at_most=1)
    threshold: float = option(1e-4, "the largest drop of the normalized logit diff that removes an item", at_least=0)
    compare_prompts: int = option(
        60, "about how many pairs search and attribution are compared on; 0: no comparison", at_least=0
    )
    method: str = option("eap-ig", _circuits.METHOD, choices=METHODS)
    resume: bool = option(True, "start each test at the layer it is about: same values, faster")
    ablation: str = ablation_option()


def starting_circuit(context: Context, pairs: Pairs) -> Circuit:
    """The smallest EAP-IG circuit of edges above the target, pruned, with every part of every layer."""
    model, options = context.model, context.options
    edges = _circuits.scored(context, pairs, method=options.method, parts=False)
    train = Evaluator(model, pairs, universe_of(model), ablation=options.ablation)
    circuit = _circuits.chosen_circuit(train, edges, options.target)
    universe = universe_of(model, parts=True)
    parts = {item for item in universe.items() if item.part is not None}
    return Circuit(circuit.pruned().items | parts, universe)


def first_pruned(ranking: Ranking, size: int) -> Circuit:
    """The first items of a ranking, as many as leave at most `size` when pruned to paths from embed to output."""
    best = ranking.top(0)
    for k in range(size, len(ranking) + 1):
        circuit = ranking.top(k).pruned()
        if len(circuit) > size:
            break
        best = circuit
    return best


def run(context: Context) -> pd.DataFrame:
    """One row an item, with its `drop` and its attribution `score` (on about PART_PROMPTS prompts); and rows of circuits.

    Search and attribution are compared at each of THRESHOLDS (`threshold` of these rows).
    """
    model, options, stage = context.model, context.options, context.stage
    pairs, held_out, left_out = _circuits.with_range(model, context.pairs, context.held_out)
    some = _circuits.some_of(pairs, _circuits.PART_PROMPTS)
    scores = _circuits.scored(context, some, method=options.method, parts=True, progress=stage(0, 0.1))
    start = starting_circuit(context, pairs)
    search = acdc(
        model,
        pairs,
        start=start,
        threshold=options.threshold,
        resume=options.resume,
        ablation=options.ablation,
        progress=stage(0.1, 0.4),
    )
    table, circuit = search.table, search.circuit()
    train, held = (Evaluator(model, p, start.universe, ablation=options.ablation) for p in (pairs, held_out))
    rows = _circuits.faithfulness_rows(train, held, circuit)
    rows += _circuits.circuit_rows(STARTED, len(start), "train", estimates(train, [start.patched()]), len(pairs))
    rows.append(
        {"what": "circuit", "circuit": "kept", "size": len(circuit), "sample": "train", "measure": "tests"}
        | {"value": table.attrs["tests"], "n": len(pairs)}
    )
    if options.compare_prompts:
        rows += compare(context, _circuits.some_of(pairs, options.compare_prompts), held, stage(0.4, 1))
    listed, score_of = items_of(table), dict(zip(scores.items, scores.scores, strict=True))
    started = [item in start for item in listed]
    out = table.drop(columns="position").assign(
        score=[score_of[item] for item in listed], started=started, method=options.method
    )
    out = _circuits.with_target(out, rows, options.target, STARTED)
    return _circuits.table_of(out, rows, columns=("threshold",)).assign(left_out=left_out)


def less_search(ranking: str) -> str:
    """The name of what a ranking's circuit has more than the search's."""
    return f"{ranking} - {SEARCH}"


def compare(context: Context, pairs: Pairs, held: Evaluator, progress: Progress | None = None) -> list[dict]:
    """Rows of SEARCH, of rankings, their differences and random circuits, at the sizes a search of the whole graph keeps.

    The rankings are those of the option `method`, and beside EAP-IG that of plain EAP, which takes a quarter of its passes.
    """
    method = context.options.method
    rankings = {
        METHODS[each].label: _circuits.scored(context, pairs, method=each, parts=True)
        for each in dict.fromkeys((method, *(["eap"] if method == "eap-ig" else [])))
    }
    rows = []
    for k, threshold in enumerate(THRESHOLDS):
        report = share_of(progress, k / len(THRESHOLDS), (k + 1) / len(THRESHOLDS))
        searched = acdc(
            context.model, pairs, threshold=threshold, ablation=context.options.ablation, progress=report
        ).circuit()
        circuits = {SEARCH: searched}
        circuits |= {name: first_pruned(ranking, len(searched)) for name, ranking in rankings.items()}
        drawn = random_circuits(searched, N_RANDOM)
        scores = estimates(held, [circuit.patched() for circuit in (*circuits.values(), *drawn)])
        one = {name: {m: e[[i]] for m, e in scores.items()} for i, name in enumerate(circuits)}
        sizes = {name: len(circuit) for name, circuit in circuits.items()}
        for name in rankings:
            one[less_search(name)] = {m: difference(e, one[SEARCH][m]) for m, e in one[name].items()}
        here = []
        one["random"] = {m: e[len(circuits) :] for m, e in scores.items()}
        for name, own in one.items():
            size = sizes.get(name, len(searched))
            here += _circuits.circuit_rows(name, size, "held out", own, len(held.rows_kept))
        for name in rankings:
            overlap = {"what": "circuit", "circuit": name, "size": sizes[name], "sample": "train", "measure": "overlap"}
            here.append(overlap | {"value": searched.jaccard(circuits[name]), "n": len(pairs)})
        rows += [row | {"threshold": threshold} for row in here]
    return rows


def chart(table: pd.DataFrame) -> alt.HConcatChart:
    """The drop of every part, layer by part, and of every edge."""
    items = _circuits.item_rows(table)
    parts = items[items["part"].notna()].assign(drop=lambda t: t["drop"].fillna(0.0))
    order = list(dict.fromkeys(parts["part"]))
    layers = sorted(set(parts["source"]), key=node_place)
    heatmap = matrix_heatmap(
        parts,
        x="part",
        y="source",
        color="drop",
        x_order=order,
        y_order=layers,
        x_title="part",
        y_title="layer",
        color_title="drop when patched",
        colors=EFFECTS,
        domain=(0.0, max(0.05, float(parts["drop"].max()))),
        text=len(layers) <= 12,
        cell=34 if len(layers) <= 12 else 14,
        tooltip=("kept", "score"),
    ).properties(title="Parts of the layers")
    edges = items[items["part"].isna()]
    both = alt.hconcat(heatmap, circuit_charts.searched_edges(edges), spacing=36)
    return both.resolve_scale(color="independent", shape="independent")


def more(table: pd.DataFrame) -> dict[str, alt.TopLevelMixin]:
    """Search against attribution at the same size."""
    compared = table[table["threshold"].notna()]
    if compared.empty:
        return {}
    is_difference = compared["circuit"].isin(map(less_search, RANKINGS))
    return {"Search and attribution": circuit_charts.same_size(compared[~is_difference], compared[is_difference])}


def findings(table: pd.DataFrame) -> list[str]:
    """How much is kept of what, how the circuit does, and whether attribution could have done it."""
    items = _circuits.item_rows(table)
    kept = items[items["kept"]]
    edges, parts = int(kept["part"].isna().sum()), kept["part"].value_counts().sort_index().to_dict()
    listed = ", ".join(f"{n} {name}" for name, n in parts.items()) or "no part"
    tests = _circuits.of_circuit(table, "kept", "tests", "train").iloc[0]
    best = kept.nlargest(3, "drop")
    names = ", ".join(
        f"{r['source']} {r['part']}" if pd.notna(r["part"]) else f"{r['source']} to {r['target']}"
        for _, r in best.iterrows()
    )
    compared = table["threshold"].isna()
    out = [
        _circuits.lead(table[compared], int(items["started"].sum()), "edges and parts"),
        *_circuits.how_scored(items),
        f"The search keeps {edges} edges and, inside layers, {listed} ({tests['value']:.0f} tests).",
        f"The largest drops are those of {names}.",
        *_circuits.how_it_does(
            table[table["threshold"].isna()], int(items["started"].sum()), "edges and parts it began with", "edges"
        ),
    ]
    for _, rows in table[table["threshold"].notna()].groupby("threshold", sort=True):
        out.append(_comparison(rows))
    return out


def _comparison(table: pd.DataFrame) -> str:
    """Which is closer to the model at one size, search or a ranking, or that their intervals do not tell."""
    one = lambda name, measure, sample="held out": _circuits.of_circuit(table, name, measure, sample).iloc[0]
    search, compared = one(SEARCH, "f"), []
    for name in (name for name in RANKINGS if name in set(table["circuit"])):
        f, accuracy = one(less_search(name), "f"), one(less_search(name), "accuracy")
        if one(name, "overlap", "train")["value"] == 1:
            compared.append(f"{name} chooses the same items")
            continue
        if f["low"] <= 0 <= f["high"]:
            verdict = "cannot be told apart from it"
        else:
            verdict = f"keeps {'more' if f['value'] > 0 else 'less'} of the logit difference"
        clause = (
            f"{name} {verdict}, f {_circuits.interval_text(one(name, 'f'))}, difference {_circuits.interval_text(f)}"
        )
        if not accuracy["low"] <= 0 <= accuracy["high"]:
            clause += f", in accuracy {_circuits.interval_text(accuracy)}"
        compared.append(clause)
    return (
        f"At {search['size']} of all items (threshold {search['threshold']:g}) the search has f "
        f"{_circuits.interval_text(search)}; {'; '.join(compared)} ({search['n']} held-out prompts)."
    )


EXPERIMENT = Experiment(
    name="circuit-search",
    title="Circuit search",
    paper="D.2",
    question="Which edges, slices, states and gates are needed?",
    look_for=(
        "Which parts of a layer have a large drop: a layer that keeps conv-1 alone shifts what it reads by one. Below, "
        "where the intervals of search and attribution part: there one of them chooses better at the same size."
    ),
    method=(
        "From the edges that EAP-IG keeps, back from the output: patch each item on top of all removed so far. What is patched "
        "is replaced by {written}.\n"
        "A drop of the normalized logit diff of at most the threshold removes it; else it is kept with its drop.\n"
        "Comparison, on held-out pairs: a search of the whole graph, and as many first items of EAP-IG and of EAP with "
        "parts."
    ),
    needs=_circuits.NEEDS,
    options=Options,
    columns=(
        *(_circuits.SOURCE, _circuits.TARGET, _circuits.PART, _circuits.KEPT),
        Column("drop", "float", "baseline minus metric with the item alone patched; empty if removed", nullable=True),
        *_circuits.CIRCUIT_ROWS,
    ),
    draws={ioi.TASK.name: _circuits.default_pairs},
    run=run,
    chart=chart,
    findings=findings,
    more=more,
)
