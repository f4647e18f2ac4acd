"""Which layers and positions matter? Resample ablation of a layer's input, one layer and position at a time.

Paper section 4.1.1, figure 4. For each pair and each (layer, position), the clean prompt runs with `hook_layer_input`
there overwritten by the corrupted run's value; only that layer sees it. Look for the layers with a large effect at
the positions of the changed names: on mamba-370m they are 0 and 39.

The published figure very likely patched in the activations of one stale prompt, which halves its magnitudes; this is
the experiment as the text describes it. `site` sweeps any other site of a layer; with all four templates the cells
are averaged by semantic position, which the paper left to future work.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from ioi_mamba.analyses import _effects
from ioi_mamba.experiments.experiment import Context, Experiment
from ioi_mamba.experiments.options import ablation_option, option
from ioi_mamba.experiments.story import Kind, Told, cells
from ioi_mamba.passes.ranges import usable
from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import Pairs


@dataclass(frozen=True)
class Options:
    """Options of layer-ablation."""

    site: str = option("layer_input", "the site of a layer to ablate; `ioi-mamba sites` lists them")
    ablation: str = ablation_option()
    resume: bool = option(True, "start each pass where it is patched: same values, faster")


def default_pairs(tokenizer, n_pairs: int | None, seed: int) -> Pairs:
    """40 pairs a corruption (80 evaluated prompts), the three templates whose names stand at the same positions."""
    return _effects.default_pairs(tokenizer, n_pairs, seed)


def run(context: Context) -> pd.DataFrame:
    """The table of effects; see `_effects.effect_table`."""
    options, found = context.options, usable(context.model, context.pairs)
    return _effects.effect_table(
        context.model, found, options.site, ablation=options.ablation, resume=options.resume, progress=context.progress
    )


def chart(table: pd.DataFrame):
    """Layer by position, of one corruption."""
    return _effects.effect_chart(table, "the layer input")


def bottleneck(table: pd.DataFrame) -> int:
    """The layer after layer 0 with the largest effect: mean over corruptions of its strongest cell.

    The last position is left out, where every layer can write the answer straight to the output.
    """
    last = table["position"].max()
    inner = table[(table["layer"] > 0) & (table["position"] < last)]
    if inner.empty:
        return int(table["layer"].max())
    strongest = inner.assign(size=inner["effect"].abs()).groupby(["layer", "corruption"])["size"].max()
    return int(strongest.groupby("layer").mean().idxmax())


def findings(table: pd.DataFrame) -> list[str]:
    """The strongest cells of each corruption, and the bottleneck."""
    layer = bottleneck(table)
    last = table["position"].max()
    part = table[(table["layer"] == layer) & (table["position"] < last)]
    peak = part.loc[part["effect"].abs().idxmax()]
    lead, *others = _effects.strongest(table)
    after_first = table[(table["layer"] > 0) & (table["position"] < last)]
    return [
        *(f"After layer 0, {sentence[0].lower()}{sentence[1:]}" for sentence in _effects.lead(after_first)),
        lead,
        *others,
        f"After layer 0, layer {layer} has the largest effects before the last position, up to {peak['effect']:.2f} "
        f"at {peak['label']}: experiments that need a bottleneck layer use it.",
    ]


def story(table: pd.DataFrame) -> Told:
    """What a layer reads at a token."""
    return cells(table, Kind.READS)


EXPERIMENT = Experiment(
    name="layer-ablation",
    title="Layer ablation",
    paper="4.1.1, Fig 4",
    question="Which layer reads {varies}, and where?",
    look_for="Dark cells in the column of what was changed. All panels share one scale, so a pale panel is a weak effect.",
    method=(
        "Run the clean prompt with one layer's input (hook_layer_input) at one position replaced by {written}.\n"
        "Effect = 1 - (d_patched - d_corrupted) / (d_clean - d_corrupted), d the logit difference of the two answers.\n"
        "Mean over prompts; 0 acts like the clean run, 1 like the corrupted one."
    ),
    options=Options,
    columns=_effects.COLUMNS,
    draws={ioi.TASK.name: default_pairs},
    run=run,
    chart=chart,
    findings=findings,
    more=_effects.more,
    story=story,
)
