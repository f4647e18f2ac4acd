"""The scan of a Mamba-2 against the recurrence written out, over several chunks, and its gradient."""

import pytest
import torch

from ioi_mamba.model import scan, ssd

H, P, G, N = 4, 3, 2, 5


def drawn(length, dtype=torch.float64, batch=2):
    """x, delta, A, B, C and a state to start from."""
    generator = torch.Generator().manual_seed(length)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)
    delta = torch.nn.functional.softplus(normal(batch, length, H))
    A = -torch.exp(0.5 * normal(H))
    x, B, C = normal(batch, length, H, P), normal(batch, length, G, N), normal(batch, length, G, N)
    return x, delta, A, B, C, normal(batch, H, P, N)


def slow(x, delta, A, B, C, h_start):
    """The recurrence as it is written down: y and the last state."""
    h, read = h_start, []
    group = [head // (H // G) for head in range(H)]
    for t in range(x.shape[1]):
        kept = torch.exp(delta[:, t] * A)[..., None, None]
        h = kept * h + torch.einsum("bhp,bhn->bhpn", x[:, t], delta[:, t, :, None] * B[:, t][:, group])
        read.append(torch.einsum("bhpn,bhn->bhp", h, C[:, t][:, group]))
    return torch.stack(read, 1), h


@pytest.mark.parametrize("length", [1, 2, ssd.CHUNK, ssd.CHUNK + 1, 2 * ssd.CHUNK + 7])
def test_the_scan_is_the_recurrence_written_out(length):
    values = drawn(length)
    for got, want in zip(ssd.ssd_scan(*values), slow(*values), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    nothing = torch.zeros_like(values[-1])
    torch.testing.assert_close(ssd.ssd_scan(*values[:-1])[0], slow(*values[:-1], nothing)[0], rtol=1e-10, atol=1e-10)


def test_in_float32_a_long_prompt_is_as_exact_as_a_short_one():
    for length in (20, 300):
        values = drawn(length)
        want = slow(*values)[0]
        got = ssd.ssd_scan(*(value.float() for value in values))[0].double()
        assert float((got - want).abs().max() / want.abs().max()) < 2e-6


def test_all_states_read_out_are_the_scan():
    x, delta, A, B, C, h_start = drawn(9)
    A_bar = torch.exp(delta * A)[..., None, None]
    drive = x[..., None] * (delta[..., None] * ssd.by_head(B, H))[..., None, :]
    states = scan.recurrence(A_bar.expand_as(drive), drive, h_start)
    y, last = ssd.ssd_scan(x, delta, A, B, C, h_start)
    torch.testing.assert_close(ssd.read_out(states, C), y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(states[:, -1], last, rtol=1e-10, atol=1e-10)


def test_the_gradient_is_that_of_the_recurrence():
    values = [value.requires_grad_() for value in drawn(ssd.CHUNK + 3, batch=1)]
    found = []
    for form in (ssd.ssd_scan, slow):
        y, last = form(*values)
        found.append(torch.autograd.grad(y.square().sum() + last.sum(), values))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
