"""Pairs without a range: one rule, and every experiment, metric and search leaves them out and says so."""

import pytest
import torch

import ioi_mamba as im
from ioi_mamba.analyses import load
from ioi_mamba.circuits.attribution import ranked
from ioi_mamba.circuits.graph import Circuit, universe_of
from ioi_mamba.circuits.scoring import Evaluator
from ioi_mamba.errors import InputError
from ioi_mamba.passes.ranges import has_range, usable, usable_of
from ioi_mamba.steering import bottleneck
from ioi_mamba.tasks.base import Pairs

NO_RANGE = "has a range|has no range"


@pytest.fixture(scope="module")
def good(mini):
    """Six symmetric pairs, three of which are of one template."""
    return im.ioi.generate(mini.tokenizer, 6, 27, templates=im.ioi.ALIGNED_TEMPLATES, symmetric=True)


@pytest.fixture(scope="module")
def mixed(mini, good):
    """The same, with two pairs put among them that have no range: equal prompts, and a range of some 1e-5 logits."""
    rows = torch.arange(len(good))
    clean, corrupted = (im.run(mini, side, {})[rows, good.last] for side in (good.clean, good.corrupted))
    # Of all tokens, the two whose logits the corruption moves most alike.
    change, order = (clean[1] - corrupted[1]).sort()
    nearest = int(change.diff().argmin())
    answer, wrong = good.answer.clone(), good.wrong.clone()
    answer[1], wrong[1] = order[nearest], order[nearest + 1]
    pairs = Pairs(
        torch.cat([good.clean[:2], good.clean]),
        torch.cat([good.clean[:1], good.corrupted[1:2], good.corrupted]),
        torch.cat([answer[:2], good.answer]),
        torch.cat([wrong[:2], good.wrong]),
        labels={name: (*column[:2], *column) for name, column in good.labels.items()},
        roles={role: torch.cat([at[:2], at]) for role, at in good.roles.items()},
    )
    range_of = lambda logits: logits[answer[1]] - logits[wrong[1]]
    assert 0 < abs(float(range_of(clean[1]) - range_of(corrupted[1]))) < 1e-3
    return pairs


@pytest.fixture(scope="module")
def plain(good):
    """The good pairs with what the mixed ones have: no candidates, no texts."""
    return Pairs(good.clean, good.corrupted, good.answer, good.wrong, labels=good.labels, roles=good.roles)


@pytest.fixture(scope="module")
def same(good):
    """Equal prompts only."""
    return Pairs(good.clean, good.clean, good.answer, good.wrong, labels=good.labels, roles=good.roles)


def test_pairs_with_a_range_are_told_by_their_number_and_the_others_counted(mini, good, mixed):
    found = usable(mini, mixed)
    assert found.rows.tolist() == list(range(2, 14))
    assert found.left_out == 2
    assert torch.equal(found.pairs.clean, good.clean)
    both = usable_of(mini, [good, mixed])
    assert [each.left_out for each in both] == [0, 2]
    assert both[0].pairs is good


@pytest.mark.parametrize(
    ("dtype", "least"), [(torch.float32, 1e-3), (torch.float64, 1e-3), (torch.float16, 0.0625), (torch.bfloat16, 0.5)]
)
def test_the_smallest_range_is_what_rounding_of_the_logits_makes_it(dtype, least):
    corrupted = torch.tensor([[32.0, 32.0], [32.0, 32.0]], dtype=dtype)
    step = 32 * torch.finfo(dtype).eps  # the spacing of numbers at 32
    more = int(least / step) * step
    clean = corrupted.clone()
    clean[0, 0] += more
    clean[1, 0] += more + 2 * step
    assert has_range(clean, corrupted).tolist() == [False, True]


def test_the_full_model_scores_one_with_pairs_without_a_range_among_them(mini, mixed):
    universe = universe_of(mini)
    got = im.evaluate(mini, mixed, Circuit.full(universe))
    assert (got["n"], got["left_out"]) == (12, 2)
    assert got["normalized_logit_diff"] == pytest.approx(1, abs=1e-4)
    evaluator = Evaluator(mini, mixed, universe)
    assert evaluator.rows_kept.tolist() == list(range(2, 14))
    assert evaluator.scores([[]])["accuracy"].shape == (1, 12)
    assert evaluator.ends().shape == (3, 12)
    assert float(evaluator.normalized([[]])[0]) == pytest.approx(1, abs=1e-4)


def test_a_search_decides_as_without_them_and_its_score_is_one_of_a_circuit(mini, plain, mixed):
    got, want = (im.acdc(mini, pairs, threshold=0.05, parts=False).table for pairs in (mixed, plain))
    assert got["kept"].tolist() == want["kept"].tolist()
    assert got.attrs["score"] == pytest.approx(want.attrs["score"], abs=1e-4)
    assert 0 < got.attrs["score"] < 1.5
    assert (got.attrs["left_out"], want.attrs["left_out"]) == (2, 0)


@pytest.mark.parametrize("method", ["eap", "eap-ig", "exact"])
def test_attributions_are_those_without_them_and_say_which_pair_a_row_is_of(mini, plain, mixed, method):
    got, want = (im.attribute(mini, pairs, method=method, steps=2).table for pairs in (mixed, plain))
    assert got["score"].tolist() == pytest.approx(want["score"].tolist(), abs=1e-5)
    assert got.attrs["left_out"] == 2
    each = im.attribute(mini, mixed, method=method, steps=2, per_pair=True).table
    assert each["pair"].unique().tolist() == list(range(2, 14))
    one = im.attribute(mini, mixed[[5]], method=method, steps=2).table
    here = each[each["pair"] == 5]
    assert here["score"].tolist() == pytest.approx(one["score"].tolist(), abs=1e-5)


def test_the_bottleneck_is_found_as_without_them(mini, plain, mixed):
    # Without roles that are names the given pairs are searched.
    unnamed = [Pairs(p.clean, p.corrupted, p.answer, p.wrong) for p in (mixed, plain)]
    assert [bottleneck.find_layer(mini, pairs) for pairs in unnamed] == [6, 6]
    with pytest.raises(InputError, match=NO_RANGE):
        bottleneck.find_layer(mini, unnamed[0][:2])


@pytest.mark.parametrize("name", ["layer-ablation", "conv-shift", "state-ablation", "output-ablation", "cross-talk"])
def test_an_experiment_gives_the_table_without_them_and_counts_them(mini, plain, mixed, name):
    module = load(name)
    options = {"layer": 0} if name == "conv-shift" else {}
    got, want = (module(mini, pairs, **options) for pairs in (mixed, plain))
    value = "accuracy" if name == "cross-talk" else "effect"
    assert set(got["left_out"]) == {2}
    assert set(want["left_out"]) == {0}
    assert got["n"].tolist() == want["n"].tolist()
    assert got[value].tolist() == pytest.approx(want[value].tolist(), abs=1e-3)
    assert "2 prompts were left out" in " ".join(module.findings(got))
    assert "left out:" not in " ".join(module.findings(want))


@pytest.mark.parametrize("name", ["edge-attribution", "positional-attribution", "circuit-search"])
def test_a_circuit_experiment_gives_the_scores_without_them_and_counts_them(mini, plain, mixed, name):
    module = load(name)
    options = {"compare_prompts": 0} if name == "circuit-search" else {"steps": 2}
    got, want = (module(mini, pairs, held_out=plain, **options) for pairs in (mixed, plain))
    assert set(got["left_out"]) == {2}
    items = [table[table["what"] == "item"] for table in (got, want)]
    assert items[0]["score"].tolist() == pytest.approx(items[1]["score"].tolist(), abs=1e-4)
    assert items[0]["kept"].tolist() == items[1]["kept"].tolist()
    assert "2 prompts were left out" in " ".join(module.findings(got))


CALLS = {
    "attribute": lambda model, pairs: im.attribute(model, pairs).table,
    "exact": lambda model, pairs: im.attribute(model, pairs, method="exact").table,
    "acdc": lambda model, pairs: im.acdc(model, pairs).table,
    "evaluate": lambda model, pairs: im.evaluate(model, pairs, Circuit.full(universe_of(model))),
    "layer-ablation": lambda model, pairs: load("layer-ablation")(model, pairs),
    "conv-shift": lambda model, pairs: load("conv-shift")(model, pairs, layer=0),
    "state-ablation": lambda model, pairs: load("state-ablation")(model, pairs),
    "output-ablation": lambda model, pairs: load("output-ablation")(model, pairs),
    "cross-talk": lambda model, pairs: load("cross-talk")(model, pairs),
    "edge-attribution": lambda model, pairs: load("edge-attribution")(model, pairs),
    "circuit-search": lambda model, pairs: load("circuit-search")(model, pairs),
    "positional-attribution": lambda model, pairs: load("positional-attribution")(model, pairs),
}


@pytest.mark.parametrize("name", CALLS)
def test_where_no_pair_has_a_range_one_sentence_says_so(mini, same, name):
    with pytest.raises(InputError, match=r"None of the 12 pairs has a range: .* give pairs whose two prompts"):
        CALLS[name](mini, same)


def test_a_ranking_of_pairs_without_a_range_is_that_without_them(mini, plain, mixed):
    got, want = (ranked(im.attribute(mini, pairs).table) for pairs in (mixed, plain))
    assert got[["source", "target"]].head(5).equals(want[["source", "target"]].head(5))
