"""What the experiments share that ablate one site at every layer and position: a sweep turned into a table of effects, its chart and its sentences."""

from __future__ import annotations

import altair as alt
import pandas as pd
import torch
from torch import Tensor

from ioi_mamba.charts.drawing import position_heatmap, position_panels
from ioi_mamba.experiments.experiment import Column
from ioi_mamba.passes import metrics
from ioi_mamba.passes.ablations import RESAMPLE, AblationName
from ioi_mamba.passes.intervals import mean_interval
from ioi_mamba.passes.ranges import Usable, left_out_sentence
from ioi_mamba.passes.sweep import Progress, layers_of, swept_logit_diffs
from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import Pairs
from ioi_mamba.tasks.draws import drawn_apart

PLACE = (
    Column("position", "int", "token index; of prompts of several layouts that of the longest"),
    Column("label", "text", "the word at that position"),
)
MEAN_EFFECT = (
    Column("effect", "float", "mean effect, 1 - normalized logit diff: 0 acts clean, 1 acts corrupted", nullable=True),
    Column("n", "int", "prompts of the mean"),
    Column("left_out", "int", "prompts without a range, of all corruptions", later=True),
    Column("low", "float", "lower end of the 95 % interval of the mean, by cluster", nullable=True, later=True),
    Column("high", "float", "upper end of the same interval", nullable=True, later=True),
)
EFFECT = (
    *MEAN_EFFECT,
    Column("changed", "bool", "the two prompts of a pair differ at that position", later=True),
    Column("ablation", "text", "the kind of ablation, by name", later=True),
)
CORRUPTION = Column("corruption", "text", "how the two prompts of a pair differ")
COLUMNS = (CORRUPTION, Column("layer", "int", "the layer that was ablated"), *PLACE, *EFFECT)


def default_pairs(
    tokenizer, n_pairs: int | None, seed: int, *, size: int = 40, templates=ioi.ALIGNED_TEMPLATES
) -> Pairs:
    """`n_pairs` (default `size`) symmetric pairs for each of the five corruptions, drawn apart (`ioi_mamba.tasks.draws`)."""
    return drawn_apart(tokenizer, n_pairs or size, seed, [(templates, [c]) for c in ioi.CORRUPTIONS])


def effect_table(
    model,
    usable: Usable,
    site: str,
    *,
    layers: list[int] | None = None,
    ablation: AblationName = "resample",
    resume: bool = True,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Mean effect (1 - normalized logit diff, no abs) of ablating `site` at every layer and position.

    usable: the pairs that have a range (`ioi_mamba.passes.ranges`). Columns: corruption, layer, position, label, effect, n (the
    prompts of the mean), left_out (those without a range, of all corruptions), low, high (95 % of the mean, by
    cluster), changed (whether the prompts of some pair differ there), ablation. Pairs of unequal layout are averaged by
    semantic position, see `shared_positions`.
    """
    pairs, _, left_out = usable
    layouts, layers = shared_positions(pairs), layers_of(model, site) if layers is None else layers
    corruptions, clusters = pairs.labels.get("corruption", ("all",) * len(pairs)), pairs.clusters
    diffs = swept_logit_diffs(model, pairs, site, layers=layers, ablation=ablation, resume=resume, progress=progress)
    effects = metrics.effect(**diffs)
    cells: dict[tuple, list[tuple[Tensor, Tensor]]] = {}
    changed: set[tuple] = set()
    for part, rows, places in layouts:
        for value in dict.fromkeys(corruptions[row] for row in rows.tolist()):
            own_rows = torch.tensor([corruptions[row] == value for row in rows.tolist()])
            here = rows[own_rows]
            differs = (part.clean[own_rows] != part.corrupted[own_rows]).any(0)
            changed |= {(value, *place) for p, place in places.items() if differs[p]}
            for k_layer, layer in enumerate(layers):
                for p, (position, label) in places.items():
                    own = cells.setdefault((value, layer, position, label), [])
                    own.append((effects[k_layer, p, here], clusters[here]))
    rows = []
    for cell, found in cells.items():
        values, own = (torch.cat(each) for each in zip(*found, strict=True))
        low, high = mean_interval(values, own.unique(return_inverse=True)[1])
        numbers = (float(values.double().mean()), len(values), left_out, float(low), float(high))
        rows.append((*cell, *numbers, (cell[0], *cell[2:]) in changed, ablation))
    return pd.DataFrame(rows, columns=[column.name for column in COLUMNS])


def shared_positions(pairs: Pairs) -> list[tuple[Pairs, Tensor, dict[int, tuple[int, str]]]]:
    """For each layout its pairs, their rows, and what its positions share with other layouts: {position: (place, label)}.

    Of the longest layout every position has its own place and label. Of another one only what has a role in both is the
    same word, and has the place that the longest layout gives that role; its other positions are in no mean.
    """
    layouts = pairs.layouts()
    longest = max(range(len(layouts)), key=lambda k: layouts[k].clean.shape[1])
    reference = layouts[longest].position_labels()
    found = []
    for k, (part, rows) in enumerate(zip(layouts, pairs.layout_rows(), strict=True)):
        named = {"BOS", *part.roles}
        places = {
            p: (reference.index(label), label)
            for p, label in enumerate(part.position_labels())
            if k == longest or (label in named and label in reference)
        }
        found.append((part, torch.tensor(rows), places))
    return found


def title_of(table: pd.DataFrame, what: str) -> str:
    """The title of a chart of the table: which kind of ablation of what."""
    # A table of an earlier version does not say.
    ablation = table["ablation"].iloc[0] if "ablation" in table else RESAMPLE.name
    return f"Effect of {ablation} ablation of {what}"


def effect_chart(table: pd.DataFrame, what: str) -> alt.TopLevelMixin:
    """Layer by position, of the corruption that a reader chooses; what: was ablated."""
    return position_heatmap(table, title=title_of(table, what), tooltip=("low", "high"))


def more(table: pd.DataFrame) -> dict[str, alt.TopLevelMixin]:
    """All corruptions beside each other, on one scale."""
    several = table["corruption"].nunique() > 1
    return {"All corruptions": position_panels(table, tooltip=("low", "high"))} if several else {}


def with_interval(row, name: str = "effect") -> str:
    """A number with its interval and its prompts: "0.98 (0.97 to 0.99, 40 prompts)"; a table of an earlier version has no interval."""
    ends = f"{row.low:z.2f} to {row.high:z.2f}, " if hasattr(row, "low") and pd.notna(row.low) else ""
    return f"{getattr(row, name):z.2f} ({ends}{row.n} prompts)"


def lead(table: pd.DataFrame) -> list[str]:
    """The strongest cell of all, and in how many corruptions its layer has the strongest one; nothing without a number."""
    measured = table.dropna(subset="effect")
    if measured.empty:
        return []
    size = measured["effect"].abs()
    peaks = measured.loc[size.groupby(measured["corruption"], sort=False).idxmax()]
    top = next(peaks.loc[[peaks["effect"].abs().idxmax()]].itertuples())
    same = int((peaks["layer"] == top.layer).sum())
    shared = f", the strongest layer in {same} of {len(peaks)} corruptions" if len(peaks) > 1 else ""
    return [f"Layer {top.layer} at {top.label}: effect {with_interval(top)}{shared}."]


def strongest(table: pd.DataFrame, n: int = 2) -> list[str]:
    """The strongest cell, then a sentence a corruption: its n largest effects, by magnitude; and what is not in the means."""
    sentences = lead(table)
    for corruption, part in table.groupby("corruption", sort=False):
        order = part["effect"].abs().sort_values(ascending=False).index[:n]
        cells = [
            f"{r.effect:.2f} at layer {r.layer}, {r.label} (position {r.position})"
            for r in part.loc[order].itertuples()
        ]
        over = part.loc[order[0], "n"]
        sentences.append(f"{corruption}: the largest effects are {' and '.join(cells)}, over {over} prompts.")
    fewest, most = table["n"].min(), table.groupby("corruption")["n"].max().min()
    if fewest < most:
        sentences.append(
            f"The prompts have several layouts: means at positions without a role in all of them are over as few as "
            f"{fewest} prompts."
        )
    return sentences + left_out_sentence(table)
