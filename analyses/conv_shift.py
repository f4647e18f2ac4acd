"""Does the convolution shift names? Resample ablation of single conv slices.

Paper section 4.2, figure 8. The conv output is bias + one term a slice: slice s at output position t carries the conv
input from t + s. One term at one (layer, slice, output position) is replaced by the corrupted run's. If slice -1 has
the effect one position after a name, the convolution moves the name there. The figure's caption has its axes turned;
here slices are rows and positions columns, all panels on one scale. Slice -3, skipped in the paper (its weights are
zero on mamba-370m), is run.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from ioi_mamba.analyses import _effects
from ioi_mamba.charts.drawing import position_heatmap, position_panels
from ioi_mamba.experiments.experiment import Column, Context, Experiment
from ioi_mamba.experiments.needs import Need
from ioi_mamba.experiments.options import ablation_option, option
from ioi_mamba.experiments.story import Kind, Told, cells
from ioi_mamba.model.families import sizes_of
from ioi_mamba.passes.ranges import left_out_sentence, usable
from ioi_mamba.steering.bottleneck import find_layer
from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import Pairs

COLUMNS = (
    _effects.CORRUPTION,
    Column("layer", "int", "the layer"),
    Column("slice", "int", "the conv slice, by how many tokens it looks back", "tokens"),
    *_effects.PLACE,
    *_effects.EFFECT,
)


@dataclass(frozen=True)
class Options:
    """Options of conv-shift."""

    layer: int | None = option(None, "the layer; none: the bottleneck", at_least=0)
    all_layers: bool = option(False, "sweep every layer")
    ablation: str = ablation_option()


def default_pairs(tokenizer, n_pairs: int | None, seed: int) -> Pairs:
    """40 pairs a corruption (80 evaluated prompts); the paper used 10."""
    return _effects.default_pairs(tokenizer, n_pairs, seed)


def run(context: Context) -> pd.DataFrame:
    """Effects by slice."""
    model, pairs, options = context.model, context.pairs, context.options
    layer = find_layer(model, pairs) if options.layer is None and not options.all_layers else options.layer
    layers = None if options.all_layers else [layer]
    found, tables, width = usable(model, pairs), [], sizes_of(model).conv_width
    for k, s in enumerate(range(1 - width, 1)):
        stage = context.stage(k / width, (k + 1) / width)
        table = _effects.effect_table(
            model, found, f"conv_slice.{s}", layers=layers, ablation=options.ablation, progress=stage
        )
        table.insert(2, "slice", s)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _peaks(table: pd.DataFrame) -> pd.DataFrame:
    measured = table.dropna(subset="effect")  # a corruption of which no pair has a range has no peak
    return measured.loc[measured.groupby("corruption", sort=False)["effect"].apply(lambda e: e.abs().idxmax())]


def chart(table: pd.DataFrame):
    """Slice by position at the layer with the largest effect, of one corruption."""
    layer = int(table.loc[table["effect"].abs().idxmax(), "layer"])
    return position_heatmap(
        table[table["layer"] == layer],
        y="slice",
        title=_effects.title_of(table, f"one conv slice, layer {layer}"),
        tooltip=("low", "high"),
    )


def more(table: pd.DataFrame) -> dict[str, object]:
    """All corruptions beside each other, on one scale."""
    layer = int(table.loc[table["effect"].abs().idxmax(), "layer"])
    own, several = table[table["layer"] == layer], table["corruption"].nunique() > 1
    return {"All corruptions": position_panels(own, y="slice", tooltip=("low", "high"))} if several else {}


def findings(table: pd.DataFrame) -> list[str]:
    """The peak of every corruption, and whether it lies in slice -1."""
    peaks = _peaks(table)
    shifted = int((peaks["slice"] == -1).sum())
    top = next(peaks.loc[[peaks["effect"].abs().idxmax()]].itertuples())
    sentences = [
        f"Layer {top.layer}, slice {top.slice} at {top.label}: effect {_effects.with_interval(top)}; the peak is in slice -1 in "
        f"{shifted} of {len(peaks)}.",
    ]
    sentences += [
        f"{r.corruption}: the largest effect is {r.effect:.2f}, slice {r.slice} at {r.label} (layer {r.layer})."
        for r in peaks.itertuples()
    ]
    return sentences + left_out_sentence(table)


def story(table: pd.DataFrame) -> Told:
    """What the slices move, from the token that each takes from."""
    told = cells(table, Kind.MOVES)
    labels = dict(zip(table["position"], table["label"], strict=True))
    source = [labels.get(position) for position in table["position"] + table["slice"]]
    return Told(told.marks.assign(source_label=source).dropna(subset="source_label"))


EXPERIMENT = Experiment(
    name="conv-shift",
    title="Conv slices",
    paper="4.2, Fig 8",
    question="Does the convolution move {varies} on?",
    look_for=(
        "The row that holds the effect: in row -1, one column to the right of what was changed, the convolution shifts it."
    ),
    method=(
        "conv_t = bias + sum over s of w_s * in_proj_(t+s); one term at one output position is replaced by {written}.\n"
        "Effect = 1 - (d_patched - d_corrupted) / (d_clean - d_corrupted).\n"
        "Mean over prompts, at the bottleneck layer unless another is given."
    ),
    needs=frozenset({Need.SITES, Need.ABLE, Need.LAYER}),
    options=Options,
    columns=COLUMNS,
    draws={ioi.TASK.name: default_pairs},
    run=run,
    chart=chart,
    findings=findings,
    more=more,
    story=story,
)
