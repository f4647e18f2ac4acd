"""The recurrence of a Mamba-2 mixer, in the form that reads like attention ("structured state-space duality").

Per batch row, head h (of H, each of P channels) and group g(h) = h // (H / G), at position t:

    A_bar_t = exp(delta_t A)                            [batch, pos, H]        A = -exp(A_log), one number a head
    B_bar_t = delta_t B_t                               [batch, pos, H, N]     B_t of the head's group
    h_t     = A_bar_t h_(t-1) + x_t (outer) B_bar_t     [batch, pos, H, P, N]
    y_t     = h_t C_t                                   [batch, pos, H, P]     C_t of the head's group

which is a Mamba-1 scan with delta and A the same in all channels of a head. Unrolled, y = M x with one matrix a head,

    M[t, s] = (C_t . B_s) exp(sum over s < r <= t of delta_r A) delta_s    for s <= t,

so that states need not be kept (Dao and Gu 2024, section 6). The sums are taken by a cumulative sum over what a mask
leaves, not as a difference of two cumulative sums, which would round away small ones.

Everything here is fp32 (or fp64 if given fp64), imports torch only and takes no other part of the package, so that
it can be shipped to a server by value.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 64
"""Positions whose matrix is held at once: [batch, H, CHUNK, CHUNK]."""


def by_head(value: Tensor, n_heads: int) -> Tensor:
    """A value of groups, [..., G, N], for each head, [..., H, N]."""
    return value.repeat_interleave(n_heads // value.shape[-2], dim=-2)


def dual(delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """M [batch, H, target, source] with y = M x. delta: [batch, pos, H]; A: [H]; B, C: [batch, pos, G, N]."""
    H = delta.shape[2]
    decay = survival((delta * A).transpose(1, 2))
    scores = torch.einsum("bthn,bshn->bhts", by_head(C, H), by_head(B, H))
    return scores * decay * delta.transpose(1, 2)[:, :, None, :]


def dual_of_terms(A_bar: Tensor, B_bar: Tensor, C: Tensor) -> Tensor:
    """M as `dual` has it, of decays and inputs that were written. A_bar: [batch, pos, H]; B_bar: [batch, pos, H, N].

    A decay that was written may be 0 or negative, so products are taken one by one.
    """
    H, left, rows = A_bar.shape[2], torch.zeros_like(A_bar), []  # left: [batch, source, H]
    for t in range(A_bar.shape[1]):
        here = torch.arange(A_bar.shape[1], device=A_bar.device) == t
        left = torch.where(here[:, None], 1.0, left * A_bar[:, t, None])
        rows.append(left)
    scores = torch.einsum("bthn,bshn->bhts", by_head(C, H), B_bar)
    return scores * torch.stack(rows, 1).permute(0, 3, 1, 2)


def survival(exponent: Tensor) -> Tensor:
    """What is left at each target of what a source wrote, [..., target, source]; 0 before the source.

    exponent: [..., pos], the logarithm of how much of the state a position keeps.
    """
    n = exponent.shape[-1]
    after = torch.ones(n, n, dtype=torch.bool, device=exponent.device).tril(-1)
    between = exponent[..., None].expand(*exponent.shape, n).masked_fill(~after, 0.0).cumsum(-2)
    return between.masked_fill(~(after | torch.eye(n, dtype=torch.bool, device=exponent.device)), -torch.inf).exp()


def ssd_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y [batch, pos, H, P] and the last state [batch, H, P, N], without keeping the states in between.

    x: [batch, pos, H, P]; delta: [batch, pos, H]; A: [H]; B, C: [batch, pos, G, N]; h_start: [batch, H, P, N], zeros by
    default. Differentiable in every argument.
    """
    H = x.shape[2]
    h = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1]) if h_start is None else h_start
    out = []
    for first in range(0, x.shape[1], CHUNK):
        here = slice(first, first + CHUNK)
        x_, delta_, B_, C_ = x[:, here], delta[:, here], B[:, here], C[:, here]
        from_start = (delta_ * A).cumsum(1)  # [batch, pos, H]
        y = torch.einsum("bhts,bshp->bthp", dual(delta_, A, B_, C_), x_)
        out.append(y + torch.einsum("bthn,bhpn->bthp", by_head(C_, H), h) * from_start.exp()[..., None])
        to_end = _after(delta_ * A)
        written = by_head(B_, H) * (delta_ * to_end.exp())[..., None]
        h = h * from_start[:, -1].exp()[..., None, None] + torch.einsum("bshp,bshn->bhpn", x_, written)
    return torch.cat(out, 1), h


def _after(exponent: Tensor) -> Tensor:
    """Of each position the sum over all later ones, [batch, pos, H]."""
    return exponent.flip(1).cumsum(1).flip(1) - exponent


def read_out(h: Tensor, C: Tensor) -> Tensor:
    """y [batch, pos, H, P] = h_t C_t. h: [batch, pos, H, P, N]; C: [batch, pos, G, N]."""
    return (h @ by_head(C, h.shape[2])[..., None])[..., 0]
