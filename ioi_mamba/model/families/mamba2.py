"""Mamba-2 (Dao and Gu 2024): one decay a head, B and C shared in groups, a gated norm before the output."""

from __future__ import annotations

from typing import Any

from ioi_mamba.model import blocks
from ioi_mamba.model.families.mamba import TREE, alike
from ioi_mamba.model.family import CACHE_LIMIT, Family, Sizes
from ioi_mamba.model.mamba.kind import refusal
from ioi_mamba.model.mamba2 import kind


def _sizes(config: Any) -> Sizes:
    letters = kind.letters(
        D=config.hidden_size,
        heads=config.num_heads,
        head_width=config.head_dim,
        state=config.state_size,
        groups=config.n_groups,
        conv=config.conv_kernel,
        vocab=config.vocab_size,
    )
    return Sizes(config.num_hidden_layers, letters, config.residual_in_fp32)


MAMBA2 = Family(
    name="mamba2",
    label="Mamba-2",
    published=("mistralai/Mamba-Codestral-7B-v0.1",),
    tree=TREE,
    kinds={"mamba": blocks.block(blocks.mamba(kind.MIXER, norm="norm", path="mixer"))},
    blocks=alike,
    config_names=(
        "num_hidden_layers",
        "hidden_size",
        "num_heads",
        "head_dim",
        "state_size",
        "n_groups",
        "conv_kernel",
        "vocab_size",
    ),
    sizes=_sizes,
    mixer=kind.MIXER,
    refusal=refusal,
    limits=(CACHE_LIMIT,),
)
