"""What overwriting one value does: the effect of an ablation, at every layer and position or at some."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ioi_mamba.charts.drawing import matrix_heatmap
from ioi_mamba.charts.notebook import shown
from ioi_mamba.errors import InputError
from ioi_mamba.passes import metrics
from ioi_mamba.passes.ablations import Ablation, AblationName, ablation_of
from ioi_mamba.passes.intervals import mean_interval
from ioi_mamba.passes.ranges import usable
from ioi_mamba.passes.sweep import Progress, layer_count, layers_of, swept_logit_diffs
from ioi_mamba.tasks.base import Pairs, check_pairs


@dataclass(frozen=True, eq=False, repr=False)
class Effect:
    """What `effect` found.

    Attributes:
        table: Columns layer, position, label, effect, low, high (95 %, by cluster), n; one row a cell.
        per_pair: Float[layer, position, pair], the effect of each pair that has a range.
        site: The site that was overwritten.
        ablation: The kind of ablation.
        left_out: How many pairs have no range and are in no mean.
    """

    table: pd.DataFrame
    per_pair: Tensor
    site: str
    ablation: str
    left_out: int

    def chart(self) -> Any:
        """Layer by position."""
        return matrix_heatmap(
            self.table,
            x="label",
            y="layer",
            color="effect",
            x_title="position",
            color_title="effect: 0 acts clean, 1 acts corrupted",
            domain=(-1.0, 1.0),
            cell=24,
        )

    def __repr__(self) -> str:
        strongest = self.table.assign(size=self.table["effect"].abs()).sort_values(by="size", ascending=False).head(3)
        cells = [f"  layer {row['layer']}, {row['label']}: {row['effect']:.3f}" for row in strongest.to_dict("records")]
        n = self.per_pair.shape[-1]
        return (
            "\n".join(
                [f"<Effect of {self.ablation} ablation of {self.site} in {len(self.table)} cells, {n} pairs:", *cells]
            )
            + ">"
        )

    def _repr_html_(self) -> str:
        return shown(
            f"Effect of {self.ablation} ablation of {self.site}",
            self.table,
            self.chart if len(self.table) > 1 else None,
        )


def effect(
    model: Any,
    pairs: Pairs,
    site: str,
    *,
    layers: int | Iterable[int] | None = None,
    positions: int | str | Iterable[int | str] | None = None,
    ablation: AblationName | Ablation = "resample",
    progress: Progress | None = None,
) -> Effect:
    """The effect of overwriting a site, by default with the corrupted run's value, one layer and position at a time.

    Effect = 1 - (d_patched - d_corrupted) / (d_clean - d_corrupted), d the logit difference of answer and wrong: 0 acts
    like the clean run, 1 like the corrupted one (paper section 4.1.1, appendix B without the abs).

    Args:
        model: As `open_model` gives it.
        pairs: Prompts of one layout.
        site: A site of a layer, such as "h", "layer_input", "conv_slice.-1" (`ioi-mamba sites`).
        layers: Default all; negative ones count from the end.
        positions: Token indices, or roles of the pairs such as "n3"; default all; negative ones count from the end.
        ablation: What is written: "resample", "mean", "zero", "noise", or one of your own (`passes.ablations`).
        progress: Called with (done, total).

    Raises:
        InputError: For an unknown site or role, a layer or position out of range, pairs of several layouts, and where no
            pair has a range.
    """
    if len(check_pairs(pairs).layouts()) > 1:
        raise InputError("These prompts have several layouts: give those of one, such as pairs.layouts()[0].")
    found = usable(model, pairs)
    n_layers, n_positions = layer_count(model), pairs.clean.shape[1]
    chosen = [_index("layer", layer, n_layers) for layer in _several(layers, layers_of(model, site))]
    places = [_position(found.pairs, place, n_positions) for place in _several(positions, range(n_positions))]
    diffs = swept_logit_diffs(
        model, found.pairs, site, layers=chosen, positions=places, ablation=ablation, progress=progress
    )
    effects = metrics.effect(**diffs)
    low, high = mean_interval(effects, found.pairs.clusters)
    labels = found.pairs.position_labels()
    rows = [
        (layer, place, labels[place], float(effects[i, j].double().mean()), float(low[i, j]), float(high[i, j]))
        for i, layer in enumerate(chosen)
        for j, place in enumerate(places)
    ]
    table = pd.DataFrame(rows, columns=["layer", "position", "label", "effect", "low", "high"])
    return Effect(table.assign(n=len(found.pairs)), effects, site, ablation_of(ablation).name, found.left_out)


def _several(values: Any, all_of_them: Iterable[int]) -> list[Any]:
    if values is None:
        return list(all_of_them)
    values = values.tolist() if hasattr(values, "tolist") else values
    listed = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else [values]
    if not listed:
        raise InputError("No layer or position is given: give at least one, or leave it out for all.")
    return listed


def _index(what: str, value: Any, n: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -n <= value < n:
        raise InputError(f"{what} is {value!r}: give a whole number from 0 to {n - 1}.")
    return value % n


def _position(pairs: Pairs, place: Any, n: int) -> int:
    if not isinstance(place, str):
        return _index("position", place, n)
    if place not in pairs.roles:
        raise InputError(f"These prompts have no role {place!r}: they have {', '.join(pairs.roles) or 'none'}.")
    found = torch.unique(pairs.roles[place])
    if len(found) > 1 or int(found[0]) < 0:
        raise InputError(f"The role {place!r} is not at one position in all of these prompts: give a position.")
    return int(found[0])
