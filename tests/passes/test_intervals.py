"""Intervals by cluster: each against its definition, and how often it holds what it should."""

import math

import interval_coverage as coverage
import pytest
import torch
from scipy import stats

import ioi_mamba as im
from ioi_mamba.passes import intervals
from ioi_mamba.passes.intervals import Mean, Resampled
from ioi_mamba.passes.metrics import wilson_interval
from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import Pairs

ALONE = torch.arange(58)


def random_pairs(n_pairs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randint(1, 40, shape, generator=generator)
    return Pairs(draw(n_pairs, 7), draw(n_pairs, 7), draw(n_pairs), draw(n_pairs))


def test_the_two_directions_of_a_pair_are_one_cluster():
    pairs = random_pairs(5)
    assert pairs.clusters.tolist() == [0, 1, 2, 3, 4]
    assert pairs.symmetric().clusters.tolist() == [0, 1, 2, 3, 4] * 2
    assert Pairs.concat([pairs, pairs[[3, 1]]]).clusters.tolist() == [0, 1, 2, 3, 4, 3, 1]


def test_pairs_that_share_a_prompt_on_either_side_are_one_cluster_however_far_apart():
    pairs = random_pairs(6)
    clean, corrupted = pairs.clean.clone(), pairs.corrupted.clone()
    corrupted[5], clean[3], corrupted[3] = clean[1], corrupted[5], clean[4]
    clean[3] = corrupted[5]
    chained = Pairs(clean, corrupted, pairs.answer, pairs.wrong)
    # 5 shares a prompt with 1, 3 with both, and 4 with 3.
    assert chained.clusters.tolist() == [0, 1, 2, 1, 1, 1]
    assert chained[[5, 0, 4]].clusters.tolist() == [0, 1, 2]


def test_padding_makes_no_two_prompts_different_nor_the_same():
    rows = [[0, 4, 5], [0, 4, 5, 0], [0, 4, 5, 9, 9], [0, 7, 5, 0, 0]]
    tokens = torch.tensor([row + [0] * (6 - len(row)) for row in rows])
    lengths = torch.tensor([3, 4, 3, 5])
    other = tokens + torch.tensor([0, 10, 0, 0, 0, 0]) * torch.arange(1, 5)[:, None]
    pairs = Pairs(tokens, other, lengths, lengths, lengths=lengths)
    assert pairs.clusters.tolist() == [0, 1, 0, 2]


def test_the_interval_of_a_mean_is_students_over_pairs():
    values = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    low, high = intervals.mean_interval(values, torch.arange(12).repeat(2))
    draws = (values[:, :12] + values[:, 12:]).numpy() / 2
    want = stats.t.interval(0.95, 11, draws.mean(1), stats.sem(draws, axis=1))
    assert low.tolist() == pytest.approx(want[0].tolist(), abs=1e-6)
    assert high.tolist() == pytest.approx(want[1].tolist(), abs=1e-6)


def test_one_cluster_says_nothing_of_other_draws():
    together = torch.zeros(6, dtype=torch.int64)
    assert all(end.isnan() for end in intervals.mean_interval(torch.rand(6), together))
    assert all(end.isnan().all() for end in intervals.percentile_interval(torch.rand(20, 2), 1))
    low, high = intervals.share_interval(torch.ones(6), together)
    assert (float(low), float(high)) == pytest.approx(wilson_interval(1, 1), abs=1e-4)


def test_an_accuracy_of_one_on_58_prompts_is_938_to_1():
    low, high = intervals.share_interval(torch.ones(58), ALONE)
    assert (float(low), float(high)) == pytest.approx((0.938, 1.0), abs=5e-4)
    # 58 pairs in both directions are no 116 prompts.
    both = intervals.share_interval(torch.ones(116), ALONE.repeat(2))
    assert float(both[0]) == pytest.approx(float(low))
    assert float(intervals.share_interval(torch.zeros(58), ALONE)[1]) == pytest.approx(0.062, abs=5e-4)


def test_the_interval_of_a_proportion_is_wilsons_on_as_many_outcomes_as_are_independent():
    outcomes = (torch.arange(58) % 3 > 0).float()
    alone = [float(end) for end in intervals.share_interval(outcomes, ALONE)]
    assert alone == pytest.approx(wilson_interval(float(outcomes.sum()), 58), abs=1e-4)
    alike = [float(end) for end in intervals.share_interval(outcomes.repeat(2), ALONE.repeat(2))]
    assert alike[0] == pytest.approx(alone[0], abs=3e-3)
    assert alike[1] == pytest.approx(alone[1], abs=3e-3)
    shuffled = outcomes[torch.randperm(58, generator=torch.Generator().manual_seed(3))]
    apart = [float(end) for end in intervals.share_interval(torch.cat([outcomes, shuffled]), ALONE.repeat(2))]
    assert apart[1] - apart[0] < 0.85 * (alone[1] - alone[0])


def test_no_interval_of_a_proportion_or_of_a_difference_has_no_width():
    right = torch.ones(2, 58)
    both = Mean(right, ALONE, intervals.share_interval)
    for low, high in (both.interval, (both[[0]] - both[[1]]).interval):
        assert (high - low).min() > 0.05
    low, high = (both[[0]] - both[[1]]).interval
    assert (float(low), float(high)) == pytest.approx((-high.item(), high.item()))


def test_the_difference_of_two_proportions_is_that_of_bonett_and_price():
    # Their equation: one more of either kind of disagreement, among two more.
    differences = torch.tensor([1.0] * 9 + [-1.0] * 3 + [0.0] * 28)
    low, high = intervals.share_difference_interval(differences, torch.arange(40))
    more, less = 10 / 42, 4 / 42
    half = stats.norm.ppf(0.975) * math.sqrt((more + less - (more - less) ** 2) / 42)
    assert (float(low), float(high)) == pytest.approx((more - less - half, more - less + half), abs=2e-3)


def test_whole_clusters_are_resampled_and_a_seed_repeats_them():
    values = torch.arange(6.0)
    clusters = torch.tensor([0, 1, 2, 0, 1, 2])
    before = torch.get_rng_state()
    means = intervals.resampled_means(values, clusters, 200, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(means, intervals.resampled_means(values, clusters, 200, seed=3))
    # The means of (0, 3), (1, 4) and (2, 5), three of which are drawn.
    possible = {round((a + b + c) / 3, 6) for a in (1.5, 2.5, 3.5) for b in (1.5, 2.5, 3.5) for c in (1.5, 2.5, 3.5)}
    assert {round(float(mean), 6) for mean in means} == possible


def test_percentiles_are_widened_as_students_t_is_for_few_draws():
    draws = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for n, ratio in ((8, 2.365 * math.sqrt(8 / 7)), (10_000, 1.96)):
        low, high = intervals.percentile_interval(draws, n)
        assert (float(low), float(high)) == pytest.approx((-ratio, ratio), abs=0.04)
    one = Resampled(torch.zeros(1), draws, 50)
    assert all(end == 0 for end in (one - one).interval)


@pytest.fixture(scope="module")
def pool(mini):
    return coverage.pool_of(mini, n_pairs=50, seed=27)


def test_intervals_hold_the_value_of_the_pool_as_often_as_they_say(pool):
    for kind, (held, n) in coverage.coverages(pool, n_pairs=30, n_sets=400, seed=1).items():
        # 400 sets leave the share itself uncertain by 2 %; how it is with more stands in docs/statistics.md.
        assert 0.92 <= held / n <= 0.99, kind


def test_rows_of_both_directions_taken_as_independent_hold_it_less_often(pool):
    """What the clusters are for: the intervals that were given before."""
    found = coverage.coverages(pool, n_pairs=30, n_sets=400, seed=1, clustered=False)
    assert min(held / n for held, n in found.values()) < 0.90


def test_corruptions_are_drawn_apart_the_first_from_the_seed_itself(mini):
    pairs = im.Pairs.concat(list(effects_pairs(mini).values()))
    assert len(pairs) == 5 * 8
    parts = list(effects_pairs(mini).values())
    alone = im.ioi.generate(
        mini.tokenizer, 4, 27, templates=im.ioi.ALIGNED_TEMPLATES, corruptions=im.ioi.CORRUPTIONS[:1], symmetric=True
    )
    assert torch.equal(parts[0].clean, alone.clean)
    places = [part.clean.gather(1, part.roles["place"][:, None])[:4, 0].tolist() for part in parts]
    assert len(set(map(tuple, places))) == 5


def effects_pairs(mini):
    from ioi_mamba.analyses import load

    return load("layer-ablation").draw(mini.tokenizer, 4, 27, ioi.TASK).by("corruption")
