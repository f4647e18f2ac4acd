"""How far rounding goes: every site in every dtype against a float64 reference, long prompts, batches, deltas."""

import golden
import pytest
import reference
import torch

import ioi_mamba as im
from ioi_mamba.model import scan

# Of the largest value of the site, over three random layers; each is two to ten times what is seen. In float64 the
# stock mixer still casts A to float32.
TOLERANCE = {"float64": 1e-5, "float32": 1e-5, "bfloat16": 0.2, "float16": 0.02}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_site_in_every_dtype_is_near_the_reference_in_float64(dtype, tried):
    model = golden.odd_model(dtype)
    tokens = torch.arange(1, 19).reshape(2, 9)
    want = reference.run(reference.weights_of(model), tokens)
    got = im.read(model, tokens, list(want))
    bad = {
        name: e for name in want if not (e := golden.relative_error(got[name].double(), want[name])) < TOLERANCE[dtype]
    }
    assert not bad
    tried(f"a site in {dtype}", len(want))


def test_a_prompt_of_512_tokens_is_as_near_the_reference_as_a_short_one(tried):
    model = golden.odd_model()
    tokens = torch.randint(60, (1, 512), generator=torch.Generator().manual_seed(0))
    want = reference.run(reference.weights_of(model), tokens)
    names = [name for name in want if ".hook_h." not in name]
    got = im.read(model, tokens, names)
    assert not {name: e for name in names if not (e := golden.relative_error(got[name], want[name])) < 2e-5}
    started = {f"blocks.{i}.hook_h_start": torch.zeros_like(got[f"blocks.{i}.hook_h_start"]) for i in range(3)}
    assert golden.relative_error(im.run(model, tokens, started), want["hook_logits"]) < 2e-5  # by our own scan
    tried("a site of a prompt of 512 tokens", len(names) + 1)


def test_a_row_has_its_values_whatever_else_is_in_the_batch(tiny_mamba, tried):
    tokens = torch.randint(40, (7, 12), generator=torch.Generator().manual_seed(1))
    names = [f"blocks.{i}.hook_{site}" for i in range(4) for site in ("h", "y", "resid_post")] + ["hook_logits"]
    whole = im.read(tiny_mamba, tokens, names)
    for rows in ([0], [6, 0], [3, 3, 3], [5, 1, 4, 2]):
        part = im.read(tiny_mamba, tokens[rows], names)
        for name in names:
            assert golden.relative_error(part[name], whole[name][rows]) < 1e-5, name
    tried("a batch put together otherwise", 4)


@pytest.mark.parametrize("delta", [0.0, 1e-30, 1e-8, 1e2, 1e8])
def test_very_small_and_very_large_deltas_keep_the_scan_exact(delta, tried):
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    x, B, C, A = draw(2, 20, 3), draw(2, 20, 4), draw(2, 20, 4), -draw(3, 4).exp()
    step = torch.full_like(x, delta)
    got, last = scan.selective_scan(*(t.float() for t in (x, step, A, B, C)))
    h = torch.zeros(2, 3, 4, dtype=torch.float64)
    for t in range(20):
        h = torch.exp(step[:, t, :, None] * A) * h + step[:, t, :, None] * B[:, t, None, :] * x[:, t, :, None]
        want = (h * C[:, t, None, :]).sum(-1)
        assert torch.isfinite(got[:, t]).all()
        torch.testing.assert_close(got[:, t].double(), want, rtol=1e-4, atol=1e-5 * max(float(want.abs().max()), 1e-30))
    torch.testing.assert_close(last.double(), h, rtol=1e-4, atol=1e-5 * max(float(h.abs().max()), 1e-30))
    tried("a delta far from those of a model", 1)
