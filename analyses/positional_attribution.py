"""Which edges matter at which positions? EAP-IG per position, and the smallest circuit of (edge, position) items.

Paper section 5 and appendix D.3: as `edge-attribution`, but the product of gradient and difference is summed over D
only, so an edge has a score at every position and is patched at single positions.
"""

from __future__ import annotations

import pandas as pd

from analyses import _circuits
from ioi_mamba.attribution import attribute, ranked
from ioi_mamba.charts import position_heatmap
from ioi_mamba.graph import universe_of
from ioi_mamba.sweep import Progress
from ioi_mamba.tasks.base import Pairs

NAME = "positional-attribution"
TITLE = "Edges by position"
PAPER = "5, D.3"
QUESTION = "At which token positions is each edge needed?"
LOOK_FOR = "Rows with few strong cells: an edge that carries something at one place only."
METHOD = (
    "Score of i -> j at a position: gradient at input_j times (corrupted output_i - output_i), summed over D only.\n"
    "EAP-IG with 5 points (equations 12 and 13); items are patched at single positions (equation 11).\n"
    "The circuit is the smallest with train accuracy above the target, found by binary search."
)
NEEDS_MAMBA = True
COLUMNS = ("source", "target", "position", "label", "score", "rank", "kept")


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
    """Scores of all (edge, position) items; extra columns as in `edge-attribution`."""
    table = attribute(model, pairs, variant=variant, steps=steps, positions=True, progress=progress)
    out = ranked(table.drop(columns="part"), ranking)
    labels = pairs.position_labels()
    out.insert(3, "label", [labels[p] for p in out["position"]])
    universe = universe_of(model, n_positions=pairs.clean.shape[1])
    circuit, scores = _circuits.selected(model, pairs, held_out, out, universe, target)
    out["kept"] = out["rank"] <= len(circuit)
    for name, value in scores.items():
        out[name] = value
    out["ranking"] = ranking
    return out


def chart(table: pd.DataFrame, n_edges: int = 40):
    """Scores by edge and position, of the n_edges edges with the strongest cells."""
    edge = table["source"] + " to " + table["target"]
    strongest = table.assign(size=table["score"].abs()).groupby(edge)["size"].max().nlargest(n_edges).index
    shown = table.assign(edge=edge)[edge.isin(strongest)]
    return position_heatmap(
        shown,
        y="edge",
        color="score",
        facet=None,
        title="Attribution by edge and position",
        color_title="score (negative: patching hurts)",
        tooltip=("rank", "kept"),
        panel_width=620,
    )


def findings(table: pd.DataFrame) -> list[str]:
    """The strongest items, the size of the circuit and how it does."""
    first = table.iloc[0]
    names = ", ".join(
        f"{r['source']} to {r['target']} at {r['label']} ({r['score']:.3f})" for _, r in table.head(5).iterrows()
    )
    return [
        f"The strongest items are {names}.",
        *_circuits.how_it_does(first, len(table), "(edge, position) items"),
    ]
