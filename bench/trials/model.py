"""Stacked Mambas: M models of one shape trained together, in plain torch, with a Triton scan where there is one."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton is not None:

    @triton.jit
    def _scan_forward(x, d, A, B, C, y, H, L, RPM, E: tl.constexpr, N: tl.constexpr, BE: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        e = tl.program_id(1) * BE + tl.arange(0, BE)
        n = tl.arange(0, N)
        a = tl.load(A + (row // RPM) * E * N + e[:, None] * N + n[None, :])
        h = tl.zeros([BE, N], dtype=tl.float32)
        for t in range(0, L):
            at = row * L + t
            dt = tl.load(d + at * E + e)
            xt = tl.load(x + at * E + e)
            b = tl.load(B + at * N + n)
            c = tl.load(C + at * N + n)
            h = tl.exp(dt[:, None] * a) * h + (dt * xt)[:, None] * b[None, :]
            tl.store(H + (at * E + e[:, None]) * N + n[None, :], h)
            tl.store(y + at * E + e, tl.sum(h * c[None, :], 1))

    @triton.jit
    def _scan_backward(
        x, d, A, B, C, H, gy, dx, dd, dA, dB, dC, L, RPM, ROWS,
        E: tl.constexpr, N: tl.constexpr, BE: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        block = tl.program_id(1).to(tl.int64)
        e = block * BE + tl.arange(0, BE)
        n = tl.arange(0, N)
        a = tl.load(A + (row // RPM) * E * N + e[:, None] * N + n[None, :])
        g = tl.zeros([BE, N], dtype=tl.float32)
        da = tl.zeros([BE, N], dtype=tl.float32)
        for i in range(0, L):
            t = L - 1 - i
            at = row * L + t
            dt = tl.load(d + at * E + e)
            xt = tl.load(x + at * E + e)
            b = tl.load(B + at * N + n)
            c = tl.load(C + at * N + n)
            gt = tl.load(gy + at * E + e)
            h = tl.load(H + (at * E + e[:, None]) * N + n[None, :])
            inside = (e[:, None] >= 0) & (t > 0)
            before = tl.load(H + ((at - 1) * E + e[:, None]) * N + n[None, :], mask=inside, other=0.0)
            part = ((block * ROWS + row) * L + t) * N + n
            tl.store(dC + part, tl.sum(gt[:, None] * h, 0))
            g += gt[:, None] * c[None, :]
            ddx = tl.sum(g * b[None, :], 1)
            tl.store(dB + part, tl.sum(g * (dt * xt)[:, None], 0))
            g = g * tl.exp(dt[:, None] * a)
            exponent = g * before
            tl.store(dd + at * E + e, tl.sum(exponent * a, 1) + ddx * xt)
            tl.store(dx + at * E + e, ddx * dt)
            da += exponent * dt[:, None]
        tl.store(dA + (row * E + e[:, None]) * N + n[None, :], da)


def _block(E: int) -> int:
    return next(b for b in (64, 32, 16) if E % b == 0)


class TritonScan(torch.autograd.Function):
    """x, delta [M*B, L, E]; A [M, E, N]; B, C [M*B, L, N] -> y [M*B, L, E]."""

    @staticmethod
    def forward(ctx, x, d, A, B, C):
        x, d, A, B, C = (v.contiguous() for v in (x, d, A, B, C))
        rows, L, E = x.shape
        N, BE = A.shape[-1], _block(E)
        y, H = torch.empty_like(x), x.new_empty(rows, L, E, N)
        _scan_forward[(rows, E // BE)](x, d, A, B, C, y, H, L, rows // len(A), E, N, BE, num_warps=2)
        ctx.save_for_backward(x, d, A, B, C, H)
        return y

    @staticmethod
    def backward(ctx, gy):
        x, d, A, B, C, H = ctx.saved_tensors
        rows, L, E = x.shape
        N, BE = A.shape[-1], _block(E)
        dx, dd = torch.empty_like(x), torch.empty_like(x)
        dA = x.new_empty(rows, E, N)
        dB, dC = x.new_empty(E // BE, rows, L, N), x.new_empty(E // BE, rows, L, N)
        _scan_backward[(rows, E // BE)](
            x, d, A, B, C, H, gy.contiguous(), dx, dd, dA, dB, dC, L, rows // len(A), rows, E, N, BE, num_warps=2
        )
        return dx, dd, dA.view(len(A), -1, E, N).sum(1), dB.sum(0), dC.sum(0)


def _doubling(a: Tensor, b: Tensor) -> Tensor:
    """h_t = a_t h_(t-1) + b_t along dim 1, by doubling: log2(L) steps."""
    step, L = 1, a.shape[1]
    while step < L:
        b = torch.cat([b[:, :step], b[:, step:] + a[:, step:] * b[:, :-step]], 1)
        a = torch.cat([a[:, :step], a[:, step:] * a[:, :-step]], 1)
        step *= 2
    return b


class DoublingScan(torch.autograd.Function):
    """The same without Triton."""

    @staticmethod
    def forward(ctx, x, d, A, B, C):
        rows_of = A.repeat_interleave(len(x) // len(A), 0)[:, None]
        decay = (d[..., None] * rows_of).exp()
        h = _doubling(decay, (d * x)[..., None] * B[:, :, None])
        ctx.save_for_backward(x, d, A, B, C, h)
        return (h @ C[..., None])[..., 0]

    @staticmethod
    def backward(ctx, gy):
        x, d, A, B, C, h = ctx.saved_tensors
        rows_of = A.repeat_interleave(len(x) // len(A), 0)[:, None]
        decay = (d[..., None] * rows_of).exp()
        dC = (gy[..., None] * h).sum(2)
        own = gy[..., None] * C[:, :, None]
        later = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], 1)
        g = _doubling(later.flip(1), own.flip(1)).flip(1)
        ddx = (g * B[:, :, None]).sum(-1)
        dB = (g * (d * x)[..., None]).sum(2)
        before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
        exponent = g * decay * before
        dd = (exponent * rows_of).sum(-1) + ddx * x
        dA = (exponent * d[..., None]).sum(1).view(len(A), -1, *A.shape[1:]).sum(1)
        return ddx * d, dd, dA, dB, dC


SCAN = {"scan": DoublingScan}


class Shapes:
    """The parameters of one model in a flat row, by the names of MambaForCausalLM."""

    def __init__(self, state: dict):
        self.names = [name for name in state if name != "lm_head.weight"]
        self.shapes = [tuple(state[name].shape) for name in self.names]
        self.sizes = [math.prod(shape) for shape in self.shapes]

    def flat(self, state: dict) -> Tensor:
        return torch.cat([state[name].flatten().float() for name in self.names])

    def views(self, theta: Tensor) -> dict[str, Tensor]:
        """theta [M, P] -> name -> [M, *shape]."""
        parts = theta.split(self.sizes, 1)
        return {n: p.view(len(theta), *s) for n, p, s in zip(self.names, parts, self.shapes)}

    def state(self, row: Tensor) -> dict[str, Tensor]:
        parts = row.split(self.sizes)
        out = {n: p.view(s).clone().cpu() for n, p, s in zip(self.names, parts, self.shapes)}
        return out | {"lm_head.weight": out["backbone.embeddings.weight"].clone()}

    def matrices(self) -> Tensor:
        return torch.cat([torch.full((n,), float(len(s) > 1)) for n, s in zip(self.sizes, self.shapes)])


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, B, L, D], weight [M, D]."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight[:, None, None]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [M, B, L, i], weight [M, o, i], bias [M, o]."""
    M, B, L, _ = x.shape
    flat = x.reshape(M, B * L, -1)
    out = torch.bmm(flat, weight.mT) if bias is None else torch.baddbmm(bias[:, None], flat, weight.mT)
    return out.view(M, B, L, -1)


class Lookup(torch.autograd.Function):
    """F.embedding whose gradient a graph can capture on any version."""

    @staticmethod
    def forward(ctx, table, index):
        ctx.save_for_backward(index)
        ctx.shape = table.shape
        return table[index]

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_add_(0, index.flatten(), grad.reshape(-1, ctx.shape[1])), None


def embed(p: dict, tokens: Tensor) -> Tensor:
    """tokens [M, B, L] -> [M, B, L, D]."""
    table = p["backbone.embeddings.weight"]
    M, V, D = table.shape
    return Lookup.apply(table.reshape(M * V, D), tokens + V * torch.arange(M, device=tokens.device)[:, None, None])


def mixer(p: dict, i: int, x: Tensor, swap=None) -> tuple[Tensor, Tensor]:
    """The output of layer i for its normalised input [M, B, L, D], and its conv input.

    swap: (mask, value) replaces the conv input where mask [M, B, 1, 1].
    """
    at = f"backbone.layers.{i}.mixer."
    q = {name: p[at + name] for name in ("in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight",
         "dt_proj.weight", "dt_proj.bias", "A_log", "D", "out_proj.weight")}  # fmt: skip
    M, B, L, _ = x.shape
    N = q["A_log"].shape[-1]
    z, gate = linear(x, q["in_proj.weight"]).chunk(2, -1)
    if swap is not None:
        z = torch.where(swap[0], swap[1], z)
    taps = q["conv1d.weight"][:, :, 0]  # [M, E, K]
    K = taps.shape[-1]
    padded = F.pad(z, (0, 0, K - 1, 0))
    conv = q["conv1d.bias"][:, None, None]
    for k in range(K):
        conv = conv + taps[:, None, None, :, k] * padded[:, :, k : k + L]
    u = F.silu(conv)
    low, Bs, Cs = linear(u, q["x_proj.weight"]).split([q["dt_proj.weight"].shape[-1], N, N], -1)
    delta = F.softplus(linear(low, q["dt_proj.weight"], q["dt_proj.bias"]))
    flat = [v.reshape(M * B, L, -1) for v in (u, delta, Bs, Cs)]
    y = SCAN["scan"].apply(flat[0], flat[1], -q["A_log"].exp(), flat[2], flat[3]).view(M, B, L, -1)
    out = (y + u * q["D"][:, None, None]) * F.silu(gate)
    return linear(out, q["out_proj.weight"]), z


def forward(p: dict, tokens: Tensor, n_layers: int, keep=None) -> Tensor:
    """Last residual stream, normed [M, B, L, D]. keep [n_layers, M, B, 1, 1]: factors of the layers' outputs."""
    stream = embed(p, tokens)
    for i in range(n_layers):
        out, _ = mixer(p, i, norm(stream, p[f"backbone.layers.{i}.norm.weight"]))
        stream = stream + (out if keep is None else out * keep[i])
    return norm(stream, p["backbone.norm_f.weight"])
