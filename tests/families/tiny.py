"""A tiny lively model of every family, with random weights, and pairs of token ids for it."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    FalconH1Config,
    FalconMambaConfig,
    GraniteMoeHybridConfig,
    JambaConfig,
    Mamba2Config,
    MambaConfig,
    NemotronHConfig,
    PreTrainedConfig,
    Zamba2Config,
    ZambaConfig,
)

import ioi_mamba as im

VOCAB, LENGTH = 19, 11
_SPECIAL = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": False}
_HEADS = {
    "mamba_n_heads": 4,
    "mamba_d_head": 6,
    "mamba_d_state": 5,
    "mamba_n_groups": 2,
    "mamba_d_conv": 3,
    "mamba_chunk_size": 8,
}

CONFIGS: dict[str, PreTrainedConfig] = {
    "mamba": MambaConfig(hidden_size=12, num_hidden_layers=3, state_size=5, conv_kernel=3, **_SPECIAL),
    "falcon_mamba": FalconMambaConfig(hidden_size=12, num_hidden_layers=3, state_size=5, conv_kernel=3, **_SPECIAL),
    "jamba": JambaConfig(
        hidden_size=16,  # multiples of 8, which the experts' products need in bfloat16
        num_hidden_layers=4,
        intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=4,
        mamba_d_state=5,
        mamba_d_conv=3,
        mamba_dt_rank=2,
        attn_layer_period=4,
        attn_layer_offset=2,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        num_experts_per_tok=2,
        **_SPECIAL,
    ),
    "mamba2": Mamba2Config(
        hidden_size=12,
        num_hidden_layers=3,
        num_heads=4,
        head_dim=6,
        state_size=5,
        n_groups=2,
        conv_kernel=3,
        chunk_size=8,
        time_step_limit=(0.01, 2.0),
        **_SPECIAL,
    ),
    "bamba": BambaConfig(
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        attn_layer_indices=[1],
        max_position_embeddings=64,
        **_HEADS,
        **_SPECIAL,
    ),
    "granitemoehybrid": GraniteMoeHybridConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=16,
        embedding_multiplier=1.5,
        residual_multiplier=0.7,
        logits_scaling=0.8,
        attention_multiplier=0.4,
        max_position_embeddings=64,
        **_HEADS | {"mamba_d_head": 8},
        **_SPECIAL,
    ),
    "falcon_h1": FalconH1Config(
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        mamba_d_ssm=24,
        mamba_rms_norm=True,
        mamba_norm_before_gate=False,
        ssm_in_multiplier=1.2,
        ssm_out_multiplier=0.8,
        attention_in_multiplier=0.9,
        attention_out_multiplier=1.3,
        embedding_multiplier=1.4,
        lm_head_multiplier=0.7,
        ssm_multipliers=[1.2, 0.9, 1.1, 0.8, 1.3],
        max_position_embeddings=64,
        **_HEADS,
        **_SPECIAL,
    ),
    "nemotron_h": NemotronHConfig(
        hidden_size=12,
        intermediate_size=20,
        layers_block_type=["linear_attention", "mlp", "full_attention", "linear_attention"],
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=4,
        mamba_num_heads=4,
        mamba_head_dim=6,
        ssm_state_size=5,
        n_groups=2,
        conv_kernel=3,
        chunk_size=8,
        time_step_min=0.02,
        **_SPECIAL,
    ),
    "zamba": ZambaConfig(
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=4,
        layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
        num_attention_heads=3,
        num_key_value_heads=3,
        n_mamba_heads=2,
        mamba_d_state=5,
        mamba_d_conv=3,
        mamba_dt_rank=3,
        max_position_embeddings=64,
        **_SPECIAL,
    ),
    "zamba2": Zamba2Config(
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=4,
        layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
        num_attention_heads=3,
        num_key_value_heads=3,
        n_mamba_heads=4,
        mamba_d_state=5,
        mamba_d_conv=3,
        mamba_ngroups=1,
        chunk_size=8,
        num_mem_blocks=1,
        adapter_rank=4,
        time_step_min=0.02,
        max_position_embeddings=64,
        **_SPECIAL,
    ),
}


def _varied(family: str, **changes: Any) -> PreTrainedConfig:
    """The config of a family with other entries."""
    entries = CONFIGS[family].to_dict() | changes
    return type(CONFIGS[family])(**{name: entry for name, entry in entries.items() if name != "architectures"})


VARIANTS: dict[str, PreTrainedConfig] = {
    "mamba with biases": _varied("mamba", use_bias=True, use_conv_bias=False, residual_in_fp32=False),
    "falcon_mamba with biases": _varied("falcon_mamba", use_bias=True, use_conv_bias=False, mixer_rms_eps=1e-3),
    "jamba of width E = D": _varied("jamba", mamba_proj_bias=True, mamba_conv_bias=False, mamba_expand=1),
    "mamba2 of three groups": _varied(
        "mamba2",
        use_bias=True,
        use_conv_bias=False,
        num_heads=6,
        head_dim=4,
        n_groups=3,
        time_step_limit=(0.0, math.inf),
    ),
    "mamba2 of two taps": _varied("mamba2", n_groups=1, conv_kernel=2, tie_word_embeddings=True),
    "bamba with biases": _varied("bamba", mamba_proj_bias=True, mamba_conv_bias=False, mamba_n_groups=1),
    "granitemoehybrid without experts": _varied("granitemoehybrid", mamba_proj_bias=True, num_local_experts=0),
    "falcon_h1 with the norm before the gate": _varied("falcon_h1", mamba_norm_before_gate=True, mamba_proj_bias=True),
    "falcon_h1 without a gated norm": _varied("falcon_h1", mamba_rms_norm=False, mamba_n_groups=4),
    "nemotron_h with experts": _varied(
        "nemotron_h",
        layers_block_type=["moe", "linear_attention", "full_attention", "linear_attention"],
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
        n_group=1,
        topk_group=1,
        n_groups=4,
    ),
    "zamba of three heads": _varied("zamba", n_mamba_heads=3, mamba_proj_bias=True, mamba_conv_bias=False),
    "zamba2 of two groups": _varied("zamba2", mamba_ngroups=2, add_bias_linear=True),
}
"""Other configs of the same families: what a checkpoint may have that the first ones have not."""


@cache
def model_of(family: str, dtype: str = "float32", device: str = "cpu") -> Any:
    """The open model of a family; its weights are drawn wide, so that every value moves the logits."""
    home = Path(mkdtemp(prefix=f"tiny-{family}-"))
    torch.manual_seed(sum(map(ord, family)))
    stock = AutoModelForCausalLM.from_config((CONFIGS | VARIANTS)[family])
    with torch.no_grad():
        for name, weight in stock.named_parameters():
            if weight.ndim > 1 and "A_log" not in name:
                weight.normal_(0, 1.2 / weight.shape[-1] ** 0.5)
            elif "norm" not in name and "A_log" not in name:
                weight.add_(0.3 * torch.randn_like(weight))
    stock.save_pretrained(home)
    return im.open_model(str(home), device=device, dtype=dtype)


def pairs_of(n: int = 3, length: int = LENGTH) -> im.Pairs:
    """Random pairs; the prompts of the first differ at one position, those of the others at three."""
    generator = torch.Generator().manual_seed(5)
    clean = torch.randint(1, VOCAB, (n, length), generator=generator)
    clean[:, 0] = 0
    corrupted = clean.clone()
    for row in range(n):
        for at in (4,) if row == 0 else (2, 5, 7):
            corrupted[row, at] = (clean[row, at] + 3) % (VOCAB - 1) + 1
    return im.Pairs.from_tokens(clean, corrupted, torch.arange(1, n + 1), torch.arange(n + 1, 2 * n + 1))
