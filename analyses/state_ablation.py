"""From which position on does the hidden state carry the name?

Paper section 4.4, figure 10: resample ablation of `hook_h` at every (layer, position).
The whole state [E, N] after a position is overwritten and the recurrence goes on from it with clean inputs. That is no
clean "forget": the convolution still holds the last three tokens. `with_conv` carries the conv inputs along, so that
everything the layer knows of the past is the corrupted run's.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from ioi_mamba.analyses import _effects
from ioi_mamba.experiments.experiment import Context, Experiment
from ioi_mamba.experiments.options import ablation_option, option
from ioi_mamba.experiments.story import Kind, Told, cells
from ioi_mamba.passes.ranges import usable
from ioi_mamba.passes.sweep import STATE_AND_CONV
from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import Pairs


@dataclass(frozen=True)
class Options:
    """Options of state-ablation."""

    with_conv: bool = option(False, "overwrite the last K-1 conv inputs together with the state, by resample alone")
    ablation: str = ablation_option()


def default_pairs(tokenizer, n_pairs: int | None, seed: int) -> Pairs:
    """40 pairs a corruption (80 evaluated prompts); the paper does not say how many it used."""
    return _effects.default_pairs(tokenizer, n_pairs, seed)


def run(context: Context) -> pd.DataFrame:
    """The table of effects; see `_effects.effect_table`."""
    site = STATE_AND_CONV if context.options.with_conv else "h"
    found, ablation = usable(context.model, context.pairs), context.options.ablation
    return _effects.effect_table(context.model, found, site, ablation=ablation, progress=context.progress)


def chart(table: pd.DataFrame):
    """Layer by position, of one corruption."""
    return _effects.effect_chart(table, "h")


def findings(table: pd.DataFrame) -> list[str]:
    """The strongest cells of each corruption."""
    return _effects.strongest(table)


def story(table: pd.DataFrame) -> Told:
    """What a layer's state carries after a token."""
    return cells(table, Kind.CARRIES)


EXPERIMENT = Experiment(
    name="state-ablation",
    title="Hidden state",
    paper="4.4, Fig 10",
    question="From where does the state carry {varies}?",
    look_for="Columns from one after what was changed to the end: the state carries it there.",
    method=(
        "h at one position is replaced by {written}; the recurrence goes on from it with clean inputs.\n"
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
