"""The selective scan of a Mamba layer, with every internal value in reach.

Per batch row, channel e (of E) and state column n (of N), at position t (paper equations 5-10):

    delta_t = softplus(delta_2_t)                       [batch, pos, E]      (10)
    A_bar_t = exp(delta_t * A)                          [batch, pos, E, N]   (7)   A = -exp(A_log)
    B_bar_t = delta_t * B_t                             [batch, pos, E, N]   (8)   simplified Euler
    h_t     = A_bar_t * h_(t-1) + B_bar_t * x_t         [batch, pos, E, N]   (5)
    y_t     = sum_n C_t * h_t                           [batch, pos, E]      (6)

Three forms are kept, held equal by tests. `recurrence_reference` is the line above and nothing else, the oracle.
`recurrence` returns all states too, with one in-place loop forward and one backward; it serves passes that look at
A_bar, B_bar or h. `selective_scan` never holds [batch, pos, E, N] and serves all others.

Everything here is fp32 (or fp64 if given fp64), imports torch only and takes no other part of the package, so that
it can be shipped to a server by value.
"""

from __future__ import annotations

from collections.abc import Iterator

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


def _into_states(Bx: Tensor, A_bar: Tensor, h_start: Tensor) -> Tensor:
    """Bx itself, overwritten by the states."""
    previous = h_start
    for t in range(A_bar.shape[1]):
        previous = Bx[:, t].addcmul_(A_bar[:, t], previous)
    return Bx


class _Recurrence(torch.autograd.Function):
    """h_t = a_t h_(t-1) + b_t, with the reverse recurrence g_t = dh_t + a_(t+1) g_(t+1) as its gradient."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, h_start: Tensor) -> Tensor:  # type: ignore[override]
        h = _into_states(b.clone(), a, h_start)
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


def recurrence(A_bar: Tensor, Bx: Tensor, h_start: Tensor, *, overwrite: bool = False) -> Tensor:
    """All states h [batch, pos, E, N]; equal to `recurrence_reference`, fast with and without gradients.

    overwrite: the states may take the place of Bx, which saves a copy; they do where nothing needs a gradient.
    """
    if overwrite and not (torch.is_grad_enabled() and any(v.requires_grad for v in (A_bar, Bx, h_start))):
        return _into_states(Bx, A_bar, h_start)
    return _Recurrence.apply(A_bar, Bx, h_start.expand_as(Bx[:, 0]))  # type: ignore[return-value]


def read_out(h: Tensor, C: Tensor) -> Tensor:
    """y [batch, pos, E] = sum over N of C_t h_t (equation 6). h: [batch, pos, E, N]; C: [batch, pos, N]."""
    return (h @ C[..., None])[..., 0]


def states_by_source(x: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> Iterator[Tensor]:
    """At each position t what its state holds of every position up to it, [batch, source, E, N]; over sources they sum to h_t.

    x, delta: [batch, pos, E]; A: [E, N]; B: [batch, pos, N].
    """
    held = x.new_zeros(x.shape[0], 0, *A.shape)
    for t in range(x.shape[1]):
        A_bar, B_bar = discretize(delta[:, t, None], A, B[:, t, None])
        held = torch.cat((held * A_bar, B_bar * x[:, t, None, :, None]), 1)
        yield held


# How many numbers of the state a block of rows may hold. The recurrence is bound by memory traffic: blocks of a few
# hundred KiB stay in cache from one position to the next, which is worth a factor of 5-10 on a CPU.
_BLOCK = 65_536


def _blocks(batch: int, channels: int, columns: int, device: torch.device) -> list[slice]:
    rows = batch if device.type != "cpu" else max(1, _BLOCK // (channels * columns))
    return [slice(i, min(i + rows, batch)) for i in range(0, batch, max(1, rows))]


def _compiled(name: str, tensors: tuple[Tensor, ...]):
    """The compiled form of a loop (`compiled_scan.py`) where this process has loaded it and it takes such tensors, else None."""
    x = tensors[0]
    if x.device.type != "cpu" or any(v.dtype != x.dtype for v in tensors):
        return None
    return getattr(torch.ops.ioi_mamba, name, None) if x.dtype in (torch.float32, torch.float64) else None


class _SelectiveScan(torch.autograd.Function):
    """Equations 5-8 in one loop that never holds [batch, pos, E, N]; the backward pass recomputes the states.

    Inside, states are [row, N, E]: with the long axis last, every product vectorises and the read-out is one small
    matrix product a row.
    """

    @staticmethod
    def forward(ctx, x, delta, A, B, C, h_start):  # type: ignore[override]
        ctx.save_for_backward(x, delta, A, B, C, h_start)
        if compiled := _compiled("selective_scan", (x, delta, A, B, C, h_start)):
            return compiled(x, delta, A, B, C, h_start)
        y = torch.empty_like(x)
        h_last = torch.empty_like(h_start)
        dx, A_t = delta * x, A.T.contiguous()
        for rows in _blocks(x.shape[0], A.shape[0], A.shape[1], x.device):
            h = h_start[rows].transpose(1, 2).clone(memory_format=torch.contiguous_format)
            decay = torch.empty_like(h)
            # By position, [row, 1, E] or [row, N, 1]: what is multiplied and added has the state's axes.
            wide = (v[rows].transpose(0, 1)[:, :, None] for v in (delta, dx, C, y))
            for delta_t, dx_t, C_t, y_t, B_t in zip(*wide, B[rows].transpose(0, 1)[..., None], strict=True):
                torch.mul(delta_t, A_t, out=decay).exp_()
                h.mul_(decay).addcmul_(dx_t, B_t)
                torch.bmm(C_t, h, out=y_t)
            h_last[rows] = h.transpose(1, 2)
        return y, h_last

    @staticmethod
    def backward(ctx, grad_y, grad_last):  # type: ignore[override]
        x, delta, A, B, C, h_start = ctx.saved_tensors
        if compiled := _compiled("selective_scan_gradients", (x, delta, A, B, C, h_start, grad_y, grad_last)):
            found = compiled(x, delta, A, B, C, h_start, grad_y, grad_last, ctx.needs_input_grad[2])
            return *found[:2], found[2] if ctx.needs_input_grad[2] else None, *found[3:]
        dx, A_t = delta * x, A.T.contiguous()
        grad_dx, grad_delta = torch.empty_like(x), torch.empty_like(x)
        grad_B, grad_C = torch.empty_like(B), torch.empty_like(C)
        grad_A = torch.zeros_like(A_t) if ctx.needs_input_grad[2] else None
        grad_start = torch.empty_like(h_start)
        for rows in _blocks(x.shape[0], A.shape[0], A.shape[1], x.device):
            states, decays = [h_start[rows].transpose(1, 2).clone(memory_format=torch.contiguous_format)], []
            for t in range(x.shape[1]):
                decays.append((delta[rows, t, None, :] * A_t).exp_())
                drive = dx[rows, t, None, :] * B[rows, t, :, None]
                states.append(drive.addcmul_(decays[-1], states[-1]))
            g = grad_last[rows].transpose(1, 2).clone(memory_format=torch.contiguous_format)
            for t in range(x.shape[1] - 1, -1, -1):
                gy = grad_y[rows, t]
                grad_C[rows, t] = torch.bmm(states[t + 1], gy[:, :, None])[:, :, 0]
                g.addcmul_(gy[:, None, :], C[rows, t, :, None])
                grad_dx[rows, t] = torch.bmm(B[rows, t, None, :], g)[:, 0]
                grad_B[rows, t] = torch.bmm(g, dx[rows, t, :, None])[:, :, 0]
                g.mul_(decays[t])  # now the gradient of the previous state and, times it, of the exponent delta A
                exponent = g * states[t]
                grad_delta[rows, t] = (exponent * A_t).sum(1)
                if grad_A is not None:
                    grad_A += (exponent * delta[rows, t, None, :]).sum(0)
            grad_start[rows] = g.transpose(1, 2)
        grad_A = None if grad_A is None else grad_A.T
        return grad_dx * delta, grad_delta.addcmul_(grad_dx, x), grad_A, grad_B, grad_C, grad_start


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y [batch, pos, E] and the last state [batch, E, N]: equations 5-8 without keeping the states.

    x, delta: [batch, pos, E]; A: [E, N]; B, C: [batch, pos, N]; h_start: [batch, E, N], zeros by default.
    The form every pass uses that does not look at A_bar, B_bar or h; differentiable in every argument.
    """
    if h_start is None:
        h_start = x.new_zeros(x.shape[0], *A.shape)
    return _SelectiveScan.apply(x, delta, A, B, C, h_start)  # type: ignore[return-value]


def source_products(gradient: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Of each source and target the gradient at y times what y takes there, [batch, target, source]; 0 before the source.

    Shapes as of `selective_scan`; gradient: [batch, pos, E]. Not differentiable; `states_by_source` is its slow oracle.
    """
    n = x.shape[1]
    found, A_t, dx = x.new_zeros(x.shape[0], n, n), A.T.contiguous(), delta * x
    for rows in _blocks(x.shape[0], n * A.shape[0], A.shape[1], x.device):
        decay = (delta[rows, :, None, :] * A_t).exp_()
        held = B[rows, :, :, None] * dx[rows, :, None, :]  # what each source wrote, [row, source, N, E]
        reads = (C[rows, :, :, None] * gradient[rows, :, None, :]).flatten(2)[..., None]
        for t in range(n):
            held[:, :t].mul_(decay[:, t, None])
            found[rows, t, : t + 1] = torch.bmm(held[:, : t + 1].flatten(2), reads[:, t])[..., 0]
    return found
