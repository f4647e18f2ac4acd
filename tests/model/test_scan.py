"""The selective scan: three forms of one recurrence, their gradients, and the scan of transformers."""

import conftest  # noqa: F401  sets the environment before transformers is imported
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from ioi_mamba.model import compiled_scan, scan

NAMES = ("x", "delta", "A", "B", "C", "h_start")
SIZES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "n_pos": st.integers(2, 6),
        "E": st.integers(1, 4),
        "N": st.integers(1, 4),
        "seed": st.integers(0, 10**6),
    }
)
few = settings(max_examples=20, deadline=None)


@pytest.fixture(autouse=True, params=["torch", "compiled"])
def loop(request, monkeypatch):
    """Every test twice: with the loop of torch, and with the compiled one where there is a compiler."""
    if request.param == "torch":
        monkeypatch.setattr(scan, "_compiled", lambda *_: None)
    elif (found := compiled_scan.load()).startswith(compiled_scan.LOOP):
        pytest.skip(found)


def inputs(batch=3, n_pos=6, E=5, N=4, dtype=torch.float64, seed=0):
    """x, delta, A, B, C, h_start, all lively and all sizes different."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=dtype, generator=generator)
    return (
        draw(batch, n_pos, E),
        draw(batch, n_pos, E).exp().mul(0.3),
        -draw(E, N).exp(),
        draw(batch, n_pos, N),
        draw(batch, n_pos, N),
        draw(batch, E, N),
    )


def by_equations(x, delta, A, B, C, h_start):
    """y and the last state, through the reference recurrence."""
    A_bar, B_bar = scan.discretize(delta, A, B)
    h = scan.recurrence_reference(A_bar, B_bar * x[..., None], h_start)
    return scan.read_out(h, C), h[:, -1]


def test_the_reference_is_the_recurrence_of_the_paper_worked_by_hand():
    x, delta = torch.tensor([[[2.0], [3.0]]]), torch.tensor([[[0.5], [1.0]]])
    A, B, C = torch.tensor([[-1.0]]), torch.tensor([[[4.0], [5.0]]]), torch.tensor([[[1.0], [10.0]]])
    y, h_last = by_equations(x, delta, A, B, C, torch.tensor([[[8.0]]]))
    first = torch.exp(torch.tensor(-0.5)) * 8 + 0.5 * 4 * 2
    second = torch.exp(torch.tensor(-1.0)) * first + 1 * 5 * 3
    torch.testing.assert_close(y.flatten(), torch.stack([first, 10 * second]))
    torch.testing.assert_close(h_last.flatten(), second[None])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_all_forms_are_equal_in_either_precision(dtype, tolerance):
    x, delta, A, B, C, h_start = inputs(dtype=dtype)
    A_bar, B_bar = scan.discretize(delta, A, B)
    h = scan.recurrence_reference(A_bar, B_bar * x[..., None], h_start)
    fast = scan.recurrence(A_bar, B_bar * x[..., None], h_start)
    y, h_last = scan.selective_scan(x, delta, A, B, C, h_start)
    assert y.dtype == fast.dtype == dtype
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(fast, h, **close)
    torch.testing.assert_close(y, scan.read_out(h, C), **close)
    torch.testing.assert_close(h_last, h[:, -1], **close)


def test_the_read_out_is_a_sum_over_the_state_columns():
    h, C = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 5)
    torch.testing.assert_close(scan.read_out(h, C), (h * C[:, :, None, :]).sum(-1))


def test_without_a_start_the_scan_starts_from_zeros():
    *values, h_start = inputs()
    for got, want in zip(
        scan.selective_scan(*values), scan.selective_scan(*values, torch.zeros_like(h_start)), strict=True
    ):
        assert torch.equal(got, want)


def test_a_start_of_one_row_serves_every_row_of_the_recurrence():
    x, delta, A, B, _, h_start = inputs()
    A_bar, B_bar = scan.discretize(delta, A, B)
    one, Bx = h_start[:1].clone().requires_grad_(), B_bar * x[..., None]
    h = scan.recurrence(A_bar, Bx, one)
    torch.testing.assert_close(h, scan.recurrence_reference(A_bar, Bx, one.expand_as(h_start)))
    (grad,) = torch.autograd.grad(h.sum(), one)
    (want,) = torch.autograd.grad(scan.recurrence_reference(A_bar, Bx, one.expand_as(h_start)).sum(), one)
    torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("n_pos", [1, 4])
def test_the_gradients_of_the_recurrence_are_those_of_finite_differences(n_pos):
    x, delta, A, B, _, h_start = inputs(batch=2, n_pos=n_pos, E=3, N=2)
    A_bar, B_bar = scan.discretize(delta, A, B)
    arguments = [v.detach().requires_grad_() for v in (A_bar, B_bar * x[..., None], h_start)]
    assert gradcheck(scan.recurrence, arguments)


@pytest.mark.parametrize("n_pos", [1, 4])
def test_the_gradients_of_the_scan_in_all_six_inputs_are_those_of_finite_differences(n_pos):
    arguments = [v.requires_grad_() for v in inputs(batch=2, n_pos=n_pos, E=3, N=2)]
    assert gradcheck(scan.selective_scan, arguments)


@pytest.mark.parametrize("name", NAMES)
def test_each_input_alone_has_its_gradient_when_the_others_are_frozen(name):
    arguments = dict(zip(NAMES, inputs(), strict=True))
    arguments[name].requires_grad_()
    weight = torch.randn(3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = [
        torch.autograd.grad((form(**arguments)[0] * weight).sum(), arguments[name])[0]
        for form in (scan.selective_scan, by_equations)
    ]
    assert grads[0].abs().max() > 1e-3
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_scan_of_transformers_gives_the_same_output_and_last_state(seed):
    x, delta, A, B, C, _ = inputs(batch=2, n_pos=9, dtype=torch.float32, seed=seed)
    D, z = torch.randn(5), torch.randn_like(x)
    stock, last = mamba_selective_scan(
        *(v.transpose(1, 2) for v in (x, delta)),
        A,
        B.transpose(1, 2),
        C.transpose(1, 2),
        D=D,
        z=z.transpose(1, 2),
        return_last_state=True,
    )
    y, h_last = scan.selective_scan(x, delta, A, B, C)
    own = (y + D * x) * torch.nn.functional.silu(z)
    torch.testing.assert_close(own, stock.transpose(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(h_last, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
def test_blocks_smaller_than_the_batch_change_neither_values_nor_gradients(monkeypatch, rows):
    arguments = [v.requires_grad_() for v in inputs(batch=5)]

    def outcome():
        outputs = scan.selective_scan(*arguments)
        return [*outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), arguments)]

    whole = outcome()
    monkeypatch.setattr(scan, "_BLOCK", rows * 5 * 4)
    for got, want in zip(outcome(), whole, strict=True):
        torch.testing.assert_close(got, want)


def test_inputs_that_are_not_contiguous_give_the_same_values_and_gradients():
    plain = [v.requires_grad_() for v in inputs()]
    strided = [v.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for v in plain]
    assert not any(v.is_contiguous() for v in strided)
    for values in (plain, strided):
        y, h_last = scan.selective_scan(*values)
        values.append((y, h_last, *torch.autograd.grad(y.square().sum() + h_last.sum(), values)))
    for got, want in zip(strided[-1], plain[-1], strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("sizes", [{}, {"E": 1}, {"N": 1}, {"batch": 1, "n_pos": 1}])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_inputs_and_the_gradients_handed_in_are_left_as_they_were(sizes, transposed):
    values = list(inputs(**sizes))
    if transposed:  # a state that lies in memory as [row, N, E]
        values[5] = values[5].transpose(1, 2).contiguous().transpose(1, 2)
    before = [v.clone() for v in values]
    y, h_last = scan.selective_scan(*[v.requires_grad_() for v in values])
    grads = [torch.ones_like(y), torch.ones_like(h_last)]
    own = torch.autograd.grad((y, h_last), values, grads)
    assert all(torch.equal(a, b) for a, b in zip(values, before, strict=True))
    assert all(bool((grad == 1).all()) for grad in grads)
    want = torch.autograd.grad(by_equations(*values), values, grads)
    for got, expected in zip(own, want, strict=True):
        torch.testing.assert_close(got, expected)


def test_the_inputs_of_the_recurrence_are_left_as_they_were():
    x, delta, A, B, _, h_start = inputs()
    A_bar, B_bar = scan.discretize(delta, A, B)
    values = (A_bar, B_bar * x[..., None], h_start)
    before = [v.clone() for v in values]
    scan.recurrence(*values)
    assert all(torch.equal(a, b) for a, b in zip(values, before, strict=True))


@few
@given(SIZES, st.floats(-3, 3), st.floats(-3, 3))
def test_the_scan_is_linear_in_x_and_the_start_together(sizes, a, b):
    x, delta, A, B, C, h_start = inputs(**sizes)
    other_x, *_, other_start = inputs(**sizes | {"seed": sizes["seed"] + 1})
    form = lambda x, h: torch.cat([v.flatten() for v in scan.selective_scan(x, delta, A, B, C, h)])
    both = form(a * x + b * other_x, a * h_start + b * other_start)
    torch.testing.assert_close(both, a * form(x, h_start) + b * form(other_x, other_start))


@few
@given(SIZES, st.data())
def test_nothing_before_a_position_sees_what_changes_there(sizes, data):
    position = data.draw(st.integers(0, sizes["n_pos"] - 1))
    values = inputs(**sizes)
    changed = [v.clone() for v in values]
    for i in (0, 1, 3, 4):  # x, delta, B, C
        changed[i][:, position] *= 1.5
    before, after = scan.selective_scan(*values)[0], scan.selective_scan(*changed)[0]
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.equal(before[:, position], after[:, position])


@few
@given(SIZES, st.data())
def test_a_scan_may_be_cut_in_two_and_go_on_from_the_last_state(sizes, data):
    cut = data.draw(st.integers(1, sizes["n_pos"] - 1))
    x, delta, A, B, C, h_start = inputs(**sizes)
    y, h_last = scan.selective_scan(x, delta, A, B, C, h_start)
    part = lambda where, h: scan.selective_scan(x[:, where], delta[:, where], A, B[:, where], C[:, where], h)
    first, h_cut = part(slice(cut), h_start)
    second, h_end = part(slice(cut, None), h_cut)
    torch.testing.assert_close(torch.cat((first, second), 1), y)
    torch.testing.assert_close(h_end, h_last)


@pytest.mark.parametrize("batch", [1, 5])
def test_what_sources_hold_sums_to_the_states_and_its_products_are_their_gradient(batch):
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    x, gradient, B, C = draw(batch, 7, 6), draw(batch, 7, 6), draw(batch, 7, 4), draw(batch, 7, 4)
    delta, A = draw(batch, 7, 6).exp(), -draw(6, 4).exp()
    A_bar, B_bar = scan.discretize(delta, A, B)
    states = scan.recurrence_reference(A_bar, B_bar * x[..., None], torch.zeros(batch, 6, 4, dtype=torch.float64))
    held = list(scan.states_by_source(x, delta, A, B))
    for t, each in enumerate(held):
        assert torch.allclose(each.sum(1), states[:, t], atol=1e-12)
    products = scan.source_products(gradient, x, delta, A, B, C)
    for t in range(7):
        want = torch.einsum("be,bsen,bn->bs", gradient[:, t], held[t], C[:, t])
        assert torch.allclose(products[:, t, : t + 1], want, atol=1e-12)
        assert not products[:, t, t + 1 :].any()
