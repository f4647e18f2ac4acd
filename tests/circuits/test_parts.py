"""A part that a record of the family adds is an item everywhere: patched, scored, searched, in tables and charts."""

import dataclasses

import golden
import pytest
import torch

import ioi_mamba as im
from ioi_mamba.circuits.graph import Circuit, Item, Universe, universe_of
from ioi_mamba.model.families import FAMILIES
from ioi_mamba.model.families.mamba import MAMBA
from ioi_mamba.model.family import Part

INPUT_MAP = Part(
    name="input map",
    meaning="B_t, how a token's x enters the state",
    site="B",
    own="B",
    corrupted=("B",),
    leads_to="ssm",
)


def _doubled(corrupted, now, of_pair):
    return corrupted["C"][of_pair] + now["delta_1"].mean(-1, keepdim=True) - now["delta_1"].mean(-1, keepdim=True)


READ_OUT_MAP = Part(
    name="read-out map",
    meaning="C_t, made by hand from values of both runs",
    site="C",
    own="C",
    corrupted=("C",),
    now=("delta_1",),
    made=_doubled,
)


@pytest.fixture
def with_more_parts(monkeypatch):
    more = dataclasses.replace(
        MAMBA, mixer=MAMBA.mixer._replace(parts=lambda width: (*MAMBA.mixer.parts(width), INPUT_MAP, READ_OUT_MAP))
    )
    monkeypatch.setitem(FAMILIES, "mamba", more)
    return golden.model(), golden.random_pairs("golden")


def test_patching_it_is_writing_the_corrupted_value_at_its_site(with_more_parts):
    model, pairs = with_more_parts
    for name, site in (("input map", "B"), ("read-out map", "C")):
        hook = f"blocks.1.hook_{site}"
        corrupted = im.read(model, pairs.corrupted, [hook])[hook]
        want = im.run(model, pairs.clean, {hook: corrupted})
        got = im.patch_edges(model, pairs, [("1", "1", None, name)])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert (got - im.run(model, pairs.clean)).abs().max() > 1e-3

        def at_four(x, corrupted=corrupted):
            x[:, 4] = corrupted[:, 4]
            return x

        want = im.run(model, pairs.clean, {hook: at_four})
        got = im.patch_edges(model, pairs, [("1", "1", 4, name)])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_it_is_in_the_graph_scored_and_searched(with_more_parts):
    model, pairs = with_more_parts
    inside = universe_of(model, parts=True).inside
    assert inside[-2:] == ("input map", "read-out map")
    exact = im.attribute(model, pairs, method="exact", parts=True).table
    found = im.attribute(model, pairs, method="eap-ig", steps=10, parts=True).table
    own = found["part"].isin(inside[-2:])
    assert own.sum() == 2 * 4
    assert found[own]["score"].corr(exact[own]["score"]) > 0.8
    search = im.acdc(model, pairs, threshold=0.01)
    assert set(inside) <= set(search.table["part"].dropna())
    kept = Circuit(frozenset({Item("1", "1", None, "input map")}), universe_of(model, parts=True))
    assert "input map" in repr(kept)
    assert kept.chart().to_dict()


def test_a_layer_whose_state_nothing_reaches_is_no_way_through_in_the_published_search():
    from ioi_mamba.circuits.search import _State, _without_effect

    universe = Universe(2, 4, parts=True)
    closed = [Item("0", "0", None, part) for part in ("conv-3", "conv-2", "conv-1", "conv0", "skip")]
    for paper in (True, False):
        dead = _without_effect(_State(removed=dict.fromkeys(closed)), universe, paper)
        edges = {(item.source, item.target) for item in dead if item.part is None}
        assert edges == ({("embed", "0"), ("0", "1"), ("0", "output")} if paper else set())
    one_tap = _State(removed=dict.fromkeys(closed[1:]))
    assert not [item for item in _without_effect(one_tap, universe, True) if item.part is None]


def test_a_part_that_leads_to_another_is_decided_after_it_and_falls_with_it_as_published(with_more_parts):
    from ioi_mamba.circuits.search import frontiers

    model, pairs = with_more_parts
    of_layer = [[item.part for item in group] for group in frontiers(universe_of(model, parts=True))]
    assert ["ssm", "skip", "read-out map"] in of_layer
    assert ["conv-3", "conv-2", "conv-1", "conv0", "input map"] in of_layer
    table = im.acdc(model, pairs, threshold=0.05, paper=True).table
    kept = {(s, part) for s, part, keep in table[["source", "part", "kept"]].itertuples(index=False) if keep}
    assert all((layer, "ssm") in kept for layer, part in kept if part == "input map")
