"""Bamba: Mamba-2 mixers and attention, an MLP in every block."""

from __future__ import annotations

from typing import Any

from ioi_mamba.model import blocks
from ioi_mamba.model.family import Family, Sizes, Tree
from ioi_mamba.model.mamba.kind import refusal
from ioi_mamba.model.mamba2 import kind

_MLP = blocks.mlp(norm="pre_ff_layernorm", path="feed_forward")
CONFIG_NAMES = (
    "num_hidden_layers",
    "hidden_size",
    "mamba_n_heads",
    "mamba_d_head",
    "mamba_d_state",
    "mamba_n_groups",
    "mamba_d_conv",
    "vocab_size",
)


def listed(config: Any) -> list[str]:
    """Of each block its kind, as the config lists it."""
    return list(config.layers_block_type)


def sizes(config: Any) -> Sizes:
    """The sizes of a config with `mamba_n_heads` and its like."""
    letters = kind.letters(
        D=config.hidden_size,
        heads=config.mamba_n_heads,
        head_width=config.mamba_d_head,
        state=config.mamba_d_state,
        groups=config.mamba_n_groups,
        conv=config.mamba_d_conv,
        vocab=config.vocab_size,
    )
    return Sizes(config.num_hidden_layers, letters, False)


BAMBA = Family(
    name="bamba",
    label="Bamba",
    published=("ibm-ai-platform/Bamba-9B-v2",),
    tree=Tree("model.layers", "model.embed_tokens", "model.final_layernorm", "lm_head", returns=2),
    kinds={
        "linear_attention": blocks.block(blocks.mamba(kind.MIXER, norm="input_layernorm", path="mamba"), _MLP),
        "full_attention": blocks.block(blocks.attention(norm="input_layernorm", path="self_attn"), _MLP),
    },
    blocks=listed,
    config_names=CONFIG_NAMES,
    sizes=sizes,
    mixer=kind.MIXER,
    refusal=refusal,
)
