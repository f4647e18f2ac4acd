"""Nemotron-H: blocks of one sub-block each, a Mamba-2 mixer, attention, an MLP or experts (arXiv 2504.03624)."""

from __future__ import annotations

from typing import Any

from ioi_mamba.model import blocks
from ioi_mamba.model.families.bamba import listed
from ioi_mamba.model.family import CACHE_LIMIT, EXPERTS_LIMIT, Family, Sizes, Tree
from ioi_mamba.model.mamba.kind import refusal
from ioi_mamba.model.mamba2 import kind


def _sizes(config: Any) -> Sizes:
    letters = kind.letters(
        D=config.hidden_size,
        heads=config.mamba_num_heads,
        head_width=config.mamba_head_dim,
        state=config.ssm_state_size,
        groups=config.n_groups,
        conv=config.conv_kernel,
        vocab=config.vocab_size,
    )
    return Sizes(len(config.layers_block_type), letters, False)


_MLP = blocks.block(blocks.mlp(norm="norm", path="mixer"))

NEMOTRON_H = Family(
    name="nemotron_h",
    label="Nemotron-H",
    published=("nvidia/Nemotron-H-8B-Base-8K",),
    tree=Tree("model.layers", "model.embeddings", "model.norm_f", "lm_head"),
    kinds={
        "linear_attention": blocks.block(blocks.mamba(kind.MIXER, norm="norm", path="mixer")),
        "full_attention": blocks.block(blocks.attention(norm="norm", path="mixer")),
        "mlp": _MLP,
        "moe": _MLP,
    },
    blocks=listed,
    config_names=(
        "num_hidden_layers",
        "hidden_size",
        "mamba_num_heads",
        "mamba_head_dim",
        "ssm_state_size",
        "n_groups",
        "conv_kernel",
        "vocab_size",
    ),
    sizes=_sizes,
    mixer=kind.MIXER,
    refusal=refusal,
    limits=(EXPERTS_LIMIT, CACHE_LIMIT),
)
