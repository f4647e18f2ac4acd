"""Evaluating circuits: the ends of the scale, intervals, curves and the search for the smallest."""

from collections import Counter

import golden
import pandas as pd
import pytest
import torch
from conditioning import effect_rounding

import ioi_mamba as im
from ioi_mamba.circuits import faithfulness as fa
from ioi_mamba.circuits import scoring as evaluators
from ioi_mamba.circuits.attribution import Options, attribute, attributions
from ioi_mamba.circuits.graph import Circuit, Item, kind_of, universe_of
from ioi_mamba.circuits.ranking import Ranking
from ioi_mamba.errors import InputError
from ioi_mamba.passes import metrics


@pytest.fixture(scope="module")
def pairs():
    return golden.random_pairs("golden", n_pairs=12)


@pytest.fixture(scope="module")
def universe():
    return universe_of(golden.model(), parts=True)


def test_everything_kept_is_the_model_and_nothing_kept_the_corrupted_run(pairs, universe):
    full = im.evaluate(golden.model(), pairs, Circuit.full(universe))
    empty = im.evaluate(golden.model(), pairs, Circuit(frozenset(), universe))
    assert full["f"] == pytest.approx(1, abs=1e-4)
    assert full["kl"] == pytest.approx(0, abs=1e-5)
    assert empty["f"] == pytest.approx(0, abs=1e-4)
    assert empty["normalized_logit_diff"] == pytest.approx(0, abs=1e-3)
    assert empty["kl"] > 0.1


def test_necessity_of_a_circuit_is_sufficiency_of_the_rest(pairs, universe):
    half = Circuit(frozenset(universe.items()[::2]), universe)
    necessity = im.evaluate(golden.model(), pairs, half, necessity=True)
    rest = im.evaluate(golden.model(), pairs, Circuit.full(universe) - half)
    assert {k: v for k, v in necessity.items() if k != "size"} == {k: v for k, v in rest.items() if k != "size"}


def test_every_score_lies_in_its_interval_and_a_seed_repeats_it(pairs, universe):
    half = Circuit(frozenset(universe.items()[::2]), universe)
    first, again = (im.evaluate(golden.model(), pairs, half, intervals=True, seed=3) for _ in range(2))
    assert first == again
    for name in (*evaluators.SCORES, "f"):
        assert first[f"{name}_low"] <= first[name] <= first[f"{name}_high"]
        assert first[f"{name}_low"] < first[f"{name}_high"]


def test_rows_per_pass_and_kept_memory_change_nothing(pairs, universe):
    sets = [universe.items()[i::3] for i in range(3)]
    want = evaluators.Evaluator(golden.model(), pairs, universe).scores(sets)
    rounding = effect_rounding(golden.model(), pairs)
    for options in ({"rows": 1}, {"rows": 5}, {"rows": 30}, {"keep_mib": 0}):
        got = evaluators.Evaluator(golden.model(), pairs, universe, **options).scores(sets)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=rounding, atol=rounding)


def test_every_single_removal_goes_on_from_the_run_before_as_if_run_whole(universe):
    """Also the last edge out of a layer, which leaves the layer unread, and the only edge of a circuit."""
    model, everything = golden.model(), universe.items()
    few = golden.golden_pairs()[:2]
    rounding = effect_rounding(model, few)
    resumed, plain = (evaluators.Evaluator(model, few, universe, resume=resume) for resume in (True, False))
    for kept in ([("embed", "0"), ("0", "output")], [("embed", "1"), ("1", "2"), ("2", "output"), ("0", "output")]):
        removed = [item for item in everything if item.part is None and (item.source, item.target) not in kept]
        for item in (item for item in everything if item not in removed):
            for sets in ([removed], [[*removed, item]]):
                torch.testing.assert_close(
                    resumed.normalized(sets), plain.normalized(sets), rtol=rounding, atol=rounding
                )


def test_a_size_curve_ends_at_the_model_and_its_rows_are_single_evaluations(pairs):
    universe = universe_of(golden.model())
    evaluator = evaluators.Evaluator(golden.model(), pairs, universe)
    ranking = attribute(golden.model(), pairs).ranking()
    curve = fa.size_curve(evaluator, ranking, [3, len(ranking)])
    assert curve["f"].iloc[1] == pytest.approx(1, abs=1e-4)
    alone = im.evaluate(golden.model(), pairs, ranking.top(3))
    assert curve["normalized_logit_diff"].iloc[0] == pytest.approx(alone["normalized_logit_diff"], abs=1e-5)


def test_areas_are_those_of_trapezoids():
    got = fa.areas([1.0, 0.0, 0.5], torch.tensor([[1.0, 0.0, 1.5], [1.0, 1.0, 1.0]]))
    assert got["cpr"].tolist() == pytest.approx([0.5 * 0.75 + 0.5 * 1.25, 1.0])
    assert got["cmd"].tolist() == pytest.approx([0.5 * 0.75 + 0.5 * 0.25, 0.0])


def test_circuits_are_estimated_together_so_that_their_difference_has_an_interval(pairs, universe):
    evaluator = evaluators.Evaluator(golden.model(), pairs, universe)
    sets = [universe.items()[:5], universe.items()[:5], universe.items()[:9]]
    found = fa.estimates(evaluator, sets, seed=2)
    for name, estimate in found.items():
        low, high = (estimate[[1]] - estimate[[0]]).interval
        if name in fa.SHARES:
            # That two circuits were right on the same 12 prompts does not say that they always are.
            assert low[0] < 0 < high[0]
        else:
            assert low.tolist() == high.tolist() == [0.0]
    f, scores = found["f"], evaluator.scores(sets)["logit_diff"]
    rows = torch.randint(len(pairs), (2000, len(pairs)), generator=torch.Generator().manual_seed(2))[7]
    full, empty = (
        metrics.logit_diff(
            im.run(golden.model(), prompts, {})[torch.arange(len(pairs)), pairs.last], pairs.answer, pairs.wrong
        )[rows].mean()
        for prompts in (pairs.clean, pairs.corrupted)
    )
    want = (scores[:, rows].mean(1) - empty) / (full - empty)
    assert f.resampled[7].tolist() == pytest.approx(want.tolist(), abs=1e-5)
    assert f.value.tolist() == pytest.approx(evaluator.faithfulness(scores).tolist(), abs=1e-5)


def test_exact_effects_are_those_of_patching_one_item_at_a_time(pairs, universe):
    model, chosen = golden.model(), universe.items()[::5]
    got = evaluators.Evaluator(model, pairs, universe).exact_effects(chosen)
    rounding = effect_rounding(model, pairs)
    rows = torch.arange(len(pairs))
    logits = {name: im.run(model, getattr(pairs, name), {})[rows, pairs.last] for name in ("clean", "corrupted")}
    clean, corrupted = (metrics.logit_diff(logits[name], pairs.answer, pairs.wrong) for name in ("clean", "corrupted"))
    for item, effect in zip(chosen, got, strict=True):
        patched = im.patch_edges(model, pairs, [item])[rows, pairs.last]
        difference = metrics.logit_diff(patched, pairs.answer, pairs.wrong)
        want = (difference - clean) / (clean - corrupted).abs()
        torch.testing.assert_close(effect, want, rtol=rounding, atol=rounding)


def test_the_rank_correlation_is_the_one_of_the_definition():
    values = torch.tensor([[3.0, 1.0, 2.0, 2.0, 9.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    other = torch.tensor([[1.0, 1.0, 5.0, 4.0, 8.0], [5.0, 4.0, 3.0, 2.0, 1.0]])

    def ranks(row):
        return [sum(y < x for y in row) + (sum(y == x for y in row) + 1) / 2 for x in row]

    want = torch.corrcoef(torch.tensor([ranks(values[0].tolist()), ranks(other[0].tolist())]))[0, 1]
    assert fa.rank_correlation(values, other).tolist() == pytest.approx([float(want), -1.0])


class OnlyAGraph:
    """All that `smallest` asks of an evaluator where `size_curve` is replaced."""

    def __init__(self):
        self.model = golden.model()
        self.universe = universe_of(self.model)


def ranking_of_all():
    """All items of the model's graph, in the graph's order."""
    universe = universe_of(golden.model())
    return Ranking.of(universe.items(), range(universe.size()), universe)


@pytest.mark.parametrize("enough", [1, 2, 7, 13])
def test_the_smallest_circuit_is_the_first_above_the_target(monkeypatch, enough):
    ranking = ranking_of_all()
    tried = []

    def curve(evaluator, ranking, sizes, progress=None):
        tried.extend(sizes)
        return pd.DataFrame({"size": sizes, "accuracy": [0.9 if k >= enough else 0.1 for k in sizes]})

    monkeypatch.setattr(fa, "size_curve", curve)
    circuit, steps = fa.smallest(OnlyAGraph(), ranking, 0.85)
    assert len(circuit) == enough
    assert len(tried) <= 6
    assert steps["monotonic"].all()


def test_a_curve_that_falls_is_reported(monkeypatch):
    ranking = ranking_of_all()
    scores = lambda k: 0.5 if k == 7 else 0.1 if k < 12 else 0.95
    rows = lambda evaluator, ranking, sizes, progress=None: pd.DataFrame(
        {"size": sizes, "accuracy": [scores(k) for k in sizes]}
    )
    monkeypatch.setattr(fa, "size_curve", rows)
    circuit, steps = fa.smallest(OnlyAGraph(), ranking, 0.85)
    assert len(circuit) == 12
    assert steps.loc[~steps["monotonic"], "size"].tolist() == [11]
    with pytest.raises(InputError, match="metric 'speed' is unknown"):
        fa.smallest(OnlyAGraph(), ranking, 0.85, metric="speed")


def test_random_circuits_have_as_many_items_of_each_kind_and_a_seed_repeats_them(universe):
    circuit = Circuit(frozenset(universe.items()[4:20]), universe)
    count = lambda c: Counter(kind_of(item) for item in c.items)
    first, again = fa.random_circuits(circuit, 4, seed=1), fa.random_circuits(circuit, 4, seed=1)
    assert first == again
    assert len(count(circuit)) >= 5
    assert all(count(c) == count(circuit) for c in first)
    assert len({c.items for c in first}) == 4


def test_the_sizes_and_areas_of_the_benchmark_are_those_of_its_code():
    assert fa.mib_sizes(1225) == [1, 2, 6, 12, 24, 61, 122, 245, 612, 1225]
    assert fa.mib_sizes(45) == [0, 0, 0, 0, 0, 2, 4, 9, 22, 45]
    f = torch.linspace(0, 1.8, 10, dtype=torch.float64)
    cpr = cmd = 0.0
    for k in range(9):
        step = fa.MIB_FRACTIONS[k + 1] - fa.MIB_FRACTIONS[k]
        cpr += step * float(f[k] + f[k + 1]) / 2
        cmd += step * float(abs(1 - f[k]) + abs(1 - f[k + 1])) / 2
    got = fa.areas(fa.MIB_FRACTIONS, f)
    assert (float(got["cpr"]), float(got["cmd"])) == pytest.approx((cpr, cmd))


@pytest.fixture(scope="module")
def evaluated(mini):
    """An evaluator of edges on 12 symmetric pairs, its items and their scores."""
    pairs = im.ioi.generate(mini.tokenizer, 12, 27, templates=im.ioi.ALIGNED_TEMPLATES, symmetric=True)
    kinds, scores = attributions(mini, pairs, Options())
    items = [Item(source, target) for source, target, _ in kinds]
    return evaluators.Evaluator(mini, pairs, universe_of(mini)), items, scores.sum(1)


@pytest.mark.parametrize("ranking", ["signed", "absolute"])
def test_halves_of_the_pairs_choose_circuits_anew_with_how_many(evaluated, ranking):
    evaluator, items, scores = evaluated
    found = fa.split_jaccards(evaluator, items, scores, 0.85, ranking=ranking, n_splits=2, seed=5)
    generator, want = torch.Generator().manual_seed(5), []
    for _ in range(2):
        first = set(torch.randperm(12, generator=generator)[:6].tolist())
        circuits = []
        for half in (True, False):
            rows = [row for row in range(24) if (row % 12 in first) == half]
            order = Ranking.of(items, scores[:, rows].mean(1), evaluator.universe, ranking)
            part = evaluators.Evaluator(evaluator.model, evaluator.pairs[rows], evaluator.universe)
            circuits.append(fa.smallest(part, order, 0.85)[0])
        want.append(circuits[0].jaccard(circuits[1]))
    assert found.tolist() == pytest.approx(want)


def test_one_prompt_cannot_be_split(mini, evaluated):
    evaluator, items, scores = evaluated
    one = evaluators.Evaluator(mini, evaluator.pairs[[0, 12]], evaluator.universe)
    with pytest.raises(InputError, match="cannot be split in halves"):
        fa.split_jaccards(one, items, scores[:, [0, 12]], 0.85)
