"""How the compiled loop of the selective scan comes to be used, and when it is not. Its numbers: `test_scan.py`."""

import os
import stat
import subprocess
import sys

import conftest  # noqa: F401  sets the environment before transformers is imported
import pytest
import torch

from ioi_mamba.model import compiled_scan, scan


@pytest.fixture
def compiled():
    if (found := compiled_scan.load()).startswith(compiled_scan.LOOP):
        pytest.skip(found)


def values(dtype=torch.float32, rows=5, positions=7, E=130, N=3):
    """x, delta, A, B, C and a start: more channels than two blocks of the compiled loop, and no multiple of one."""
    draw = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)
    x, B, start = draw(rows, positions, E), draw(rows, positions, N), draw(rows, E, N)
    return x, draw(rows, positions, E).exp(), -draw(E, N).exp(), B, B.flip(0), start


def loaded(cache, script="", **environment):
    """What a fresh process says that it uses, with a cache of its own."""
    code = f"{script}\nfrom ioi_mamba.model import compiled_scan; print(compiled_scan.load())"
    whole = os.environ | {"XDG_CACHE_HOME": str(cache)} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=whole)
    assert not done.returncode, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_rows_give_the_same_bytes_on_any_number_of_threads(compiled, threads):
    arguments = [v.requires_grad_() for v in values()]

    def outcome():
        y, last = scan.selective_scan(*arguments)
        # Without A, whose gradient is a sum over rows, and with it.
        few = [v for k, v in enumerate(arguments) if k != 2]
        score = y.sin().sum() + last.sum()
        return [y, last, *(g for of in (few, arguments) for g in torch.autograd.grad(score, of, retain_graph=True))]

    whole, before = outcome(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(a, b) for a, b in zip(outcome(), whole, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("exponent", [-200.0, -90.0, -1e-8, 0.0, 50.0, 200.0, float("nan")])
def test_any_decay_is_that_of_torch(compiled, exponent):
    """A delta that was written can be negative or large. An exponent is rounded, which e to it feels by as much as it is large."""
    one = torch.ones(1, 1, 1)
    start = torch.full((1, 1, 1), 2.0)
    y, _ = scan.selective_scan(0 * one, exponent * one, one[0], one, one, start)
    rounding = 3e-7 + abs(exponent) * torch.finfo(torch.float32).eps if exponent == exponent else 0.0
    torch.testing.assert_close(
        y, 2 * torch.tensor(exponent).exp().view(1, 1, 1), rtol=rounding, atol=1e-37, equal_nan=True
    )


def test_it_can_be_put_away_and_taken_up_again(compiled):
    tensors = values()
    with_it = scan.selective_scan(*tensors)[0]
    compiled_scan.unload()
    try:
        assert scan._compiled("selective_scan", tensors) is None
        without = scan.selective_scan(*tensors)[0]
    finally:
        assert not compiled_scan.load().startswith(compiled_scan.LOOP)
    torch.testing.assert_close(without, with_it, rtol=1e-5, atol=1e-5)
    assert torch.equal(scan.selective_scan(*tensors)[0], with_it)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_compiled_loop_is_asked_where_it_can_answer_and_nowhere_else(compiled, dtype):
    tensors = values(dtype)
    assert scan._compiled("selective_scan", tensors) is torch.ops.ioi_mamba.selective_scan
    assert scan._compiled("selective_scan", (tensors[0], tensors[1].half(), *tensors[2:])) is None
    assert scan._compiled("selective_scan", tuple(v.to("meta") for v in tensors)) is None
    assert scan._compiled("selective_scan", tuple(v.bfloat16() for v in tensors)) is None


def test_shapes_alone_can_be_asked_for(compiled):
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(v).requires_grad_() for v in values()]
        y, last = scan.selective_scan(*fakes)
        grads = torch.autograd.grad(y.sum() + last.sum(), fakes)
    assert (y.shape, last.shape) == (fakes[0].shape, fakes[5].shape)
    assert [g.shape for g in grads] == [v.shape for v in fakes]


def test_it_is_compiled_once_and_then_taken_from_the_cache(compiled, tmp_path):
    assert loaded(tmp_path).startswith("compiled")
    (library,) = (tmp_path / "ioi_mamba").iterdir()
    before = library.stat().st_mtime_ns
    assert loaded(tmp_path).startswith("compiled")
    assert [p.stat().st_mtime_ns for p in (tmp_path / "ioi_mamba").iterdir()] == [before]


def test_the_switch_keeps_the_loop_of_torch(tmp_path):
    assert loaded(tmp_path, **{compiled_scan.SWITCH: "0"}) == f"{compiled_scan.LOOP} ({compiled_scan.SWITCH}=0)"
    assert not (tmp_path / "ioi_mamba").exists()


def test_without_a_compiler_the_loop_of_torch_is_kept_and_the_reason_said(tmp_path):
    nothing = {"PATH": str(tmp_path), "CXX": ""}
    assert loaded(tmp_path, **nothing) == f"{compiled_scan.LOOP} (there is no C++ compiler)"


def test_a_compiler_that_fails_leaves_the_loop_of_torch_and_no_library(tmp_path):
    fails = tmp_path / "fails"
    fails.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'no such target' >&2\nexit 1\n")
    fails.chmod(fails.stat().st_mode | stat.S_IXUSR)
    found = loaded(tmp_path, CXX=str(fails))
    assert found.startswith(compiled_scan.LOOP)
    assert "no such target" in found
    assert not list((tmp_path / "ioi_mamba").iterdir())


def test_a_cache_that_cannot_be_written_leaves_the_loop_of_torch(compiled, tmp_path):
    (tmp_path / "ioi_mamba").write_text("a file in the place of the directory")
    assert loaded(tmp_path).startswith(compiled_scan.LOOP)
