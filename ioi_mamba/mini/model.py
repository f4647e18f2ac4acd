"""The sizes and the first weights of `mini`, and a forward pass with a fast gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM

from ioi_mamba.scan import selective_scan


def logits(model: MambaForCausalLM, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
    """What `model(tokens).logits` gives, [batch, pos, vocab], from the same parameters, with a fast gradient.

    tokens: [batch, pos]. keep: [layer, batch], factors of the layers' outputs; None: all 1.
    """
    residual = model.backbone.embeddings(tokens)
    layers: Any = model.backbone.layers
    for number, layer in enumerate(layers):
        mixer = layer.mixer
        x, gate = mixer.in_proj(layer.norm(residual)).chunk(2, dim=-1)
        taps = mixer.conv1d.weight[:, 0].T  # [tap, E]
        earlier = F.pad(x, (0, 0, len(taps) - 1, 0))
        conv = sum(tap * earlier[:, k : k + x.shape[1]] for k, tap in enumerate(taps))
        x = F.silu(mixer.conv1d.bias + conv)
        sizes = (mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size)
        low_rank, B, C = mixer.x_proj(x).split(sizes, dim=-1)
        delta = F.softplus(mixer.dt_proj(low_rank))
        y, _ = selective_scan(x, delta, -mixer.A_log.exp(), B, C)
        output = mixer.out_proj((y + x * mixer.D) * F.silu(gate))
        residual = residual + (output if keep is None else output * keep[number, :, None, None])
    return model.lm_head(model.backbone.norm_f(residual))


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, all of it: two runs with equal recipes on one machine end equal."""

    steps: int = 8000
    seed: int = 0
    batch: int = 64
    layers: int = 12
    hidden: int = 96
    state: int = 4
    layer_drop: float = 0.1  # probability that a layer does nothing for a document, while training
    learning_rate: float = 3e-3
    warmup: float = 0.03  # of the steps
    final_rate: float = 0.02  # of learning_rate, where the cosine ends
    weight_decay: float = 0.05  # of matrices
    answer_weight: float = 30.0  # of a token of an answer in the loss, where any other token counts 1

    def rate(self, step: int) -> float:
        """Learning rate of a step: a linear warm-up, then a cosine."""
        warm = max(1.0, self.warmup * self.steps)
        done = max(0.0, (step - warm) / max(1.0, self.steps - warm))
        cosine = (1 + math.cos(math.pi * done)) / 2
        return self.learning_rate * min(1.0, (step + 1) / warm) * (self.final_rate + (1 - self.final_rate) * cosine)


def new_model(recipe: Recipe, vocab_size: int) -> MambaForCausalLM:
    """An untrained model of the recipe's sizes and seed.

    The output projections start smaller by the square root of the number of layers (the option of the
    configuration, which names the first weights alone and is put back). Without it the first layer learns
    the whole task by itself, and there is no circuit across layers to find.
    """
    config = MambaConfig(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden,
        state_size=recipe.state,
        num_hidden_layers=recipe.layers,
        conv_kernel=4,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=True,
        rescale_prenorm_residual=True,
    )
    torch.manual_seed(recipe.seed)
    model = MambaForCausalLM(config)
    model.config.rescale_prenorm_residual = False
    return model


@dataclass(frozen=True)
class Trained:
    """A trained model, the loss and the share of answers that were right at every step, and the seconds it took,
    before an interruption and after.
    """

    model: MambaForCausalLM
    losses: list[float]
    right: list[float]
    seconds: float
