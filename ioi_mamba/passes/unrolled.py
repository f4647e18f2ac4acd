"""A mixer's recurrence unrolled into a matrix from positions to positions, as attention has one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ioi_mamba.errors import InputError
from ioi_mamba.model.families import family_of, mixer_layer
from ioi_mamba.passes.forward import read

LARGEST_MIB = 1024


def hidden_attention(model, tokens: Any, layer: int, channels: Sequence[int] | None = None) -> Tensor:
    """What each position's state takes from each earlier one: M with y = M x, exactly.

    Args:
        model: As `open_model` gives it.
        tokens: As `im.read` takes them.
        layer: A layer with a state-space mixer; a negative one counts from the last.
        channels: Of a Mamba-1 some of its E channels, of a Mamba-2 some of its H heads; None: all.

    Returns:
        Float[batch, channel or head, target, source], 0 where the source comes later. Row t of a channel, times its
        `ssm_input` at all positions, sums to its `y` at t (Mamba-1: arXiv 2403.01590; Mamba-2: arXiv 2405.21060, section 6).

    Raises:
        InputError: For a layer without a mixer, a channel that is not there, and more channels than fit into 1 GiB.
    """
    names = [f"blocks.{mixer_layer(model, layer)}.hook_{site}" for site in ("delta", "A", "B", "C")]
    found = read(model, tokens, names, own_scan=True)
    delta, A, B, C = (found[name].float() for name in names)
    n_channels, (n_rows, n_positions) = delta.shape[-1], delta.shape[:2]
    chosen = torch.arange(n_channels) if channels is None else torch.as_tensor(channels)
    if chosen.dim() != 1 or bool(((chosen < 0) | (chosen >= n_channels)).any()):
        raise InputError(f"channels are {channels!r}: give numbers from 0 to {n_channels - 1}.")
    # A Mamba-1 has a decay of its own in every column of the state.
    columns = 1 if A.dim() == 1 else A.shape[1]
    fits = int(LARGEST_MIB * 2**20 / (8 * n_rows * n_positions**2 * columns))
    if len(chosen) > fits:
        raise InputError(
            f"{len(chosen)} channels of {n_rows} prompts need more than {LARGEST_MIB} MiB: give {fits} or fewer."
        )
    return family_of(model).mixer.unrolled(delta, A, B, C, chosen.to(delta.device))
