"""Which edges between layers matter? EAP-IG over all positions, and the smallest circuit that still does the task.

Paper appendix D.1. Every edge (and every conv slice, ssm and skip inside a layer) is scored by integrated gradients
(`ioi_mamba.attribution`); edges are ranked, most negative first, and the smallest number that keeps the accuracy
among names above the target on the training pairs is found by binary search. The circuit is then evaluated on
held-out pairs. Published scores carry a factor of one over the batch size (1/30) and plain EAP as published is
degenerate; neither is repeated here. Parts are scored but not selected: the circuit is one of edges, as in the paper.
"""

from __future__ import annotations

import pandas as pd

from analyses import _circuits
from ioi_mamba.attribution import attribute, ranked
from ioi_mamba.charts import matrix_heatmap
from ioi_mamba.graph import universe_of
from ioi_mamba.sweep import Progress
from ioi_mamba.tasks.base import Pairs

NAME = "edge-attribution"
TITLE = "Edges between layers"
PAPER = "D.1"
QUESTION = "Which edges does the model need for the task, and how few are enough?"
LOOK_FOR = (
    "Strong cells in the matrix (row = from, column = to), and how fast the curve falls when fewer edges are kept."
)
METHOD = (
    "Score of i -> j: gradient at input_j times (corrupted output_i - output_i), summed (equation 12),\n"
    "averaged over 5 points of the path on which all edges are patched by alpha (equation 13, EAP-IG).\n"
    "Edges outside the circuit are patched (equation 11); accuracy is among the names of the pair."
)
NEEDS_MAMBA = True
COLUMNS = ("source", "target", "score", "rank", "kept")


default_pairs = _circuits.default_pairs


def run(
    model,
    pairs: Pairs,
    *,
    held_out: Pairs | None = None,
    target: float = 0.85,
    steps: int = 5,
    variant: str = "paper",
    ranking: str = "signed",
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Scores of all edges and parts; `kept` marks the smallest circuit of edges with train accuracy > target.

    Extra columns: part, and, the same in every row, size, train_accuracy, accuracy, normalized_logit_diff, n (the
    last three on held-out pairs where given), ranking. A part has no rank and is not selected.
    """
    table = attribute(model, pairs, variant=variant, steps=steps, parts=True, progress=progress)
    edges = ranked(table[table["part"].isna()].drop(columns="part"), ranking)
    universe = universe_of(model)
    circuit, scores = _circuits.selected(model, pairs, held_out, edges, universe, target)
    kept = {(item.source, item.target) for item in circuit.items}
    edges["part"] = None
    out = pd.concat([edges, table[table["part"].notna()]], ignore_index=True).drop(columns="position")
    out["rank"] = out["rank"].astype("Int64")
    out["kept"] = [
        pd.isna(part) and (s, t) in kept for s, t, part in zip(out["source"], out["target"], out["part"], strict=True)
    ]
    for name, value in scores.items():
        out[name] = value
    out["ranking"] = ranking
    return out


def chart(table: pd.DataFrame):
    """The adjacency matrix of scores."""
    edges = table[table["part"].isna()]
    nodes = sorted(
        {*edges["source"], *edges["target"]}, key=lambda name: (name == "output", name != "embed", len(name), name)
    )
    largest = float(edges["score"].abs().max()) or 1.0
    return matrix_heatmap(
        edges,
        x="target",
        y="source",
        color="score",
        x_order=[node for node in nodes if node != "embed"],
        y_order=[node for node in nodes if node != "output"],
        x_title="to",
        y_title="from",
        color_title="score (negative: patching the edge hurts)",
        domain=(-largest, largest),
        cell=max(9, min(44, 480 // len(nodes))),
        tooltip=("rank", "kept"),
    )


def findings(table: pd.DataFrame) -> list[str]:
    """The strongest edges, the size of the circuit and how it does."""
    edges = table[table["part"].isna()].sort_values("rank")
    first = edges.iloc[0]
    names = ", ".join(f"{r['source']} to {r['target']} ({r['score']:.3f})" for _, r in edges.head(5).iterrows())
    return [
        f"The strongest edges are {names}.",
        *_circuits.how_it_does(first, len(edges), "edges"),
    ]
