"""Falcon-H1: in every block a Mamba-2 mixer and attention side by side, then an MLP (arXiv 2507.22448)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ioi_mamba.model import blocks
from ioi_mamba.model.families.bamba import CONFIG_NAMES, sizes
from ioi_mamba.model.family import End, Family, Tree
from ioi_mamba.model.mamba.kind import refusal
from ioi_mamba.model.mamba2 import kind
from ioi_mamba.model.mamba2.layer import Mamba2Layer


class FalconH1Layer(Mamba2Layer):
    """A pass through one block. One norm serves both halves, so what one half reads is normalised anew when written."""

    def _leave(self, stage: str) -> None:
        if stage == "norm_input":
            self._module.mamba.input = self._module.input_layernorm(self._values["layer_input"])
        else:
            Mamba2Layer._leave(self, stage)

    def _open(self, stage: str) -> None:
        if stage == "attention_input":
            self._values["attn_in"] = self._values["resid_pre"]
        else:
            Mamba2Layer._open(self, stage)

    def _close(self, stage: str) -> None:
        if stage == "attention_input":
            normalized = self._module.input_layernorm(self._values["attn_in"])
            self._module.self_attn.input = normalized * self._config.attention_in_multiplier
        else:
            Mamba2Layer._close(self, stage)

    def _multiplied(self, projected: Tensor, divide: bool = False) -> Tensor:
        """One factor for each of z, x, B, C and delta, in this order."""
        E, H = self._letters["E"], self._letters["H"]
        GN = self._letters["G"] * self._letters["N"]
        factors = projected.new_tensor(self._config.ssm_multipliers)
        by_column = factors.repeat_interleave(torch.tensor([E, E, GN, GN, H], device=projected.device))
        return projected / by_column if divide else projected * by_column


_MIXER = kind.MIXER._replace(layer_pass=FalconH1Layer)
_MAMBA = blocks.mamba(_MIXER, norm="input_layernorm", path="mamba", times="ssm_out_multiplier")
_MAMBA.ends["normalized_input"] = End("mamba", "input")
_ATTENTION = blocks.attention(norm="input_layernorm", path="self_attn", times="attention_out_multiplier")
del _ATTENTION.ends["attn_in"]


def _alike(config: Any) -> list[str]:
    return ["hybrid"] * config.num_hidden_layers


FALCON_H1 = Family(
    name="falcon_h1",
    label="Falcon-H1",
    published=("tiiuae/Falcon-H1-0.5B-Base",),
    tree=Tree(
        "model.layers",
        "model.embed_tokens",
        "model.final_layernorm",
        "lm_head",
        embedded="embedding_multiplier",
        scaled="lm_head_multiplier",
        returns=1,
    ),
    kinds={
        "hybrid": blocks.block(
            (_MAMBA, _ATTENTION),
            blocks.mlp(norm="pre_ff_layernorm", path="feed_forward"),
        )
    },
    blocks=_alike,
    config_names=CONFIG_NAMES,
    sizes=sizes,
    mixer=_MIXER,
    refusal=refusal,
)
