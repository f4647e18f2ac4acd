"""What a mixer of the first kind is made of (Mamba-1, Falcon-Mamba, Jamba): its sites, its parts, what a row of it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ioi_mamba.model.family import SCAN, End, Mixer, Part, Sizes
from ioi_mamba.model.mamba.calls import CONV_OP, OPERATIONS, SCAN_OP
from ioi_mamba.model.mamba.layer import MambaLayer, NormedMambaLayer
from ioi_mamba.model.scan import selective_scan, source_products, states_by_source
from ioi_mamba.model.sites import Site
from ioi_mamba.model.ssd import survival

SITES = (
    Site("in_proj", "in_proj", "batch pos E", "mixer.in_proj.output, first half", "SSM branch, before the conv"),
    Site("skip", "in_proj", "batch pos E", "mixer.in_proj.output, second half", "gate branch, before SiLU"),
    Site(
        "conv_start",
        "conv",
        "batch K-1 E",
        "not in the module: zeros",
        "conv inputs before the first position (not in MambaLens)",
    ),
    Site(
        "conv_slice",
        "conv",
        "batch pos E",
        "weight[:, K-1+s] * in_proj shifted by |s|",
        "one tap of the convolution, before bias and SiLU; takes an index s (not in MambaLens)",
        indexed_by="slice",
    ),
    Site("conv", "conv", "batch pos E", f"recomputed from {CONV_OP}.inputs", "conv output after bias, before SiLU"),
    Site("ssm_input", "conv", "batch pos E", f"{CONV_OP}.output", "x, the input of the SSM"),
    Site("delta_1", "x_proj", "batch pos R", "mixer.x_proj.output[..., :R]", "low-rank delta"),
    Site("B", "x_proj", "batch pos N", "mixer.x_proj.output[..., R:R+N]", "B_t (equation 8)"),
    Site("C", "x_proj", "batch pos N", "mixer.x_proj.output[..., R+N:]", "C_t (equation 9)"),
    Site("delta_2", SCAN, "batch pos E", f"from {SCAN_OP}.inputs", "projected delta with its bias, before softplus"),
    Site("delta", SCAN, "batch pos E", f"from {SCAN_OP}.inputs", "softplus(delta_2) (equation 10)"),
    Site("A", SCAN, "E N", f"{SCAN_OP}.inputs", "-exp(A_log)"),
    Site("A_bar", SCAN, "batch pos E N", f"from {SCAN_OP}.inputs", "exp(delta A) (equation 7)"),
    Site("B_bar", SCAN, "batch pos E N", f"from {SCAN_OP}.inputs", "delta B (equation 8)"),
    Site(
        "ssm_write",
        SCAN,
        "batch pos E N",
        f"from {SCAN_OP}.inputs",
        "B_bar x, what a token adds to the state (not in MambaLens)",
    ),
    Site("h_start", SCAN, "batch E N", "not in the module: zeros", "the state before the first position"),
    Site(
        "h",
        SCAN,
        "batch pos E N",
        f"from {SCAN_OP}.inputs",
        "states after each token (equation 5); with an index, one of them [batch E N]",
        indexed_by="position",
    ),
    Site("y", SCAN, "batch pos E", f"from {SCAN_OP}.inputs", "C h (equation 6), before D x"),
    Site("ssm_output", SCAN, "batch pos E", f"from {SCAN_OP}.inputs", "y + D x"),
    Site("after_skip", SCAN, "batch pos E", f"{SCAN_OP}.output", "ssm_output * SiLU(skip)"),
)

READ_OUT_FROM = ("ssm_input", "delta", "B")
"""What a corrupted state is recomputed from, 16 times smaller than the state."""
ReadOut = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Tensor], Tensor]


def recurrence_terms(A_bar: Tensor, B_bar: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Equation 5: h_t = A_bar_t h_(t-1) + B_bar_t x_t. A_bar, B_bar: [..., E, N]; x: [..., E]."""
    return A_bar, B_bar * x[..., None]


def corrupted_read_out(corrupted: Mapping[str, Tensor], now: Mapping[str, Tensor], of_pair: Tensor) -> Tensor:
    """C_t h_t [row, pos, E] with the corrupted run's states and this pass' A and C (appendix D.2)."""
    x, delta, B = (corrupted[site] for site in READ_OUT_FROM)
    wide, C = delta.dtype, now["C"].contiguous()  # in one layout, wherever it comes from: sums are then rounded alike
    y, _ = selective_scan(x[of_pair].to(wide), delta[of_pair], now["A"], B[of_pair].to(wide), C.to(wide))
    return y


def unrolled(delta: Tensor, A: Tensor, B: Tensor, C: Tensor, channels: Tensor) -> Tensor:
    """M [batch, channel, target, source] with y = M x in each of these channels ("hidden attention", arXiv 2403.01590).

    M[t, s] = sum over n of C_t[n] exp(sum over s < r <= t of delta_r A[n]) B_s[n] delta_s.
    """
    of_channel = delta[..., channels].movedim(-1, 1)  # [batch, channel, pos]
    decay = survival(of_channel[:, :, None, :] * A[channels][None, :, :, None])
    return torch.einsum("btn,bcnts,bsn->bcts", C, decay, B) * of_channel[:, :, None, :]


def flow_read_out(weight: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """y [batch, pos, E] in which what comes from a source to a target counts so often. weight: [batch, 1, target, source]."""
    rows = []
    for t, held in enumerate(states_by_source(x, delta, A, B)):
        state = torch.einsum("bs,bsen->ben", weight[:, 0, t, : t + 1], held)
        rows.append((state @ C[:, t, :, None])[..., 0])
    return torch.stack(rows, 1)


def flow_products(gradient: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Of each source and target the gradient at y times what y takes there, [batch, 1, target, source]."""
    return source_products(gradient, x, delta, A, B, C)[:, None]


def slices(conv_width: int) -> tuple[Part, ...]:
    """The taps of the convolution, from the oldest to the token itself."""
    return tuple(
        Part(
            name=f"conv{s}",
            meaning=f"the tap of the convolution that reads {'the token itself' if s == 0 else f'{-s} before'}",
            site="conv",
            own=f"conv_slice.{s}",
            corrupted=(f"conv_slice.{s}",),
            now=(f"conv_slice.{s}",),
            leads_to="ssm",
            on_path=True,
        )
        for s in range(1 - conv_width, 1)
    )


def parts_of_mixer(conv_width: int, read_out: ReadOut) -> tuple[Part, ...]:
    """The conv slices, the state that the read-out sees, and the gate: those of a mixer of either kind.

    read_out: y of the corrupted run's states, as a `Part` is made.
    """
    state = Part(
        name="ssm",
        meaning="the state that the read-out sees: y_t = C_t h_t with h of the corrupted run, D x untouched",
        site="y",
        own="y",
        corrupted=READ_OUT_FROM,
        now=("A", "C"),
        made=read_out,
    )
    gate = Part(name="skip", meaning="the gate branch", site="skip", own="skip", corrupted=("skip",))
    return (*slices(conv_width), state, gate)


def parts(conv_width: int) -> tuple[Part, ...]:
    """The parts of a Mamba-1 mixer."""
    return parts_of_mixer(conv_width, corrupted_read_out)


def row_floats(size: Sizes, n_positions: int, kind: str) -> float:
    """Those of measured passes, rounded up; `python -m bench.scaling` lists them for a large model."""
    D, E, N, K, vocab = (size.letters[letter] for letter in ("D", "E", "N", "K", "vocab"))
    per_layer = {
        "sweep": 2 * n_positions * D + 4 * E * (N + K),
        "edges": 6 * n_positions * D,
        "parts": 13 * n_positions * E,
        "gradients": 13 * n_positions * E,
        "part gradients": 29 * n_positions * E,
        "flows": 13 * n_positions * E,
    }[kind]
    # What the state holds of every source, of one layer at a time.
    by_source = 3 * n_positions * E * N if kind == "flows" else 0
    return by_source + size.n_layers * per_layer + 16 * n_positions * E + 2 * E * N + 4 * vocab


def refusal(config: Mapping[str, Any]) -> str | None:
    """Its activation must be SiLU, which the formulas have built in."""
    activation = config.get("hidden_act", "silu")
    if activation in ("silu", "swish"):  # two names of one function
        return None
    return f"uses the activation {activation!r}; only 'silu' is supported."


MIXER = Mixer(
    SITES, {}, MambaLayer, OPERATIONS, recurrence_terms, unrolled, flow_read_out, flow_products, parts, row_floats
)
NORMED_MIXER = MIXER._replace(
    sites=[
        site._replace(stage=f"{site.name}_norm", place=f"mixer.{site.name.lower()}_layernorm.output")
        if site.name in ("B", "C")
        else site
        for site in SITES
    ],
    ends={"B": End("b_layernorm", "output"), "C": End("c_layernorm", "output")},
    layer_pass=NormedMambaLayer,
)
"""Where delta_1, B and C go through norms before the scan."""
