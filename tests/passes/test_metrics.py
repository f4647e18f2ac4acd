"""Every metric against a value worked out by hand or by a slower route."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ioi_mamba.errors import InputError
from ioi_mamba.passes import metrics

ANSWER = torch.tensor([0, 2])
WRONG = torch.tensor([1, 3])
CANDIDATES = torch.tensor([[1, 0, -1], [3, 2, 4]])
LOGITS = torch.tensor([[2.0, 0.5, 9.0, 0.0, -1.0], [8.0, 9.0, 1.0, 1.5, -4.0]])


def test_logit_difference_is_answer_minus_wrong_from_full_or_gathered_logits():
    assert metrics.logit_diff(LOGITS, ANSWER, WRONG).tolist() == [1.5, -0.5]
    gathered = metrics.answer_logits(LOGITS, ANSWER, WRONG)
    assert gathered.tolist() == [[2.0, 0.5], [1.0, 1.5]]
    assert metrics.logit_diff(gathered).tolist() == [1.5, -0.5]


def test_leading_dimensions_are_kept():
    logits = torch.stack([LOGITS, LOGITS.flip(-1)]).expand(3, 2, 2, 5)
    every = {
        "logit_diff": metrics.logit_diff(logits, ANSWER, WRONG),
        "accuracy": metrics.accuracy(logits, ANSWER, CANDIDATES),
        "full": metrics.full_vocabulary_accuracy(logits, ANSWER),
        "probability": metrics.relative_probability(logits, ANSWER, CANDIDATES),
        "kl": metrics.kl_divergence(logits, LOGITS),
    }
    assert {name: value.shape for name, value in every.items()} == dict.fromkeys(every, torch.Size([3, 2, 2]))
    assert torch.equal(every["logit_diff"][1, 1], metrics.logit_diff(LOGITS.flip(-1), ANSWER, WRONG))
    assert torch.equal(every["probability"][2, 0], metrics.relative_probability(LOGITS, ANSWER, CANDIDATES))
    assert every["kl"][0, 0].tolist() == [0, 0]


def test_normalized_difference_divides_by_the_size_of_the_range_and_effect_by_the_range():
    clean = torch.tensor([3.0, -1.0, 2.0])
    corrupted = torch.tensor([-1.0, 1.0, 2.0])
    patched = torch.tensor([1.0, 0.5, 2.5])
    assert metrics.normalized_logit_diff(patched, clean, corrupted).tolist() == [0.5, -0.25, 0.5]
    assert metrics.effect(patched, clean, corrupted)[:2].tolist() == [0.5, 0.75]
    assert math.isinf(metrics.effect(patched, clean, corrupted)[2])
    assert metrics.normalized_logit_diff(clean, clean, corrupted).tolist() == [1, -1, 0]
    assert metrics.effect(clean, clean, corrupted)[:2].tolist() == [0, 0]
    assert metrics.effect(corrupted, clean, corrupted)[:2].tolist() == [1, 1]


def test_a_range_of_zero_has_a_gradient_of_one():
    patched = torch.tensor([1.0, 1.0], requires_grad=True)
    value = metrics.normalized_logit_diff(patched, torch.tensor([2.0, 4.0]), torch.tensor([2.0, 0.0]))
    value.sum().backward()
    assert patched.grad is not None
    assert patched.grad.tolist() == [1.0, 0.25]


@given(st.lists(st.tuples(*[st.integers(-50, 50)] * 3), min_size=1, max_size=8))
def test_effect_and_normalized_difference_are_flips_of_each_other_where_the_clean_run_is_higher(rows):
    patched, clean, corrupted = torch.tensor(rows, dtype=torch.float64).T
    higher = clean > corrupted
    normalized = metrics.normalized_logit_diff(patched, clean, corrupted)
    assert torch.allclose((1 - normalized)[higher], metrics.effect(patched, clean, corrupted)[higher])
    same = clean == corrupted
    assert torch.equal(normalized[same], (patched - corrupted)[same])


def test_accuracy_looks_at_candidates_only_and_at_all_of_them():
    assert metrics.accuracy(LOGITS, ANSWER, CANDIDATES).tolist() == [1, 0]
    assert metrics.accuracy(LOGITS, ANSWER, torch.tensor([[0, 1], [2, 4]])).tolist() == [1, 1]
    assert metrics.full_vocabulary_accuracy(LOGITS, ANSWER).tolist() == [0, 0]
    assert metrics.full_vocabulary_accuracy(LOGITS, torch.tensor([2, 1])).tolist() == [1, 1]


def test_a_tie_for_the_largest_logit_counts_and_nan_does_not():
    tie = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, math.nan, 0.0, 0.0]])
    assert metrics.accuracy(tie, ANSWER, CANDIDATES).tolist() == [1, 0]
    assert metrics.full_vocabulary_accuracy(tie, ANSWER).tolist() == [1, 0]


def test_relative_probability_is_the_softmax_over_the_candidates():
    by_hand = [
        math.exp(2.0) / (math.exp(2.0) + math.exp(0.5)),
        math.exp(1.0) / (math.exp(1.0) + math.exp(1.5) + math.exp(-4.0)),
    ]
    assert metrics.relative_probability(LOGITS, ANSWER, CANDIDATES).tolist() == pytest.approx(by_hand)
    assert metrics.relative_probability(LOGITS + 1000, ANSWER, CANDIDATES).tolist() == pytest.approx(by_hand)
    with pytest.raises(InputError, match="not among its candidates"):
        metrics.relative_probability(LOGITS, torch.tensor([2, 2]), CANDIDATES)


def test_divergence_is_that_of_the_clean_from_the_patched_distribution():
    clean = torch.tensor([[math.log(0.5), math.log(0.25), math.log(0.25)]])
    patched = torch.tensor([[math.log(0.25), math.log(0.5), math.log(0.25)]])
    assert metrics.kl_divergence(patched, clean).tolist() == pytest.approx([0.25 * math.log(2)])
    skewed = torch.tensor([[math.log(0.9), math.log(0.09), math.log(0.01)]])
    slow = sum(p * math.log(p / q) for p, q in zip([0.5, 0.25, 0.25], [0.9, 0.09, 0.01], strict=True))
    assert metrics.kl_divergence(skewed, clean).item() == pytest.approx(slow, rel=1e-5)
    assert metrics.kl_divergence(clean, skewed).item() != pytest.approx(slow, rel=0.1)


def test_a_token_that_both_runs_exclude_adds_nothing_to_the_divergence():
    excluded = torch.tensor([[-math.inf], [-math.inf]])
    padded = metrics.kl_divergence(torch.cat([LOGITS.flip(-1), excluded], 1), torch.cat([LOGITS, excluded], 1))
    assert padded.tolist() == metrics.kl_divergence(LOGITS.flip(-1), LOGITS).tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.logit_diff(LOGITS), "need both answer and wrong"),
        (lambda: metrics.logit_diff(LOGITS, ANSWER), "need both answer and wrong"),
        (lambda: metrics.logit_diff(LOGITS, ANSWER, WRONG + 2), "outside the 5 logits"),
        (lambda: metrics.logit_diff(LOGITS[:1], ANSWER, WRONG), "not .* for 2 pairs"),
        (lambda: metrics.wilson_interval(3, 2), "3 successes of 2"),
        (lambda: metrics.wilson_interval(0, 0), "0 successes of 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (7, 10), (81, 263), (1, 1)])
def test_the_ends_of_wilsons_interval_are_the_shares_the_score_test_just_accepts(successes, n):
    low, high = metrics.wilson_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    for end in (low, high):
        if end != pytest.approx(successes / n):
            assert abs(successes / n - end) / math.sqrt(end * (1 - end) / n) == pytest.approx(1.96)


def test_wilsons_interval_has_the_values_of_newcombe_1998():
    assert metrics.wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert metrics.wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_the_variance_of_a_mean_is_that_of_independent_clusters():
    values = torch.tensor([[1.0, 3.0, 2.0, 6.0], [1.0, 1.0, 1.0, 1.0]])
    alone = metrics.clustered_variance(values, torch.arange(4))
    assert alone.tolist() == pytest.approx([float(values[0].double().var()) / 4, 0.0])
    # Rows 0 and 2 are one draw, as are 1 and 3: the variance is that of the mean of two means, 1.5 and 4.5.
    paired = metrics.clustered_variance(values, torch.tensor([0, 1, 0, 1]))
    assert paired.tolist() == pytest.approx([((1.5 - 3) ** 2 + (4.5 - 3) ** 2) / 1 / 2, 0.0])
    assert metrics.clustered_variance(values, torch.zeros(4, dtype=torch.int64)).isnan().all()


def test_wilsons_interval_takes_an_effective_number_that_is_not_whole():
    low, high = metrics.wilson_interval(8.4, 10.5)
    narrow, wide = metrics.wilson_interval(8, 10), metrics.wilson_interval(8.8, 11)
    assert narrow[0] < low < wide[0]
    assert wide[1] < high < narrow[1]
