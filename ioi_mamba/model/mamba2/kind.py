"""What a mixer of the second kind is made of: its sites, its parts, its sizes, what a row of it costs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ioi_mamba.model import ssd
from ioi_mamba.model.family import SCAN, End, Mixer, Part, Sizes
from ioi_mamba.model.mamba.calls import CONV_OP
from ioi_mamba.model.mamba.kind import READ_OUT_FROM, parts_of_mixer
from ioi_mamba.model.mamba2.calls import OPERATIONS, SCAN_OP
from ioi_mamba.model.mamba2.layer import Mamba2Layer
from ioi_mamba.model.sites import Site

_WIDE = "batch pos E+2GN"
SITES = (
    Site("in_proj", "in_proj", _WIDE, "mixer.in_proj.output[..., E:-H]", "x, B and C side by side, before the conv"),
    Site("skip", "in_proj", "batch pos E", "mixer.in_proj.output[..., :E]", "gate branch, before SiLU"),
    Site("conv_start", "conv", "batch K-1 E+2GN", "not in the module: zeros", "conv inputs before the first position"),
    Site(
        "conv_slice",
        "conv",
        _WIDE,
        "weight[:, K-1+s] * in_proj shifted by |s|",
        "one tap of the convolution, before bias and SiLU; takes an index s",
        indexed_by="slice",
    ),
    Site("conv", "conv", _WIDE, f"recomputed from {CONV_OP}.inputs", "conv output after bias, before SiLU"),
    Site("ssm_input", "conv", "batch pos E", f"{CONV_OP}.output[..., :E]", "x, the input of the SSM"),
    Site("B", "conv", "batch pos G N", f"{CONV_OP}.output[..., E:E+GN]", "B_t, one for each group of heads"),
    Site("C", "conv", "batch pos G N", f"{CONV_OP}.output[..., E+GN:]", "C_t, one for each group of heads"),
    Site("delta_2", SCAN, "batch pos H", f"from {SCAN_OP}.inputs", "delta of a head with its bias, before softplus"),
    Site("delta", SCAN, "batch pos H", f"from {SCAN_OP}.inputs", "softplus(delta_2), kept between the config's ends"),
    Site("A", SCAN, "H", f"{SCAN_OP}.inputs", "-exp(A_log), one number a head"),
    Site("A_bar", SCAN, "batch pos H", f"from {SCAN_OP}.inputs", "exp(delta A)"),
    Site("B_bar", SCAN, "batch pos H N", f"from {SCAN_OP}.inputs", "delta B of the head's group"),
    Site(
        "ssm_write",
        SCAN,
        "batch pos H P N",
        f"from {SCAN_OP}.inputs",
        "x (outer) B_bar, what a token adds to the state",
    ),
    Site(
        "dual",
        SCAN,
        "batch H target source",
        f"from {SCAN_OP}.inputs",
        "M with y = M x, one matrix a head; written, it makes y, and the states stay as they are",
    ),
    Site("h_start", SCAN, "batch H P N", "not in the module: zeros", "the state before the first position"),
    Site(
        "h",
        SCAN,
        "batch pos H P N",
        f"from {SCAN_OP}.inputs",
        "states after each token; with an index, one of them [batch H P N]",
        indexed_by="position",
    ),
    Site("y", SCAN, "batch pos E", f"from {SCAN_OP}.inputs", "C h, heads side by side, before D x"),
    Site("ssm_output", SCAN, "batch pos E", f"{SCAN_OP}.output", "y + D x"),
    Site("after_skip", "out_proj_input", "batch pos E", "mixer.out_proj.input", "after the gate and the gated norm"),
)


def letters(*, D: int, heads: int, head_width: int, state: int, groups: int, conv: int, vocab: int) -> dict[str, int]:
    """How much each letter of the glossary stands for."""
    E = heads * head_width
    own = {"D": D, "E": E, "H": heads, "P": head_width, "N": state, "G": groups, "K": conv, "vocab": vocab}
    return own | {"E+2GN": E + 2 * groups * state}


def recurrence_terms(A_bar: Tensor, B_bar: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = A_bar_t h_(t-1) + x_t (outer) B_bar_t, in each head. A_bar: [..., H]; B_bar: [..., H, N]; x: [..., E]."""
    by_head = x.unflatten(-1, (A_bar.shape[-1], -1))
    return A_bar[..., None, None], by_head[..., None] * B_bar[..., None, :]


def unrolled(delta: Tensor, A: Tensor, B: Tensor, C: Tensor, channels: Tensor) -> Tensor:
    """M [batch, head, target, source] with y = M x in each of these heads: the dual form (`ssd.dual`)."""
    H = delta.shape[-1]
    return ssd.dual(
        delta[..., channels], A[channels], ssd.by_head(B, H)[:, :, channels], ssd.by_head(C, H)[:, :, channels]
    )


def flow_read_out(weight: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """y [batch, pos, E] in which what comes from a source to a target counts so often. weight: [batch, H, target, source]."""
    by_head = x.unflatten(-1, (A.shape[0], -1))
    return torch.einsum("bhts,bshp->bthp", weight * ssd.dual(delta, A, B, C), by_head).flatten(2)


def flow_products(gradient: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Of each source, target and head the gradient at y times what y takes there, [batch, H, target, source]."""
    at_y, by_head = (value.unflatten(-1, (A.shape[0], -1)) for value in (gradient, x))
    return torch.einsum("bthp,bshp->bhts", at_y, by_head) * ssd.dual(delta, A, B, C)


def corrupted_read_out(corrupted: Mapping[str, Tensor], now: Mapping[str, Tensor], of_pair: Tensor) -> Tensor:
    """C_t h_t [row, pos, E] with the corrupted run's states and this pass' A and C."""
    x, delta, B = (corrupted[site] for site in READ_OUT_FROM)
    wide, H = torch.promote_types(x.dtype, delta.dtype), delta.shape[-1]
    by_head = x[of_pair].to(wide).unflatten(-1, (H, -1))
    y, _ = ssd.ssd_scan(by_head, delta[of_pair], now["A"], B[of_pair].to(wide), now["C"].to(wide))
    return y.flatten(2)


def parts(conv_width: int) -> tuple[Part, ...]:
    """The parts of a Mamba-2 mixer."""
    return parts_of_mixer(conv_width, corrupted_read_out)


def row_floats(size: Sizes, n_positions: int, kind: str) -> float:
    """An estimate from the widths of what a pass keeps, on the safe side; see `memory.py`."""
    D, E, N, H, wide, vocab = (size.letters[letter] for letter in ("D", "E", "N", "H", "E+2GN", "vocab"))
    per_layer = {
        "sweep": 2 * n_positions * D + 4 * (E * N + wide * size.conv_width),
        "edges": 6 * n_positions * D,
        "parts": 13 * n_positions * wide,
        "gradients": 13 * n_positions * wide,
        "part gradients": 29 * n_positions * wide,
        "flows": 13 * n_positions * wide,
    }[kind]
    matrix = 4 * H * n_positions * min(n_positions, ssd.CHUNK)
    return size.n_layers * per_layer + 16 * n_positions * wide + 2 * E * N + matrix + 4 * vocab


MIXER = Mixer(
    SITES,
    {"after_skip": End("out_proj", "input")},
    Mamba2Layer,
    OPERATIONS,
    recurrence_terms,
    unrolled,
    flow_read_out,
    flow_products,
    parts,
    row_floats,
)
