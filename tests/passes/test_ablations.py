"""Kinds of ablation, each against passes in which the value is written by hand; and one of one's own."""

import pytest
import torch
from conditioning import logit_rounding

import ioi_mamba as im
from ioi_mamba.passes import sweep
from ioi_mamba.passes.ablations import ABLATIONS, Ablation
from ioi_mamba.passes.metrics import answer_logits
from ioi_mamba.passes.sweep import resample_sweep


@pytest.fixture(scope="module")
def pairs():
    generator = torch.Generator().manual_seed(9)
    clean = torch.randint(1, 40, (5, 7), generator=generator)
    corrupted = clean.clone()
    corrupted[:, 3] = (corrupted[:, 3] + 11) % 40
    return im.Pairs.from_tokens(clean, corrupted, clean[:, 0], corrupted[:, 3], roles={"n1": [3] * 5})


def by_hand(model, pairs, site, layer, position, value):
    """Logits of (answer, wrong) with `value` [pair, ...] written at one layer and position, of a pass over all."""
    if site == "h":
        edits = {f"blocks.{layer}.hook_h.{position}": value}
    else:

        def write(x):
            x[:, position] = value
            return x

        edits = {f"blocks.{layer}.hook_{site}": write}
    return answer_logits(im.run(model, pairs.clean, edits)[:, -1], pairs.answer, pairs.wrong)


@pytest.mark.parametrize("site", ["layer_input", "h", "B_bar"])
@pytest.mark.parametrize("kind", ["mean", "zero"])
def test_an_ablation_is_a_pass_with_the_value_written(tiny_mamba, pairs, site, kind):
    got = resample_sweep(tiny_mamba, pairs, site, layers=[1, 3], positions=[1, 4], ablation=kind)
    atol, moved = logit_rounding(tiny_mamba, pairs.clean, pairs.corrupted), 0.0
    for i, layer in enumerate((1, 3)):
        values = im.read(tiny_mamba, pairs.clean, f"blocks.{layer}.hook_{site}")[f"blocks.{layer}.hook_{site}"]
        for j, position in enumerate((1, 4)):
            here = values[:, position]
            value = here.mean(0, keepdim=True).expand_as(here) if kind == "mean" else torch.zeros_like(here)
            want = by_hand(tiny_mamba, pairs, site, layer, position, value)
            torch.testing.assert_close(got[i, j], want, rtol=0, atol=atol)
            moved = max(moved, float((want - by_hand(tiny_mamba, pairs, site, layer, position, here)).abs().max()))
    assert moved > 10 * atol


def test_noise_has_the_spread_of_the_values_and_its_own_numbers(tiny_mamba, pairs, monkeypatch):
    seen = []

    def kept(clean, corrupted, mean, deviation, noise):
        seen.append((clean, mean, deviation, noise))
        return clean + deviation * noise

    spy = Ablation("spy", "as noise", kept)
    got = resample_sweep(tiny_mamba, pairs, "layer_input", layers=[2], positions=[4], ablation=spy)
    noise = resample_sweep(tiny_mamba, pairs, "layer_input", layers=[2], positions=[4], ablation="noise")
    assert torch.equal(got, noise)
    ((clean, mean, deviation, numbers),) = seen
    assert torch.allclose(mean[0], clean.mean(0), atol=1e-5)
    assert torch.allclose(deviation[0], clean.std(0, correction=0), atol=1e-5)
    assert 0.8 < float(numbers.std()) < 1.2
    assert not torch.equal(numbers[0], numbers[1])
    want = by_hand(tiny_mamba, pairs, "layer_input", 2, 4, (clean + deviation * numbers)[:, 0])
    torch.testing.assert_close(got[0, 0], want, rtol=0, atol=logit_rounding(tiny_mamba, pairs.clean))


@pytest.mark.parametrize("kind", ABLATIONS)
def test_how_pairs_are_cut_into_passes_changes_nothing(tiny_mamba, pairs, monkeypatch, kind):
    whole = resample_sweep(tiny_mamba, pairs, "layer_input", ablation=kind)
    monkeypatch.setattr(sweep, "rows_per_chunk", lambda *_: 2)
    split = resample_sweep(tiny_mamba, pairs, "layer_input", ablation=kind)
    torch.testing.assert_close(split, whole, rtol=0, atol=logit_rounding(tiny_mamba, pairs.clean, pairs.corrupted))


def test_kinds_are_named_and_one_of_ones_own_is_one_record(tiny_mamba, pairs):
    flipped = Ablation("flip", "the value with its sign turned", lambda clean, *_: -clean)
    found = im.effect(tiny_mamba, pairs, "layer_input", layers=[1], positions=[4], ablation=flipped)
    assert found.ablation == "flip"
    assert "flip ablation of layer_input" in repr(found)
    with pytest.raises(im.InputError, match="ablation 'means' is unknown: did you mean 'mean'"):
        im.effect(tiny_mamba, pairs, "layer_input", ablation="means")
    with pytest.raises(im.InputError, match="h_and_conv can be resampled only"):
        resample_sweep(tiny_mamba, pairs, "h_and_conv", ablation="zero")
