"""What the resample-ablation experiments share: a sweep turned into a table of effects, its chart and its sentences."""

from __future__ import annotations

import altair as alt
import pandas as pd
import torch

from ioi_mamba import metrics
from ioi_mamba.charts import position_heatmap
from ioi_mamba.sweep import Progress, swept_logit_diffs
from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import Pairs

COLUMNS = ("corruption", "layer", "position", "label", "effect", "n")
VANISHING = 1e-3  # logits; a pair with a smaller range is counted in `vanishing` and left out of the mean


def default_pairs(
    tokenizer, n_pairs: int | None, seed: int, *, size: int = 40, templates=ioi.ALIGNED_TEMPLATES
) -> Pairs:
    """`n_pairs` (default `size`) symmetric pairs for each of the five corruptions."""
    sets = [
        ioi.generate(tokenizer, n_pairs or size, seed, templates=templates, corruptions=[c]) for c in ioi.CORRUPTIONS
    ]
    return Pairs.concat(sets)


def effect_table(
    model,
    pairs: Pairs,
    site: str,
    *,
    layers: list[int] | None = None,
    resume: bool = True,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Mean effect (1 - normalized logit diff, no abs) of resampling `site` at every layer and position.

    Columns: corruption, layer, position, label, effect, n, low, high (95 % of the mean), vanishing. Pairs of unequal
    layout (templates whose names stand elsewhere) are averaged by semantic position: `position` is then the place of
    the label in the longest layout. Pairs whose clean and corrupted logit diffs agree within 1e-3 logits cannot be
    normalised: they are counted in `vanishing` and left out.
    """
    layouts = pairs.layouts()
    reference = max(layouts, key=lambda part: part.clean.shape[1]).position_labels()
    cells = []
    for k, part in enumerate(layouts):
        report = (lambda n, total, k=k: progress(k * total + n, len(layouts) * total)) if progress else None
        diffs = swept_logit_diffs(model, part, site, layers=layers, resume=resume, progress=report)
        patched, clean, corrupted = diffs["patched"], diffs["clean"], diffs["corrupted"]
        usable = (clean - corrupted).abs() > VANISHING
        effects = metrics.effect(patched, clean, corrupted)
        corruption = part.labels.get("corruption", ("all",) * len(part))
        labels = part.position_labels()
        for value in dict.fromkeys(corruption):
            here = torch.tensor([c == value for c in corruption])
            for k_layer in range(effects.shape[0]):
                for p, label in enumerate(labels):
                    cells.append(
                        (
                            value,
                            k_layer if layers is None else layers[k_layer],
                            label,
                            p,
                            effects[k_layer, p, here & usable],
                            int((here & ~usable).sum()),
                        )
                    )
    table = pd.DataFrame(cells, columns=["corruption", "layer", "label", "place", "values", "vanishing"])
    table["position"] = [
        place if len(layouts) == 1 else reference.index(label) if label in reference else place
        for label, place in zip(table["label"], table["place"], strict=True)
    ]
    rows = []
    for (corruption, layer, position, label), group in table.groupby(
        ["corruption", "layer", "position", "label"], sort=False
    ):
        values = torch.cat(list(group["values"])).double()
        n = len(values)
        mean = float(values.mean()) if n else float("nan")
        half = 1.96 * float(values.std()) / n**0.5 if n > 1 else float("nan")
        rows.append(
            (
                corruption,
                layer,
                position,
                label,
                mean,
                n,
                mean - half,
                mean + half,
                int(group["vanishing"].sum()),
            )
        )
    columns = [*COLUMNS, "low", "high", "vanishing"]
    return pd.DataFrame(rows, columns=columns).astype({"layer": int, "position": int, "n": int})


def effect_chart(table: pd.DataFrame, title: str) -> alt.TopLevelMixin:
    """Layer by position, one panel a corruption, all on one scale."""
    return position_heatmap(
        table, title=title, color_title="effect: 0 acts clean, 1 acts corrupted", tooltip=("low", "high")
    )


def strongest(table: pd.DataFrame, n: int = 2) -> list[str]:
    """One sentence a corruption: its n largest effects, by magnitude."""
    sentences = []
    for corruption, part in table.groupby("corruption", sort=False):
        order = part["effect"].abs().sort_values(ascending=False).index[:n]
        cells = [
            f"{r.effect:.2f} at layer {r.layer}, {r.label} (position {r.position})"
            for r in part.loc[order].itertuples()
        ]
        sentences.append(
            f"{corruption}: the largest effects are {' and '.join(cells)}, over {part['n'].max()} prompts."
        )
    lost = int(table["vanishing"].max()) if len(table) else 0
    if lost:
        sentences.append(f"Up to {lost} prompts a corruption had no range to normalise by and were left out.")
    return sentences
