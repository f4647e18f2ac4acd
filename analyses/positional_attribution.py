"""Which edges matter at which positions? EAP-IG per position, and the smallest circuit of (edge, position) items.

Paper section 5 and appendix D.3: as `edge-attribution`, but the product of gradient and difference is summed over D
only, so an edge has a score at every position and is patched at single positions. Out of the circuit the paper then
reads which names each layer misses (D.3.1 to D.3.5), and removes from it every edge that leaves the bottleneck
before the last position (accuracy 85.2 to 83.8 % there, 0.877 to 0.873 normalized logit diff).

An item is an edge at one position, which is one word only in prompts of one layout: of prompts of several, those of the
commonest are taken, the others counted (`other_layouts`).
"""

from __future__ import annotations

from dataclasses import dataclass

import altair as alt
import pandas as pd

from ioi_mamba.analyses import _circuits, _missing_names
from ioi_mamba.charts import circuit_charts, position_charts
from ioi_mamba.charts.circuit_axes import mixer_node, node_place
from ioi_mamba.circuits.attribution import ranked
from ioi_mamba.circuits.faithfulness import estimates
from ioi_mamba.circuits.graph import Circuit, universe_of
from ioi_mamba.circuits.methods import Options as Scoring
from ioi_mamba.circuits.ranking import Ranking
from ioi_mamba.circuits.scoring import Evaluator
from ioi_mamba.errors import InputError
from ioi_mamba.experiments.experiment import Context, Experiment
from ioi_mamba.experiments.needs import Need
from ioi_mamba.experiments.options import option
from ioi_mamba.experiments.story import MARKS, Kind, Told
from ioi_mamba.model.families import sizes_of
from ioi_mamba.passes.intervals import difference
from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import Pairs

LAST_ONLY, LOST = "kept, bottleneck at last only", "kept - bottleneck at last only"
"""The circuit without the edges that leave the bottleneck before the last position, and what it loses by that."""


@dataclass(frozen=True)
class Options(_circuits.AttributionOptions):
    """Options of positional-attribution."""

    layer: int | None = option(None, "the bottleneck; none: the layer with the most |score| into it", at_least=0)


def run(context: Context) -> pd.DataFrame:
    """Scores of all (edge, position) items; `kept` marks the smallest circuit with train accuracy > target.

    Rows of circuits as in `ioi_mamba.analyses._circuits`, and LAST_ONLY and LOST, the bottleneck being `layer`. Raises
    InputError for a layer the model does not have, and where no held-out prompt has the commonest layout of the pairs.
    """
    model, pairs, held_out, options = context.model, context.pairs, context.held_out, context.options
    layer, method, target, ranking = options.layer, options.method, options.target, options.ranking
    n_layers = sizes_of(model).n_layers
    if layer is not None and not 0 <= layer < n_layers:
        raise InputError(f"The model has layers 0 to {n_layers - 1}, not {layer}.")
    given = len(pairs) + (0 if held_out is None else len(held_out))
    pairs, held_out = _one_layout(pairs, held_out)
    other_layouts = given - len(pairs) - (0 if held_out is None else len(held_out))
    pairs, held_out, left_out = _circuits.with_range(model, pairs, held_out)
    scoring = Scoring(method, options.variant, options.steps, positions=True, ablation=options.ablation)
    items, per_pair = _circuits.attributed(context, pairs, scoring, context.stage(0, 0.7))
    n_items, n_positions, _ = per_pair.shape
    each = items.drop(columns="part").loc[items.index.repeat(n_positions)].reset_index(drop=True)
    each["position"] = list(range(n_positions)) * n_items
    each["label"] = pairs.position_labels() * n_items
    per_item = per_pair.flatten(0, 1)
    table = ranked(_circuits.with_scores(each, per_item, pairs.clusters), ranking)
    universe = universe_of(model, n_positions=n_positions)
    train = Evaluator(model, pairs, universe, ablation=options.ablation)
    order = Ranking.from_frame(table, universe)
    circuit = _circuits.chosen_circuit(train, order, target)
    table["kept"] = table["rank"] <= len(circuit)
    table["bottleneck"] = busiest_layer(table) if layer is None else layer
    held = train if held_out is pairs else Evaluator(model, held_out, universe, ablation=options.ablation)
    rows = _circuits.faithfulness_rows(train, held, circuit, order, context.stage(0.7, 1))
    rows += _circuits.jaccard_rows(train, each, per_item, target, ranking)
    reduced = without_early_output(circuit, table["bottleneck"].iloc[0])
    for sample, evaluator in (("train", train), ("held out", held)):
        both = estimates(evaluator, [circuit.patched(), reduced.patched()])
        without = {measure: estimate[[1]] for measure, estimate in both.items()}
        lost = {measure: difference(estimate[[0]], estimate[[1]]) for measure, estimate in both.items()}
        for name, found in ((LAST_ONLY, without), (LOST, lost)):
            rows += _circuits.circuit_rows(name, len(reduced), sample, found, len(evaluator.rows_kept))
    table = table.assign(ranking=ranking, method=method, other_layouts=other_layouts)
    return _circuits.table_of(_circuits.with_target(table, rows, target), rows).assign(left_out=left_out)


def _one_layout(pairs: Pairs, held_out: Pairs | None) -> tuple[Pairs, Pairs | None]:
    """The pairs of the commonest layout (the first of equals), and the held-out pairs that have the same one."""
    own = max(pairs.layouts(), key=len)
    if held_out is None:
        return own, None
    layout = lambda part: (part.clean.shape[1], {role: int(at[0]) for role, at in part.roles.items()})
    same = [part for part in held_out.layouts() if layout(part) == layout(own)]
    if not same:
        raise InputError(
            f"No held-out prompt has the layout of the pairs ({own.clean.shape[1]} tokens, words at the same "
            "positions): give held-out prompts of the same templates."
        )
    return own, same[0]


def busiest_layer(items: pd.DataFrame) -> int:
    """The layer after 0 with the most |score| on edges into it before the last position."""
    of_mixers = items["target"].map(lambda node: node_place(node)[0] > 0 and node.partition(".")[2] in ("", "mamba"))
    inner = items[of_mixers & (items["target"] != "output") & (items["position"] < items["position"].max())]
    if inner.empty:
        return 0
    return int(node_place(inner["score"].abs().groupby(inner["target"]).sum().idxmax())[0])


def without_early_output(circuit: Circuit, layer: int) -> Circuit:
    """The circuit without the edges that leave `layer` at any position but the last."""
    last = (circuit.universe.n_positions or 1) - 1
    node = mixer_node(circuit.universe.nodes, layer)
    early = frozenset(i for i in circuit.items if i.source == node and i.position != last)
    return circuit - Circuit(early, circuit.universe)


def chart(table: pd.DataFrame) -> alt.HConcatChart:
    """The circuit on its layers and positions."""
    return position_charts.circuit_graph(_circuits.item_rows(table))


def more(table: pd.DataFrame) -> dict[str, alt.TopLevelMixin]:
    """One node of the circuit, missing names, the strongest edges, the curve."""
    items = _circuits.item_rows(table)
    missing = _missing_names.missing_names(items, int(items["bottleneck"].iloc[0]))
    strips = {"Names that layers get": position_charts.presence_strips(missing)} if len(missing) else {}
    curves = circuit_charts.size_curves(table[table["what"] == "circuit"], "(edge, position) items kept")
    return {
        "One node": position_charts.node_view(items),
        **strips,
        "The strongest edges": position_charts.strongest_edges(items),
        "How few are enough": curves,
    }


def findings(table: pd.DataFrame) -> list[str]:
    """The strongest items, how the circuit does, what the bottleneck's early output is worth, and missing names."""
    items = _circuits.item_rows(table)
    names = ", ".join(
        f"{r['source']} to {r['target']} at {r['label']} ({r['score']:z.3f})"
        for _, r in items.sort_values("rank").head(5).iterrows()
    )
    layer = int(items["bottleneck"].iloc[0])
    leaving = items[items["kept"] & (items["source"] == mixer_node(items["target"], layer))]
    early = int((leaving["position"] < items["position"].max()).sum())
    out = [
        _circuits.lead(table, len(items), "edges at tokens"),
        *_circuits.how_scored(items),
        f"The strongest items are {names}.",
        *_circuits.how_it_does(table, len(items), "(edge, position) items"),
    ]
    if early:
        changes = []
        for sample in ("train", "held out"):
            for measure, form in (("accuracy", ".1%"), ("normalized_logit_diff", ".3f")):
                before, after = (
                    _circuits.of_circuit(table, name, measure, sample)["value"].iloc[0] for name in ("kept", LAST_ONLY)
                )
                changes.append(f"{before:{form}} to {after:{form}}")
        out.append(
            f"Removing the {early} kept edges that leave layer {layer} before the last position changes accuracy from "
            f"{changes[0]} and normalized logit diff from {changes[1]} on the training prompts (held out: {changes[2]}, "
            f"{changes[3]})."
        )
    else:
        out.append(f"No kept edge leaves layer {layer}, the bottleneck, before the last position: none can be removed.")
    # A table of an earlier version does not say.
    others = int(items["other_layouts"].iloc[0]) if "other_layouts" in items else 0
    if others:
        out.append(
            f"{others} prompts were not used: a position is one word only in prompts of one layout, and the commonest "
            "was taken."
        )
    return out + _missing_names.sentences(items, layer)


def story(table: pd.DataFrame) -> Told:
    """The kept edges, and what the circuit of them keeps of the accuracy."""
    items = _circuits.item_rows(table)
    kept = items[items["kept"]]
    marks = kept.assign(kind=str(Kind.EDGE), corruption="", source_label=kept["label"], value=kept["score"])
    accuracy = _circuits.of_circuit(table, "kept", "accuracy").iloc[0]
    sure = (
        f"{len(kept):,} of {len(items):,} edges by token are kept: accuracy {_circuits.interval_text(accuracy, '.0%')} on "
        f"{accuracy['n']} held-out prompts"
    )
    return Told(marks[list(MARKS)].reset_index(drop=True), sure)


EXPERIMENT = Experiment(
    name="positional-attribution",
    title="Edges by position",
    paper="5, D.3",
    question="At which tokens is each edge needed?",
    look_for=(
        "Bows that span many layers at one position: an edge that carries what is there past the layers between. Click a "
        "node to hide it: what is left when the busiest are gone is the rest of the mechanism."
    ),
    method=(
        "Patching i -> j at a position replaces output_i there, in input_j, by {written}. Score: EAP-IG with 5 points, summed "
        "over D only.\n"
        "The circuit is the smallest with train accuracy above the target; the rest is patched, each item at its "
        "position.\n"
        "Bottleneck: the one given, or the layer after 0 with the most |score| on edges into it before the last position."
    ),
    needs=_circuits.NEEDS | {Need.LAYER},
    options=Options,
    columns=(
        *(_circuits.SOURCE, _circuits.TARGET, _circuits.POSITION, _circuits.LABEL),
        *(_circuits.SCORE, _circuits.RANK, _circuits.KEPT),
        *_circuits.CIRCUIT_ROWS,
    ),
    draws={ioi.TASK.name: _circuits.default_pairs},
    run=run,
    chart=chart,
    findings=findings,
    more=more,
    story=story,
)
