"""Mamba-1 (Gu and Dao 2023), the model of the paper."""

from __future__ import annotations

from typing import Any

from ioi_mamba.model import blocks
from ioi_mamba.model.family import Family, Sizes, Tree
from ioi_mamba.model.mamba import kind


def sizes(config: Any) -> Sizes:
    """The sizes of a `MambaConfig`, or a `FalconMambaConfig`."""
    letters = {
        "D": config.hidden_size,
        "E": config.intermediate_size,
        "N": config.state_size,
        "R": config.time_step_rank,
        "K": config.conv_kernel,
        "vocab": config.vocab_size,
    }
    return Sizes(config.num_hidden_layers, letters, config.residual_in_fp32)


def alike(config: Any) -> list[str]:
    """Of each block its kind: all are of one."""
    return ["mamba"] * config.num_hidden_layers


TREE = Tree("backbone.layers", "backbone.embeddings", "backbone.norm_f", "lm_head")
CONFIG_NAMES = ("num_hidden_layers", "hidden_size", "intermediate_size", "state_size", "conv_kernel", "vocab_size")

MAMBA = Family(
    name="mamba",
    label="Mamba-1",
    published=tuple(f"state-spaces/mamba-{size}-hf" for size in ("370m", "130m", "790m", "1.4b", "2.8b")),
    tree=TREE,
    kinds={"mamba": blocks.block(blocks.mamba(kind.MIXER, norm="norm", path="mixer"))},
    blocks=alike,
    config_names=CONFIG_NAMES,
    sizes=sizes,
    mixer=kind.MIXER,
    refusal=kind.refusal,
)
