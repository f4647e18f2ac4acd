"""Jamba: Mamba-1 mixers with norms on delta_1, B and C, attention, and an MLP or experts in every block (arXiv 2403.19887)."""

from __future__ import annotations

from typing import Any

from ioi_mamba.model import blocks
from ioi_mamba.model.family import EXPERTS_LIMIT, Family, Sizes, Tree
from ioi_mamba.model.mamba import kind

_MLP = blocks.mlp(norm="pre_ff_layernorm", path="feed_forward")
_MIXER = kind.NORMED_MIXER


def _kinds_of_blocks(config: Any) -> list[str]:
    return list(config.layers_block_type)


def _sizes(config: Any) -> Sizes:
    letters = {
        "D": config.hidden_size,
        "E": config.mamba_expand * config.hidden_size,
        "N": config.mamba_d_state,
        "R": config.mamba_dt_rank,
        "K": config.mamba_d_conv,
        "vocab": config.vocab_size,
    }
    return Sizes(config.num_hidden_layers, letters, False)


JAMBA = Family(
    name="jamba",
    label="Jamba",
    published=("ai21labs/Jamba-v0.1",),
    tree=Tree("model.layers", "model.embed_tokens", "model.final_layernorm", "lm_head"),
    kinds={
        "mamba": blocks.block(blocks.mamba(_MIXER, norm="input_layernorm", path="mamba"), _MLP),
        "attention": blocks.block(blocks.attention(norm="input_layernorm", path="self_attn"), _MLP),
    },
    blocks=_kinds_of_blocks,
    config_names=("num_hidden_layers", "hidden_size", "mamba_expand", "mamba_d_state", "mamba_d_conv", "vocab_size"),
    sizes=_sizes,
    mixer=_MIXER,
    refusal=kind.refusal,
    limits=(EXPERTS_LIMIT,),
)
