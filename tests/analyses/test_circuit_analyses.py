"""edge-attribution, positional-attribution and circuit-search on `mini`, against the library calls they stand for."""

import io
from dataclasses import replace

import pandas as pd
import pytest
import torch
from scipy import stats

import ioi_mamba as im
from ioi_mamba.analyses import _circuits, circuit_search, load
from ioi_mamba.analyses.circuit_search import SEARCH, first_pruned, less_search
from ioi_mamba.analyses.positional_attribution import LAST_ONLY, LOST, busiest_layer, without_early_output
from ioi_mamba.circuits.attribution import ranked
from ioi_mamba.circuits.faithfulness import MIB_FRACTIONS, areas, size_curve, split_jaccards
from ioi_mamba.circuits.graph import Circuit, Item, Universe, items_of, universe_of
from ioi_mamba.circuits.methods import METHODS
from ioi_mamba.circuits.ranking import Ranking
from ioi_mamba.circuits.scoring import Evaluator
from ioi_mamba.errors import InputError
from ioi_mamba.experiments.experiment import Context
from ioi_mamba.report.pages import chart_spec
from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import Pairs

NAMES = ("edge-attribution", "positional-attribution", "circuit-search")


@pytest.fixture(scope="module")
def sets(mini):
    module = load("edge-attribution")
    return tuple(module.draw(mini.tokenizer, 3, seed, ioi.TASK) for seed in (27, 28))


@pytest.fixture(scope="module")
def tables(mini, sets):
    """The three tables; search and attribution are compared at one threshold, to be quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(circuit_search, "THRESHOLDS", (1e-1,))
        yield make_tables(mini, sets)


def make_tables(mini, sets):
    options = {"edge-attribution": {"exact_prompts": 4}, "circuit-search": {"compare_prompts": 4}}
    return {name: load(name)(mini, sets[0], held_out=sets[1], **options.get(name, {})) for name in NAMES}


def kept_circuit(mini, sets, table, **universe):
    positions = sets[0].clean.shape[1] if "position" in table and table.loc[table["kept"], "position"].any() else None
    return Circuit(frozenset(items_of(table[table["kept"]])), universe_of(mini, n_positions=positions, **universe))


def value(table, circuit, measure, sample="held out"):
    return _circuits.of_circuit(table, circuit, measure, sample).iloc[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_table_has_its_columns_a_chart_and_sentences(tables, name):
    module = load(name)
    assert set(module.required) <= set(tables[name].columns)
    assert chart_spec(module.chart(tables[name]))["$schema"]
    assert all(isinstance(s, str) and s.endswith(".") and "nan" not in s for s in module.findings(tables[name]))


@pytest.mark.parametrize("name", NAMES)
def test_a_table_read_back_says_the_same(tables, name):
    file = io.BytesIO(tables[name].to_parquet())
    again = pd.read_parquet(file)
    pd.testing.assert_frame_equal(again, tables[name])
    assert load(name).findings(again) == load(name).findings(tables[name])


@pytest.mark.parametrize(("name", "parts"), [(NAMES[0], False), (NAMES[1], False), (NAMES[2], True)])
def test_the_circuit_has_the_scores_the_table_says_on_both_samples_and_without_it(mini, sets, tables, name, parts):
    table = tables[name]
    circuit = kept_circuit(mini, sets, table, parts=parts)
    assert len(circuit) == value(table, "kept", "accuracy")["size"]
    for pairs, sample, circuit_name in (
        (sets[0], "train", "kept"),
        (sets[1], "held out", "kept"),
        (sets[1], "held out", "all but kept"),
    ):
        want = im.evaluate(mini, pairs, circuit, necessity=circuit_name != "kept", intervals=True)
        for measure in ("accuracy", "normalized_logit_diff", "kl"):
            row = value(table, circuit_name, measure, sample)
            assert row["value"] == pytest.approx(want[measure], abs=1e-4)
            assert row["low"] == pytest.approx(want[f"{measure}_low"], abs=1e-4)
            assert row["n"] == len(pairs)
    if not parts:
        assert value(table, "kept", "accuracy", "train")["value"] > 0.85


def test_random_circuits_do_worse_than_the_one_that_was_found(tables):
    for table in tables.values():
        table = table[table["threshold"].isna()] if "threshold" in table else table
        random = _circuits.of_circuit(table, "random", "normalized_logit_diff")
        assert len(random) == _circuits.N_RANDOM
        # On the same prompts as the circuit they are compared with.
        assert set(random["n"]) == {value(table, "kept", "normalized_logit_diff")["n"]}
        assert random["value"].max() < value(table, "kept", "normalized_logit_diff")["value"]


@pytest.mark.parametrize("name", NAMES[:2])
def test_the_curve_is_that_of_the_ranking(mini, sets, tables, name):
    table = tables[name]
    items = table[(table["what"] == "item") & table["rank"].notna()].sort_values("rank")
    positions = sets[0].clean.shape[1] if name == NAMES[1] else None
    curve = _circuits.of_circuit(table, "first k", "f")
    assert {0, len(items)} <= set(curve["size"])
    few = curve.iloc[3:6]
    evaluator = Evaluator(mini, sets[1], universe_of(mini, n_positions=positions))
    ranking = Ranking(tuple(items_of(items)), items["score"].to_numpy(), evaluator.universe)
    want = size_curve(evaluator, ranking, few["size"].tolist())
    assert few["value"].tolist() == pytest.approx(want["f"].tolist(), abs=1e-4)
    assert curve["value"].iloc[[0, -1]].tolist() == pytest.approx([0, 1], abs=1e-3)


def test_edges_are_ranked_by_their_attribution_and_parts_are_not(mini, sets, tables):
    table = tables["edge-attribution"]
    totals = table[(table["what"] == "item") & table["position"].isna()]
    edges = ranked(im.attribute(mini, sets[0]).table)
    got = totals[totals["part"].isna()]
    assert got["source"].tolist() == edges["source"].tolist()
    assert got["score"].tolist() == pytest.approx(edges["score"].tolist(), abs=1e-6)
    parts = totals[totals["part"].notna()]
    assert len(parts) == 8 * 6
    assert parts["rank"].isna().all()
    assert not parts["kept"].any()


def test_an_items_scores_at_positions_add_up_to_its_score(tables):
    table = tables["edge-attribution"]
    items = table[(table["what"] == "item") & table["part"].isna()]
    key = ["source", "target"]
    at = items[items["position"].notna()].groupby(key)["score"].sum()
    total = items[items["position"].isna()].set_index(key)["score"]
    assert len(at) == len(total) == 45
    assert at.tolist() == pytest.approx(total.loc[at.index].tolist(), abs=1e-5)


def test_exact_effects_stand_beside_their_own_items(mini, sets, tables):
    table = tables["edge-attribution"]
    shown = table[table["exact"].notna()]
    few = _circuits.some_of(sets[0], 4)
    assert set(shown["n_exact"]) == {len(few)}
    chosen = shown.iloc[[0, 3, 20, 50, 80]]
    want = Evaluator(mini, few, universe_of(mini, parts=True)).exact_effects(items_of(chosen)).mean(1)
    assert chosen["exact"].tolist() == pytest.approx(want.tolist(), abs=1e-5)
    edges = shown[shown["part"].isna()]
    estimates = {}
    for same in (
        im.attribute(mini, few, parts=True).table,
        im.attribute(mini, few).table,
    ):  # edges are scored without parts
        estimates |= dict(zip(items_of(same), same["score"], strict=True))
    assert shown["estimate"].tolist() == pytest.approx([estimates[item] for item in items_of(shown)], abs=1e-5)
    correlation = edges["estimate"].abs().rank().corr(edges["exact"].abs().rank())
    assert value(table, "edges", "spearman", "train")["value"] == pytest.approx(correlation)


def test_intervals_of_scores_are_those_of_the_means_of_symmetric_pairs(mini, sets, tables):
    row = tables["positional-attribution"].iloc[0]
    per_pair = im.attribute(mini, sets[0], positions=True, per_pair=True).table
    same = (per_pair["source"] == row["source"]) & (per_pair["target"] == row["target"])
    values = per_pair[same & (per_pair["position"] == row["position"])]["score"].to_numpy()
    half = len(values) // 2
    draws = (values[:half] + values[half:]) / 2  # the two directions of a pair
    want = stats.t.interval(0.95, half - 1, draws.mean(), stats.sem(draws))
    assert (row["low"], row["high"]) == pytest.approx(want, abs=1e-6)


def test_the_search_decides_among_the_items_it_began_with(mini, sets, tables):
    table = tables["circuit-search"]
    circuit = kept_circuit(mini, sets, table, parts=True)
    start = circuit_search.starting_circuit(Context(mini, sets[0], circuit_search.Options()), sets[0])
    assert circuit.items <= start.items
    items = table[table["what"] == "item"]
    assert set(items_of(items[items["started"]])) == start.items
    assert (items.loc[items["kept"], "drop"] > 1e-4).all()


def test_each_item_of_the_search_has_its_own_attribution(mini, sets, tables):
    items = tables["circuit-search"].query("what == 'item'")
    want = dict(zip(items_of(t := im.attribute(mini, sets[0], parts=True).table), t["score"], strict=True))
    assert items["score"].tolist() == pytest.approx([want[i] for i in items_of(items)], abs=1e-5)


def test_search_and_attribution_are_compared_at_the_same_size_on_held_out_pairs(mini, sets, tables):
    table = tables["circuit-search"]
    few = _circuits.some_of(sets[0], 4)
    universe = universe_of(mini, parts=True)
    for threshold, rows in table[table["threshold"].notna()].groupby("threshold"):
        found = im.acdc(mini, few, threshold=threshold).table
        circuits = {SEARCH: Circuit(frozenset(items_of(found[found["kept"]])), universe)}
        for method in ("eap-ig", "eap"):
            ranking = im.attribute(mini, few, method=method, parts=True).ranking()
            circuits[METHODS[method].label] = first_pruned(ranking, len(circuits[SEARCH]))
        for name, circuit in circuits.items():
            row = value(rows, name, "f")
            assert row["size"] == len(circuit) <= len(circuits[SEARCH])
            assert row["value"] == pytest.approx(im.evaluate(mini, sets[1], circuit)["f"], abs=1e-4)
            if name != SEARCH:
                difference = value(rows, less_search(name), "f")
                assert difference["value"] == pytest.approx(row["value"] - value(rows, SEARCH, "f")["value"])
                assert difference["low"] <= difference["value"] <= difference["high"]


def test_a_pruned_circuit_is_filled_up_to_its_size():
    universe = Universe(2)
    order = [("embed", "1"), ("0", "1"), ("1", "output"), ("0", "output"), ("embed", "0"), ("embed", "output")]
    ranking = Ranking.of([Item(*nodes) for nodes in order], range(len(order)), universe)
    # Until embed -> 0 comes, what leaves layer 0 is on no path from embed.
    assert first_pruned(ranking, 2).items == {Item("embed", "1"), Item("1", "output")}
    assert first_pruned(ranking, 4).items == first_pruned(ranking, 2).items
    assert len(first_pruned(ranking, 5)) == 5


def test_without_the_comparison_the_search_stands_alone(mini, sets):
    module = load("circuit-search")
    table = module(mini, sets[0][:2], compare_prompts=0)
    assert table["threshold"].isna().all()
    assert len(module.findings(table)) == 6
    assert module.chart(table).to_dict()


def test_removing_early_output_leaves_the_last_position_of_the_bottleneck(mini, sets, tables):
    table = tables["positional-attribution"]
    layer = int(table["bottleneck"].iloc[0])
    assert layer == busiest_layer(_circuits.item_rows(table))
    circuit = kept_circuit(mini, sets, table)
    last = sets[0].clean.shape[1] - 1
    early = Item(str(layer), "output", 3), Item(str(layer), "output", last)
    more = Circuit(circuit.items | set(early), circuit.universe)
    reduced = without_early_output(more, layer)
    assert {i for i in more.items - reduced.items if i.source == str(layer)} == more.items - reduced.items
    assert all(i.position == last for i in reduced.items if i.source == str(layer))
    assert early[0] not in reduced
    assert early[1] in reduced
    want = im.evaluate(mini, sets[1], without_early_output(circuit, layer))
    assert value(table, LAST_ONLY, "accuracy")["value"] == pytest.approx(want["accuracy"])
    lost = value(table, "kept", "accuracy")["value"] - value(table, LAST_ONLY, "accuracy")["value"]
    assert value(table, LOST, "accuracy")["value"] == pytest.approx(lost)
    assert value(table, LOST, "accuracy")["low"] <= lost <= value(table, LOST, "accuracy")["high"]


def test_a_bottleneck_that_is_given_is_used_and_a_layer_that_is_not_there_refused(mini, sets):
    module = load("positional-attribution")
    table = module(mini, sets[0][:2], layer=2)
    assert set(table["bottleneck"].dropna()) == {2}
    with pytest.raises(InputError, match="layers 0 to 7, not 8"):
        module(mini, sets[0], layer=8)


def test_held_out_prompts_of_another_layout_have_no_positions_in_common(mini, sets):
    shorter = Pairs.from_tokens(
        *(side[:, :-1] for side in (sets[1].clean, sets[1].corrupted)), sets[1].answer, sets[1].wrong
    )
    with pytest.raises(InputError, match="No held-out prompt has the layout of the pairs"):
        load("positional-attribution")(mini, sets[0], held_out=shorter)


def test_the_areas_of_the_benchmark_are_those_of_its_sizes_and_rankings(mini, sets, tables):
    table = tables["edge-attribution"]
    edges = table[(table["what"] == "item") & table["rank"].notna()].drop(columns="rank")
    few = Evaluator(mini, _circuits.some_of(sets[1], _circuits.CURVE_PROMPTS), universe_of(mini))
    sizes = [int(fraction * 45) for fraction in MIB_FRACTIONS]
    for measure, ranking in (("cpr", "signed"), ("cmd", "absolute")):
        order = Ranking.of(items_of(edges), edges["score"].to_numpy(), few.universe, ranking)
        f = torch.tensor(size_curve(few, order, sizes)["f"].to_numpy())
        got = value(table, _circuits.MIB_GRID, measure)
        assert got["value"] == pytest.approx(float(areas(MIB_FRACTIONS, f)[measure]), abs=1e-4)
        assert got["low"] < got["value"] < got["high"]
        assert got["value"] != pytest.approx(value(table, "first k", measure)["value"], abs=1e-4)


@pytest.mark.parametrize("name", NAMES[:2])
def test_the_jaccard_is_of_circuits_that_halves_of_the_prompts_choose(mini, sets, tables, name):
    table = tables[name]
    row = value(table, "kept", "jaccard", "train")
    per_pair = im.attribute(mini, sets[0], positions=name == NAMES[1], per_pair=True).table
    items = items_of(first := per_pair[per_pair["pair"] == 0])
    scores = torch.tensor(per_pair["score"].to_numpy()).view(len(first), -1)
    evaluator = Evaluator(mini, sets[0], universe_of(mini, n_positions=20 if name == NAMES[1] else None))
    want = split_jaccards(evaluator, items, scores, 0.85, n_splits=_circuits.N_SPLITS)
    assert row["value"] == pytest.approx(float(want.mean()))
    assert row["n"] == len(sets[0]) // 2
    assert "choose circuits anew" in " ".join(load(name).findings(table))


@pytest.mark.parametrize("name", NAMES)
def test_a_target_that_no_circuit_reaches_is_said(mini, sets, tables, name):
    options = {"compare_prompts": 0} if name == "circuit-search" else {"steps": 2}
    table = load(name)(mini, sets[0], held_out=sets[1], target=1.0, **options)
    items = _circuits.item_rows(table)
    assert not items["reached"].any()
    assert set(items["target_accuracy"]) == {1.0}
    assert "no circuit of first" in " ".join(load(name).findings(table))
    assert _circuits.item_rows(tables[name])["reached"].all()
    assert "not reached" not in " ".join(load(name).findings(tables[name]))


@pytest.fixture(scope="module")
def ragged(mini):
    """Two pairs of each template, 20 tokens long and in one case 19, of which few positions have a role."""
    pairs = im.Pairs.concat(
        [im.ioi.generate(mini.tokenizer, 2, 27, templates=[each], symmetric=True) for each in im.ioi.TEMPLATES]
    )
    roles = {role: at for role, at in pairs.roles.items() if role in ("BOS", "n1", "n2", "n3", "n4", "n5", "out")}
    return replace(pairs, roles=roles)


def test_positions_are_those_of_the_commonest_layout_and_the_rest_is_counted(mini, ragged):
    module = load("positional-attribution")
    own = max(ragged.layouts(), key=len)
    got, want = (module(mini, pairs, held_out=ragged, steps=2) for pairs in (ragged, own))
    assert set(_circuits.item_rows(got)["other_layouts"]) == {2 * (len(ragged) - len(own))}
    same = ["source", "target", "position", "score", "kept", "value"]
    pd.testing.assert_frame_equal(got[same], want[same])
    kept = [value(table, "kept", "normalized_logit_diff") for table in (got, want)]
    assert kept[0]["n"] == len(own)
    assert kept[0]["value"] > 0.5
    assert f"{2 * (len(ragged) - len(own))} prompts were not used" in " ".join(module.findings(got))


def test_scores_and_circuits_at_positions_refuse_prompts_of_several_layouts(mini, ragged):
    universe = universe_of(mini, n_positions=20)
    for call in (
        lambda: im.attribute(mini, ragged, positions=True).table,
        lambda: im.acdc(mini, ragged, positions=True, parts=False).table,
        lambda: im.evaluate(mini, ragged, Circuit.full(universe)),
        lambda: Evaluator(mini, ragged, universe),
    ):
        with pytest.raises(InputError, match=r"have 2 layouts .* give those of one layout"):
            call()
    assert len(im.attribute(mini, ragged).table) == 45
    assert im.attribute(mini, ragged, positions=True, per_pair=True).table["pair"].nunique() == len(ragged)


def test_scores_of_edges_at_positions_are_means_over_the_same_word(mini, ragged):
    table = load("edge-attribution")(mini, ragged, steps=2, exact_prompts=2)
    at = _circuits.item_rows(table)
    at = at[at["label"].notna() & (at["source"] == "embed") & (at["target"] == "0")].set_index("label")
    per_pair = im.attribute(mini, ragged, positions=True, per_pair=True, steps=2).table
    per_pair = per_pair[(per_pair["source"] == "embed") & (per_pair["target"] == "0")]
    scores = per_pair.pivot(index="pair", columns="position", values="score")
    for label in ("n1", "n4", "out"):
        own = [scores.loc[row, int(at_row)] for row, at_row in enumerate(ragged.roles[label])]
        assert at.loc[label, "score"] == pytest.approx(sum(own) / len(own), abs=1e-6)
        assert at.loc[label, "n"] == len(ragged)
    # "1" is "Then" in one template and no word of its own in another.
    longest = [part for part in ragged.layouts() if part.clean.shape[1] == 20]
    unnamed = [label for label in longest[0].position_labels() if label.isdigit()]
    assert unnamed
    assert set(at.loc[unnamed, "n"]) == {len(longest[0])}
