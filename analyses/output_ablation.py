"""At which positions does a layer write what the answer needs?

Paper section 4.4, figure 11: resample ablation of `hook_out_proj` at every (layer, position).
`hook_out_proj` is what a layer adds to the residual stream; everything after it sees the change.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from ioi_mamba.analyses import _effects
from ioi_mamba.experiments.experiment import Context, Experiment
from ioi_mamba.experiments.options import ablation_option
from ioi_mamba.experiments.story import Kind, Told, cells
from ioi_mamba.passes.ranges import usable
from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import Pairs


@dataclass(frozen=True)
class Options:
    """Options of output-ablation."""

    ablation: str = ablation_option()


def default_pairs(tokenizer, n_pairs: int | None, seed: int) -> Pairs:
    """40 pairs a corruption (80 evaluated prompts); the paper does not say how many it used."""
    return _effects.default_pairs(tokenizer, n_pairs, seed)


def run(context: Context) -> pd.DataFrame:
    """The table of effects; see `_effects.effect_table`."""
    found, ablation = usable(context.model, context.pairs), context.options.ablation
    return _effects.effect_table(context.model, found, "out_proj", ablation=ablation, progress=context.progress)


def chart(table: pd.DataFrame):
    """Layer by position, of one corruption."""
    return _effects.effect_chart(table, "out_proj")


def findings(table: pd.DataFrame) -> list[str]:
    """The strongest cells of each corruption."""
    return _effects.strongest(table)


def story(table: pd.DataFrame) -> Told:
    """What a layer writes at a token."""
    return cells(table, Kind.WRITES)


EXPERIMENT = Experiment(
    name="output-ablation",
    title="Layer output",
    paper="4.4, Fig 11",
    question="Where do layers write what the answer needs?",
    look_for="A layer whose only dark cell is in the last column writes its result to the last token alone.",
    method=(
        "What a layer adds to the stream (hook_out_proj) at one position is replaced by {written}.\n"
        "Effect = 1 - (d_patched - d_corrupted) / (d_clean - d_corrupted).\n"
        "Mean over prompts, every layer and position, one corruption a panel."
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
