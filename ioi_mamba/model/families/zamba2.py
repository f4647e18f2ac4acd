"""Zamba2: Mamba-2 mixers, some of which also read what shared attention makes of the stream (arXiv 2411.15242)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ioi_mamba.model import blocks
from ioi_mamba.model.families.bamba import listed
from ioi_mamba.model.family import CACHE_LIMIT, End, Family, Sizes, Tree
from ioi_mamba.model.mamba2 import kind
from ioi_mamba.model.mamba2.layer import Mamba2Layer

EMBEDDINGS_LIMIT = (
    "the corrupted run by patching all edges into blocks",
    "hybrid blocks read the embeddings as a second input, which stays as it is; patching all edges gives it",
)


def write_copies(attention: Any, decoder: Any, value: Tensor) -> None:
    """Write a block's copy of the stream where shared attention reads it, and where the mixer's norm reads it too."""
    copied, read = attention.input, decoder.input_layernorm
    attention.input = value
    read.input = read.input + (value - copied)


class Zamba2Hybrid(Mamba2Layer):
    """A pass through a block whose mixer reads the sum of its copy of the stream and what attention makes of that copy.

    `layer_input` is that copy: what is written there reaches attention and mixer, and the stream itself is unchanged.
    """

    def _leave(self, stage: str) -> None:
        if stage == "norm_input":
            write_copies(self._module.shared_transformer, self._module.mamba_decoder, self._values["layer_input"])
        else:
            Mamba2Layer._leave(self, stage)


def _sizes(config: Any) -> Sizes:
    letters = kind.letters(
        D=config.hidden_size,
        heads=config.n_mamba_heads,
        head_width=config.mamba_headdim,
        state=config.mamba_d_state,
        groups=config.mamba_ngroups,
        conv=config.mamba_d_conv,
        vocab=config.vocab_size,
    )
    return Sizes(config.num_hidden_layers, letters, False)


def _refusal(config: Any) -> None:
    """Its mixers have SiLU whatever activation the config names for attention's MLP."""


_HYBRID = blocks.mamba(
    kind.MIXER._replace(layer_pass=Zamba2Hybrid), norm="mamba_decoder.input_layernorm", path="mamba_decoder.mamba"
)
_HYBRID.ends["layer_input"] = End("shared_transformer", "input")

ZAMBA2 = Family(
    name="zamba2",
    label="Zamba2",
    published=("Zyphra/Zamba2-1.2B",),
    tree=Tree("model.layers", "model.embed_tokens", "model.final_layernorm", "lm_head"),
    kinds={
        "linear_attention": blocks.block(blocks.mamba(kind.MIXER, norm="input_layernorm", path="mamba")),
        "hybrid": blocks.block(_HYBRID, attends=True),
    },
    blocks=listed,
    config_names=(
        "num_hidden_layers",
        "hidden_size",
        "n_mamba_heads",
        "mamba_headdim",
        "mamba_d_state",
        "mamba_ngroups",
        "mamba_d_conv",
        "vocab_size",
    ),
    sizes=_sizes,
    mixer=kind.MIXER,
    refusal=_refusal,
    limits=(
        CACHE_LIMIT,
        EMBEDDINGS_LIMIT,
    ),
)
