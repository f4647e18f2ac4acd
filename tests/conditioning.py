"""How far rounding can move a model's results on any processor: the tolerance of tests that compute one thing two ways.

Another processor, memory layout, number of rows or threads adds the same numbers up in another order. A pass so
computed is the exact pass of a model whose weights are moved by a few units in the last place; so the weights are
moved by one unit here, and what the logits make of that is the unit that the tests allow a number of.
"""

import copy

import torch

from ioi_mamba import metrics

UNITS = 32  # passes of a few layers differ by under 10 such units between the processors that `nox -s processors` imitates


def logit_rounding(model, *prompts):
    """The logits that two ways to compute one pass may differ by: UNITS times what one unit in each weight's last place does."""
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
    """The same for effects: differences of two logits over the smallest range of `pairs`, as (of their size, of the rest)."""
    rows = torch.arange(len(pairs))
    clean, corrupted = (
        metrics.logit_diff(
            model._module(tokens, use_cache=False).logits[rows, pairs.last].detach(), pairs.answer, pairs.wrong
        )
        for tokens in (pairs.clean, pairs.corrupted)
    )
    return 4 * logit_rounding(model, pairs.clean, pairs.corrupted) / float((clean - corrupted).abs().min())
