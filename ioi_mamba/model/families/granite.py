"""Granite 4 hybrids: Mamba-2 mixers and attention, in every block a shared MLP and, in most models, experts beside it."""

from __future__ import annotations

from typing import Any

from ioi_mamba.model import blocks
from ioi_mamba.model.families.bamba import CONFIG_NAMES, sizes
from ioi_mamba.model.family import EXPERTS_LIMIT, Block, Family, Tree
from ioi_mamba.model.mamba.kind import refusal
from ioi_mamba.model.mamba2 import kind

_TIMES = "residual_multiplier"


def _kind_of_block(*, attention: bool, experts: bool) -> Block:
    mlp = blocks.mlp(norm="post_attention_layernorm", path="shared_mlp", times=_TIMES)
    if experts:
        mlp.ends["mlp_out"] = mlp.ends["mlp_out"]._replace(added=("block_sparse_moe",))
    if attention:
        first = blocks.attention(norm="input_layernorm", path="self_attn", times=_TIMES)
        return blocks.block(first, mlp)
    first = blocks.mamba(kind.MIXER, norm="input_layernorm", path="mamba", times=_TIMES)
    return blocks.block(first, mlp)


def _listed(config: Any) -> list[str]:
    ending = " with experts" if config.num_local_experts else ""
    return [f"{name}{ending}" for name in config.layers_block_type]


GRANITE = Family(
    name="granitemoehybrid",
    label="Granite hybrid",
    published=("ibm-granite/granite-4.0-h-tiny",),
    tree=Tree(
        "model.layers",
        "model.embed_tokens",
        "model.norm",
        "lm_head",
        embedded="embedding_multiplier",
        scaled="/logits_scaling",
    ),
    kinds={
        f"{name}{' with experts' if experts else ''}": _kind_of_block(attention=attention, experts=experts)
        for name, attention in (("linear_attention", False), ("full_attention", True))
        for experts in (True, False)
    },
    blocks=_listed,
    config_names=CONFIG_NAMES,
    sizes=sizes,
    mixer=kind.MIXER,
    refusal=refusal,
    limits=(EXPERTS_LIMIT,),
)
