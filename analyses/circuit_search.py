"""Which edges and parts survive an exact search? ACDC from the edges that attribution keeps, down to conv slices.

Paper appendix D.2. Starts from the pruned circuit of `edge-attribution` (all parts undecided) and decides every edge
and part by the drop of the normalized logit diff when it is patched (`ioi_mamba.acdc`). The published search lost
conv-slice removals from its baseline, and compared an accuracy on training pairs with one on held-out pairs; here
removals count, and both accuracies are reported.
"""

from __future__ import annotations

import pandas as pd

from analyses import _circuits
from ioi_mamba.acdc import acdc
from ioi_mamba.attribution import attribute, ranked
from ioi_mamba.charts import matrix_heatmap
from ioi_mamba.faithfulness import Evaluator, evaluate, smallest
from ioi_mamba.graph import Circuit, items_of, universe_of
from ioi_mamba.sweep import Progress
from ioi_mamba.tasks.base import Pairs

NAME = "circuit-search"
TITLE = "Exact circuit search"
PAPER = "D.2"
QUESTION = "Which edges, conv slices, states and gates does the circuit need?"
LOOK_FOR = "Which parts of a layer have a large drop: a layer that keeps conv-1 alone shifts what it reads by one."
METHOD = (
    "Start: edges whose EAP-IG circuit keeps the target accuracy, pruned to paths from embed to output.\n"
    "Working back from the output, patch each item on top of all removed so far (equation 11 for edges).\n"
    "A drop of the normalized logit diff of at most the threshold removes it; else it is kept with its drop."
)
NEEDS_MAMBA = True
COLUMNS = ("source", "target", "part", "kept", "drop")


default_pairs = _circuits.default_pairs


def starting_circuit(model, pairs: Pairs, target: float) -> Circuit:
    """The smallest EAP-IG circuit of edges above the target, pruned, with every part of every layer."""
    edges = ranked(attribute(model, pairs))
    circuit, _ = smallest(Evaluator(model, pairs, universe_of(model)), edges, target)
    universe = universe_of(model, parts=True)
    parts = {item for item in universe.items() if item.part is not None}
    return Circuit(circuit.pruned().items | parts, universe)


def run(
    model,
    pairs: Pairs,
    *,
    held_out: Pairs | None = None,
    target: float = 0.85,
    threshold: float = 1e-4,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """One row an item; extra columns, the same in every row: train and held-out scores, tests, n."""
    start = starting_circuit(model, pairs, target)
    table = acdc(model, pairs, start=start, threshold=threshold, progress=progress)
    circuit = Circuit(frozenset(items_of(table[table["kept"]])), start.universe)
    train = evaluate(model, pairs, circuit)
    valid = evaluate(model, pairs if held_out is None else held_out, circuit)
    out = table.drop(columns="position")
    out["train_accuracy"], out["accuracy"] = train["accuracy"], valid["accuracy"]
    out["train_nld"], out["normalized_logit_diff"] = train["normalized_logit_diff"], valid["normalized_logit_diff"]
    out["tests"], out["n"] = table.attrs["tests"], valid["n"]
    return out


def chart(table: pd.DataFrame):
    """The drop of every part, layer by part; removed parts are empty."""
    parts = table[table["part"].notna()].assign(drop=lambda t: t["drop"].fillna(0.0))
    order = list(dict.fromkeys(parts["part"]))
    layers = sorted(set(parts["source"]), key=int)
    return matrix_heatmap(
        parts,
        x="part",
        y="source",
        color="drop",
        x_order=order,
        y_order=layers,
        x_title="part",
        y_title="layer",
        color_title="drop of the normalized logit diff when patched",
        domain=(0.0, max(0.05, float(parts["drop"].max()))),
        text=len(layers) <= 12,
        cell=44 if len(layers) <= 12 else 14,
        tooltip=("kept",),
    )


def findings(table: pd.DataFrame) -> list[str]:
    """How much is kept of what, and how the circuit does."""
    kept = table[table["kept"]]
    edges, parts = int(kept["part"].isna().sum()), kept["part"].value_counts().to_dict()
    listed = ", ".join(f"{n} {name}" for name, n in parts.items()) or "no part"
    first = table.iloc[0]
    best = kept.nlargest(3, "drop")
    names = ", ".join(
        f"{r['source']} {r['part']}" if pd.notna(r["part"]) else f"{r['source']} to {r['target']}"
        for _, r in best.iterrows()
    )
    return [
        f"The search keeps {edges} edges and, inside layers, {listed} ({first['tests']} tests).",
        f"The largest drops are those of {names}.",
        f"Accuracy {first['train_accuracy']:.1%} on the pairs searched, {first['accuracy']:.1%} on {first['n']} others "
        f"(normalized logit diff {first['train_nld']:.3f} and {first['normalized_logit_diff']:.3f}).",
    ]
