"""The selective scan of a Mamba layer, with every internal value in reach.

Per batch row, channel e (of E) and state column n (of N), at position t (paper equations 5-10):

    delta_t = softplus(delta_2_t)                       [batch, pos, E]      (10)
    A_bar_t = exp(delta_t * A)                          [batch, pos, E, N]   (7)   A = -exp(A_log)
    B_bar_t = delta_t * B_t                             [batch, pos, E, N]   (8)   simplified Euler
    h_t     = A_bar_t * h_(t-1) + B_bar_t * x_t         [batch, pos, E, N]   (5)
    y_t     = sum_n C_t * h_t                           [batch, pos, E]      (6)

Two forms of the recurrence are kept: `recurrence_reference`, which is the line above and nothing else, and
`recurrence`, one in-place loop forward and one backward, several times faster under autograd. Tests hold them equal.

Everything here is fp32 (or fp64 if given fp64), imports torch only and takes no other part of the package, so that
it can be shipped to a server by value.
"""

from __future__ import annotations

import torch
from torch import Tensor


def discretize(delta: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A_bar and B_bar, both [batch, pos, E, N] (equations 7 and 8).

    delta: [batch, pos, E]; A: [E, N] (negative); B: [batch, pos, N].
    """
    A_bar = torch.exp(delta[..., None] * A)
    B_bar = delta[..., None] * B[:, :, None, :]
    return A_bar, B_bar


def recurrence_reference(A_bar: Tensor, Bx: Tensor, h_start: Tensor) -> Tensor:
    """All states h [batch, pos, E, N], written as equation 5 reads. The slow oracle of `recurrence`.

    A_bar, Bx: [batch, pos, E, N]; h_start: [batch, E, N], the state before the first position.
    """
    states, h = [], h_start
    for t in range(A_bar.shape[1]):
        h = A_bar[:, t] * h + Bx[:, t]
        states.append(h)
    return torch.stack(states, dim=1)


class _Recurrence(torch.autograd.Function):
    """h_t = a_t h_(t-1) + b_t, with the reverse recurrence g_t = dh_t + a_(t+1) g_(t+1) as its gradient."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, h_start: Tensor) -> Tensor:  # type: ignore[override]
        h = b.clone()
        previous = h_start
        for t in range(a.shape[1]):
            previous = h[:, t].addcmul_(a[:, t], previous)
        ctx.save_for_backward(a, h, h_start)
        return h

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        a, h, h_start = ctx.saved_tensors
        g = grad.clone()
        for t in range(a.shape[1] - 2, -1, -1):
            g[:, t].addcmul_(a[:, t + 1], g[:, t + 1])
        grad_a = grad_start = None
        if ctx.needs_input_grad[0]:
            grad_a = torch.empty_like(g)
            torch.mul(g[:, 0], h_start, out=grad_a[:, 0])
            torch.mul(g[:, 1:], h[:, :-1], out=grad_a[:, 1:])
        if ctx.needs_input_grad[2]:
            grad_start = (a[:, 0] * g[:, 0]).expand_as(g[:, 0])
        return grad_a, g, grad_start


def recurrence(A_bar: Tensor, Bx: Tensor, h_start: Tensor) -> Tensor:
    """All states h [batch, pos, E, N]; equal to `recurrence_reference`, fast with and without gradients."""
    return _Recurrence.apply(A_bar, Bx, h_start.expand_as(Bx[:, 0]))  # type: ignore[return-value]


def read_out(h: Tensor, C: Tensor) -> Tensor:
    """y [batch, pos, E] = sum over N of C_t h_t (equation 6). h: [batch, pos, E, N]; C: [batch, pos, N]."""
    return (h @ C[..., None])[..., 0]


def selective_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """y [batch, pos, E] from x, delta [batch, pos, E], A [E, N], B, C [batch, pos, N]; zero initial state."""
    A_bar, B_bar = discretize(delta, A, B)
    h_start = torch.zeros_like(A_bar[:, 0])
    return read_out(recurrence(A_bar, B_bar * x[..., None], h_start), C)
