"""Evaluating circuits: the ends of the scale, intervals, curves and the search for the smallest."""

import golden
import pandas as pd
import pytest
import torch

import ioi_mamba as im
from ioi_mamba import faithfulness as fa
from ioi_mamba.attribution import attribute, ranked
from ioi_mamba.errors import InputError
from ioi_mamba.graph import Circuit, universe_of


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
    for name in fa.SCORES:
        assert first[f"{name}_low"] <= first[name] <= first[f"{name}_high"]
    assert first["kl_low"] < first["kl_high"]


def test_rows_per_pass_and_kept_memory_change_nothing(pairs, universe):
    sets = [universe.items()[i::3] for i in range(3)]
    want = fa.Evaluator(golden.model(), pairs, universe).logits(sets)
    for options in ({"rows": 1}, {"rows": 5}, {"rows": 30}, {"keep_mib": 0}):
        got = fa.Evaluator(golden.model(), pairs, universe, **options).logits(sets)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_a_size_curve_ends_at_the_model_and_its_rows_are_single_evaluations(pairs):
    universe = universe_of(golden.model())
    evaluator = fa.Evaluator(golden.model(), pairs, universe)
    table = ranked(attribute(golden.model(), pairs))
    curve = fa.size_curve(evaluator, table, [3, len(table)])
    assert curve["f"].iloc[1] == pytest.approx(1, abs=1e-4)
    alone = im.evaluate(golden.model(), pairs, fa.top(table, 3, universe))
    assert curve["normalized_logit_diff"].iloc[0] == pytest.approx(alone["normalized_logit_diff"], abs=1e-5)


def test_areas_are_those_of_trapezoids():
    curve = pd.DataFrame({"fraction": [1.0, 0.0, 0.5], "f": [1.0, 0.0, 1.5]})
    assert fa.areas(curve) == pytest.approx({"cpr": 0.5 * 0.75 + 0.5 * 1.25, "cmd": 0.5 * 0.75 + 0.5 * 0.25})


class OnlyAGraph:
    """All that `smallest` asks of an evaluator where `size_curve` is replaced."""

    def __init__(self):
        self.universe = universe_of(golden.model())


@pytest.mark.parametrize("enough", [1, 2, 7, 13])
def test_the_smallest_circuit_is_the_first_above_the_target(monkeypatch, enough):
    table = pd.DataFrame(
        [(i.source, i.target) for i in universe_of(golden.model()).items()], columns=["source", "target"]
    )
    tried = []

    def curve(evaluator, table, sizes, progress=None):
        tried.extend(sizes)
        return pd.DataFrame({"size": sizes, "accuracy": [0.9 if k >= enough else 0.1 for k in sizes]})

    monkeypatch.setattr(fa, "size_curve", curve)
    circuit, steps = fa.smallest(OnlyAGraph(), table, 0.85)
    assert len(circuit) == enough
    assert len(tried) <= 6
    assert steps["monotonic"].all()


def test_a_curve_that_falls_is_reported(monkeypatch):
    table = pd.DataFrame(
        [(i.source, i.target) for i in universe_of(golden.model()).items()], columns=["source", "target"]
    )
    scores = lambda k: 0.5 if k == 7 else 0.1 if k < 12 else 0.95
    rows = lambda evaluator, table, sizes, progress=None: pd.DataFrame(
        {"size": sizes, "accuracy": [scores(k) for k in sizes]}
    )
    monkeypatch.setattr(fa, "size_curve", rows)
    circuit, steps = fa.smallest(OnlyAGraph(), table, 0.85)
    assert len(circuit) == 12
    assert steps.loc[~steps["monotonic"], "size"].tolist() == [11]
    with pytest.raises(InputError, match="metric 'speed' is unknown"):
        fa.smallest(OnlyAGraph(), table, 0.85, metric="speed")


def test_random_circuits_have_as_many_edges_and_parts_and_a_seed_repeats_them(universe):
    circuit = Circuit(frozenset(universe.items()[4:20]), universe)
    count = lambda c: sum(item.part is None for item in c.items)
    first, again = fa.random_circuits(circuit, 4, seed=1), fa.random_circuits(circuit, 4, seed=1)
    assert first == again
    assert {(len(c), count(c)) for c in first} == {(len(circuit), count(circuit))}
    assert len({c.items for c in first}) == 4


def test_resampled_pairs_give_the_same_circuit_only_where_pairs_agree():
    scores = lambda values: pd.DataFrame(
        [(s, p, v) for s, row in enumerate(values) for p, v in enumerate(row)], columns=["item", "pair", "score"]
    )
    agree = fa.bootstrap_jaccard(scores([[-3.0] * 6, [-2.0] * 6, [-1.0] * 6, [0.0] * 6]), 2, 20)
    assert agree.tolist() == [1.0] * 20
    differ = fa.bootstrap_jaccard(scores([[-3.0 * (i == j) for j in range(4)] for i in range(4)]), 2, 40)
    assert 0 < differ.mean() < 1
