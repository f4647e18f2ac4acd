"""edge-attribution, positional-attribution and circuit-search on `mini`, against the library calls they stand for."""

import pytest

import ioi_mamba as im
from analyses import load
from ioi_mamba.attribution import ranked
from ioi_mamba.graph import Circuit, items_of, universe_of

NAMES = ("edge-attribution", "positional-attribution", "circuit-search")


@pytest.fixture(scope="module")
def sets(mini):
    module = load("edge-attribution")
    return tuple(module.default_pairs(mini.tokenizer, 6, seed) for seed in (27, 28))


@pytest.fixture(scope="module")
def tables(mini, sets):
    return {name: load(name).run(mini, sets[0], held_out=sets[1]) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_table_has_its_columns_a_chart_and_sentences(tables, name):
    module = load(name)
    assert set(module.COLUMNS) <= set(tables[name].columns)
    assert module.chart(tables[name]).to_dict()["$schema"]
    assert all(isinstance(s, str) and s for s in module.findings(tables[name]))


@pytest.mark.parametrize("name", NAMES[:2])
def test_the_kept_items_have_the_accuracy_the_table_says_on_pairs_they_were_not_chosen_on(mini, sets, tables, name):
    table = tables[name]
    positions = sets[0].clean.shape[1] if "position" in table else None
    circuit = Circuit(frozenset(items_of(table[table["kept"]])), universe_of(mini, n_positions=positions))
    assert len(circuit) == table["size"].iloc[0]
    train, held_out = (im.evaluate(mini, pairs, circuit) for pairs in sets)
    assert table["train_accuracy"].iloc[0] == pytest.approx(train["accuracy"])
    assert train["accuracy"] > 0.85
    assert table["accuracy"].iloc[0] == pytest.approx(held_out["accuracy"])
    assert table["normalized_logit_diff"].iloc[0] == pytest.approx(held_out["normalized_logit_diff"], abs=1e-5)


def test_edges_are_ranked_by_their_attribution_and_parts_are_not(mini, sets, tables):
    table = tables["edge-attribution"]
    want = im.attribute(mini, sets[0], parts=True)
    edges = ranked(want[want["part"].isna()])
    got = table[table["part"].isna()]
    assert got["source"].tolist() == edges["source"].tolist()
    assert got["score"].tolist() == pytest.approx(edges["score"].tolist(), abs=1e-6)
    parts = table[table["part"].notna()]
    assert len(parts) == 8 * 6
    assert parts["rank"].isna().all()
    assert not parts["kept"].any()


def test_the_searched_circuit_has_the_scores_the_table_says(mini, sets, tables):
    table = tables["circuit-search"]
    circuit = Circuit(frozenset(items_of(table[table["kept"]])), universe_of(mini, parts=True))
    start = load("circuit-search").starting_circuit(mini, sets[0], 0.85)
    assert circuit.items <= start.items
    train, held_out = (im.evaluate(mini, pairs, circuit) for pairs in sets)
    assert table["train_nld"].iloc[0] == pytest.approx(train["normalized_logit_diff"], abs=1e-5)
    assert table["accuracy"].iloc[0] == pytest.approx(held_out["accuracy"])
    assert (table.loc[table["kept"], "drop"] > 1e-4).all()
