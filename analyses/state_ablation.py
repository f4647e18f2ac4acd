"""From which position on does the hidden state carry the name?

Paper section 4.4, figure 10: resample ablation of `hook_h` at every (layer, position).
The whole state [E, N] after a position is overwritten and the recurrence goes on from it with clean inputs. That is no
clean "forget": the convolution still holds the last three tokens. `with_conv` carries the conv inputs along, so that
everything the layer knows of the past is the corrupted run's.
"""

from __future__ import annotations

import pandas as pd

from ioi_mamba.analyses import _effects
from ioi_mamba.passes.ranges import usable
from ioi_mamba.passes.sweep import Progress
from ioi_mamba.tasks.base import Pairs

NAME = "state-ablation"
TITLE = "Hidden state by position"
PAPER = "4.4, Fig 10"
QUESTION = "From which position on does the hidden state carry the name?"
LOOK_FOR = "Columns from one after the changed name to the end: the state carries the name there."
METHOD = (
    "Overwrite h at one position with the corrupted run's; equation 5 goes on from it with clean inputs.\n"
    "Effect = 1 - (d_patched - d_corrupted) / (d_clean - d_corrupted).\n"
    "Mean over prompts, every layer and position, one corruption a panel."
)
NEEDS_MAMBA = True
COLUMNS = _effects.COLUMNS


def default_pairs(tokenizer, n_pairs: int | None, seed: int) -> Pairs:
    """40 pairs a corruption (80 evaluated prompts); the paper does not say how many it used."""
    return _effects.default_pairs(tokenizer, n_pairs, seed)


def run(model, pairs: Pairs, *, with_conv: bool = False, progress: Progress | None = None) -> pd.DataFrame:
    """The table of effects; with_conv: the last K-1 conv inputs are overwritten together with the state."""
    return _effects.effect_table(model, usable(model, pairs), "h_and_conv" if with_conv else "h", progress=progress)


def chart(table: pd.DataFrame):
    """Layer by position, one panel a corruption."""
    return _effects.effect_chart(table, "Effect of resampling h")


def findings(table: pd.DataFrame) -> list[str]:
    """The strongest cells of each corruption."""
    return _effects.strongest(table)
