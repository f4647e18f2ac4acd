"""How far rounding can move a model's results: the tolerance of tests that compute one thing in two ways.

Another processor, memory layout, number of rows or threads adds the same numbers up in another order. A pass so
computed is the exact pass of weights moved by a few units in their last place (backward error analysis). The weights
are moved by one such unit here, and what the logits make of it is the unit of the tolerances. It holds for every
dtype, and grows with a model or a prompt that is ill-conditioned.
"""

import copy
from dataclasses import replace

import torch

from ioi_mamba.passes import metrics

# Two ways differ by up to 1 unit on each processor that was tried or imitated (tests/processors.py).
UNITS = 8


def logit_rounding(model, *prompts):
    """By how much two ways to compute the logits of these prompts (tokens) may differ, anywhere in them."""
    module, worst = model._module, 0.0
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(3):
            moved = copy.deepcopy(module)
            for parameter in moved.parameters():
                sign = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                parameter.mul_(1 + torch.finfo(parameter.dtype).eps * sign)
            for tokens in prompts:
                difference = moved(tokens, use_cache=False).logits - module(tokens, use_cache=False).logits
                worst = max(worst, float(difference.abs().max()))
    return UNITS * worst


def effect_rounding(model, pairs):
    """The same for an effect near 1, or a normalised logit difference: four logits over the smallest range of `pairs`."""
    clean, corrupted = (_last(model, tokens, pairs) for tokens in (pairs.clean, pairs.corrupted))
    difference = [metrics.logit_diff(logits, pairs.answer, pairs.wrong) for logits in (clean, corrupted)]
    return 4 * logit_rounding(model, pairs.clean, pairs.corrupted) / float((difference[0] - difference[1]).abs().min())


def widest(model, pairs):
    """The same prompts, each with the two answers whose range (clean to corrupted) is largest: the best conditioned."""
    moved = _last(model, pairs.clean, pairs) - _last(model, pairs.corrupted, pairs)
    answer, wrong = moved.argmax(-1), moved.argmin(-1)
    return replace(pairs, answer=answer, wrong=wrong, candidates=torch.stack([answer, wrong], -1))


def assert_same_effects(got, want, model, pairs):
    """Two tables of effects are equal: all that was counted or named to the letter, effects but for rounding.

    The columns of intervals are left out: how far rounding moves one depends on the number of pairs.
    """
    exact = [name for name in want.columns if want[name].dtype.kind != "f"]
    assert got[exact].equals(want[exact])
    tolerance = effect_rounding(model, pairs)
    assert tolerance < 0.02, "these pairs are too badly conditioned to compare anything by: take `widest` of them"
    error = (got["effect"] - want["effect"]).abs() / want["effect"].abs().clip(lower=1)
    assert error.max() < tolerance, f"effects differ by {error.max():.1e}, rounding explains {tolerance:.1e}"


def _last(model, tokens, pairs):
    with torch.no_grad():
        return model._module(tokens, use_cache=False).logits[torch.arange(len(pairs)), pairs.last]
