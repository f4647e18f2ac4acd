"""circuit-stability against circuits that are evaluated one by one, and scores that are summed by hand."""

from collections import Counter

import conftest  # noqa: F401  sets the environment before transformers is imported
import pandas as pd
import pytest
import torch
from families.tiny import model_of, pairs_of

import ioi_mamba as im
from ioi_mamba import analyses
from ioi_mamba.analyses import _circuits, circuit_stability
from ioi_mamba.circuits.faithfulness import MIB_FRACTIONS, areas, mib_sizes, size_curve
from ioi_mamba.circuits.graph import Circuit, Item, items_of, universe_of
from ioi_mamba.circuits.methods import Options as Scoring
from ioi_mamba.circuits.ranking import Ranking
from ioi_mamba.circuits.scoring import Evaluator
from ioi_mamba.experiments.experiment import Context
from ioi_mamba.tasks import ioi

EXPERIMENT = analyses.load("circuit-stability")


@pytest.fixture(scope="module")
def mini():
    return im.open_model("mini", device="cpu")


@pytest.fixture(scope="module")
def pairs(mini):
    """Of several templates, so of several layouts."""
    found = ioi.generate(mini.tokenizer, 8, 3)
    assert len(found.layouts()) > 1
    return found


@pytest.fixture(scope="module")
def table(mini, pairs):
    other = ioi.generate(mini.tokenizer, 4, 4)
    return EXPERIMENT(mini, pairs, held_out=other, method="eap", draws=50)


def test_scores_by_role_sum_to_the_score_of_the_edge(mini, pairs):
    context = Context(mini, pairs, circuit_stability.Options())
    items, scores = _circuits.attributed(context, pairs, Scoring("eap", positions=True))
    labelled, by_role = circuit_stability._by_role(items, scores, pairs)
    for k in (0, 7, 20):
        edge = items.iloc[k]
        mine = (labelled["source"] == edge["source"]) & (labelled["target"] == edge["target"])
        assert labelled.loc[mine, "label"].is_unique
        total = by_role[torch.tensor(mine.to_numpy())].nansum(0)
        torch.testing.assert_close(total, scores[k].sum(0), rtol=1e-4, atol=1e-6)
    n1 = labelled.index[(labelled["label"] == "n1") & (labelled["source"] == "0") & (labelled["target"] == "output")][0]
    row = items.index[(items["source"] == "0") & (items["target"] == "output")][0]
    for pair in (0, 3, 5):
        assert by_role[n1, pair] == scores[row, int(pairs.roles["n1"][pair]), pair]


def test_a_circuit_by_role_is_a_circuit_at_the_roles_positions_of_each_layout(mini, pairs):
    few = pairs.layouts()[0]
    labels = few.position_labels()
    kept = {("embed", "0", "n1"), ("0", "6", "out"), ("6", "output", "out"), ("embed", "0", "out"), ("0", "6", "n2")}
    labelled = pd.DataFrame(sorted(kept), columns=["source", "target", "label"])
    context = Context(mini, few, circuit_stability.Options())
    (found,) = (
        row
        for row in circuit_stability._judged_by_role(context, few, labelled, torch.ones(1, len(kept)), None)
        if row["measure"] == "normalized_logit_diff"
    )
    universe = universe_of(mini, n_positions=few.clean.shape[1])
    items = frozenset(Item(s, t, labels.index(label)) for s, t, label in kept)
    want = im.evaluate(mini, few, Circuit(items, universe))
    assert found["value"] == pytest.approx(want["normalized_logit_diff"], abs=1e-4)
    assert (found["size"], found["n"]) == (len(kept), want["n"])


def test_areas_are_the_benchmarks_and_random_circuits_have_as_many_items_of_each_kind(mini, pairs):
    universe = universe_of(mini, parts=True)
    found = im.attribute(mini, pairs, method="eap", parts=True)
    ranking = Ranking.of(items_of(found.table), found.table["score"].to_numpy(), universe)
    judge, evaluated = Evaluator(mini, pairs, universe), []
    scores = judge.scores
    judge.scores = lambda sets, progress=None: (evaluated.extend(sets), scores(sets, progress))[1]
    rows = pd.DataFrame(circuit_stability._on_the_grid(judge, ranking, None))
    for measure, order in (("cpr", "signed"), ("cmd", "absolute")):
        own = Ranking.of(ranking.items, ranking.scores, universe, order)
        curve = size_curve(Evaluator(mini, pairs, universe), own, mib_sizes(len(own)))
        want = float(areas(MIB_FRACTIONS, torch.tensor(curve["f"].to_numpy()))[measure])
        mine = rows[(rows["circuit"] == _circuits.MIB_GRID) & (rows["measure"] == measure)]
        assert mine["value"].tolist() == pytest.approx([want], abs=1e-4)
    assert len(rows[rows["circuit"] == circuit_stability.RANDOM_GRID]) == 2 * circuit_stability.N_RANDOM
    assert len(set(map(frozenset, evaluated))) == len(evaluated)
    kinds = lambda circuit: tuple(sorted(circuit.kinds().items()))
    drawn = Counter(kinds(Circuit.full(universe) - Circuit(frozenset(each), universe)) for each in evaluated)
    orders = [Ranking.of(ranking.items, ranking.scores, universe, order) for order in ("signed", "absolute")]
    assert set(drawn) == {kinds(order.top(k)) for order in orders for k in mib_sizes(len(order))}
    assert drawn[kinds(orders[0].top(mib_sizes(len(ranking))[-2]))] >= 1 + circuit_stability.N_RANDOM


def test_the_consensus_is_what_most_draws_include_and_is_evaluated_as_a_circuit(mini, table):
    rows = table[table["what"] == "item"]
    assert set(rows["size"]) == set(circuit_stability.sizes_of(universe_of(mini, parts=True).size()))
    assert (rows["kept"] == (rows["frequency"] > 0.5)).all()
    assert (rows["core"] == (rows["frequency"] >= 0.95)).all()
    assert rows.groupby("size")["frequency"].sum().tolist() == pytest.approx(sorted(set(rows["size"])))
    for (size, part), (_, told) in zip(
        rows.groupby("size"),
        table[(table["circuit"] == "consensus") & (table["measure"] == "accuracy")].iterrows(),
        strict=True,
    ):
        assert told["size"] == part["kept"].sum() <= size + len(part)
    by_role = table[table["what"] == "role"]
    assert by_role["label"].notna().all()
    assert set(by_role["label"]) > {"n1", "n2", "out"}
    texts = EXPERIMENT.findings(table)
    assert any("CPR" in text for text in texts)
    EXPERIMENT.chart(table).to_dict()


def test_it_runs_for_other_families_by_zero_and_without_gradients():
    model, given = model_of("zamba"), pairs_of(4)
    for options in ({"ablation": "zero", "method": "eap"}, {"method": "exact"}):
        table = EXPERIMENT(model, given, held_out=given, draws=5, **options)
        assert EXPERIMENT.findings(table)
        EXPERIMENT.chart(table).to_dict()
        assert ("role" in set(table["what"])) == (options["method"] != "exact")
