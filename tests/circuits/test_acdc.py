"""The exact search, against the decisions of the ACDC library (`tests/data/golden`) and against itself."""

import json

import golden
import pytest
from conditioning import effect_rounding

import ioi_mamba as im
from ioi_mamba.circuits.graph import Circuit, Item, Universe, items_of, universe_of
from ioi_mamba.circuits.search import frontiers
from ioi_mamba.errors import InputError

SEARCHES = {
    "nonpositional": {"recursive": False},
    "nonpositional-recursive": {"recursive": True},
    "positional-layers": {"recursive": False, "parts": False, "positions": True},
}


def published(found):
    """Item -> (removed, drop when kept), of the edges that can be patched."""
    out = {}
    for source, target, label, removed, structural, drop in found["edges"]:
        node, _, place = target.partition(".")
        if structural:
            continue
        if place in ("i", ""):
            item = Item(source.removesuffix(".o"), node, None if label is None else int(label))
        else:
            item = Item(node, node, None, f"conv{label.strip('[]')}" if place == "conv" else place)
        out[item] = (removed, drop)
    return out


def decisions(table):
    return {i: (k, d) for i, k, d in zip(items_of(table), table["kept"], table["drop"], strict=True)}


def search(**options):
    return im.acdc(golden.model(), golden.golden_pairs(), threshold=0.02, **options).table


@pytest.mark.parametrize("name", SEARCHES)
def test_every_decision_and_drop_is_that_of_the_acdc_library(name):
    found = golden.LISTS["acdc"][name]
    options = SEARCHES[name] | {"threshold": found["threshold"], "paper": True}
    table = im.acdc(golden.model(), golden.golden_pairs(), **options).table
    got, want = decisions(table), published(found)
    assert set(got) == set(want)
    assert [item for item in want if got[item][0] == want[item][0]] == []
    kept = [item for item, (removed, _) in want.items() if not removed]
    assert len(kept) > 10
    assert all(got[item][1] == pytest.approx(want[item][1], abs=1e-5) for item in kept)
    assert table.attrs["score"] == pytest.approx(found["score_final"], abs=1e-5)


@pytest.mark.parametrize("recursive", [True, False])
def test_a_search_whose_tests_start_at_their_layer_is_the_plain_one(recursive):
    resumed, plain = (search(recursive=recursive, resume=resume) for resume in (True, False))
    assert resumed["kept"].tolist() == plain["kept"].tolist()
    rounding = effect_rounding(golden.model(), golden.golden_pairs())
    assert resumed["drop"].fillna(0).tolist() == pytest.approx(plain["drop"].fillna(0).tolist(), abs=rounding)
    assert resumed.attrs["tests"] == plain.attrs["tests"] > 10


def test_the_baseline_held_after_every_decision_is_the_one_measured_from_scratch():
    assert search(test_mode=True).attrs["tests"] > 10


def test_a_frontier_holds_items_whose_downstream_items_come_before():
    universe = Universe(3, parts=True)
    groups = frontiers(universe)
    flat = [item for group in groups for item in group]
    assert sorted(map(repr, flat)) == sorted(map(repr, universe.items()))
    decided: set[Item] = set()
    for group in groups:
        for item in group:
            if item.target != "output":
                downstream = [i for i in universe.items() if i.part is None and i.source == item.target]
                assert set(downstream) <= decided
        decided |= set(group)


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 9, 25])
def test_a_search_that_was_cut_off_goes_on_to_the_same_table(tmp_path, after):
    whole, path, calls = search(), tmp_path / "search.json", []

    def cut(done, total):
        calls.append(done)
        if len(calls) == after:
            raise Stop

    with pytest.raises(Stop):
        search(checkpoint=path, progress=cut)
    known = json.loads(path.read_text())
    resumed = search(checkpoint=path)
    assert resumed.drop(columns="drop").equals(whole.drop(columns="drop"))
    rounding = effect_rounding(golden.model(), golden.golden_pairs())
    assert resumed["drop"].fillna(-1).tolist() == pytest.approx(whole["drop"].fillna(-1).tolist(), abs=rounding)
    assert known["tests"] > 0
    assert list(tmp_path.iterdir()) == [path]


def test_the_checkpoint_of_another_search_is_refused(tmp_path):
    path = tmp_path / "search.json"
    search(checkpoint=path)
    with pytest.raises(InputError, match="belongs to another search"):
        im.acdc(golden.model(), golden.golden_pairs(), threshold=0.5, checkpoint=path)
    path.write_text("{}")
    with pytest.raises(InputError, match="no checkpoint of a circuit search"):
        search(checkpoint=path)


def test_a_search_keeps_nothing_that_its_start_left_out():
    universe = universe_of(golden.model(), parts=True)
    out = {Item("embed", "3"), Item("1", "1", None, "skip")}
    table = search(start=Circuit(frozenset(universe.items()) - out, universe))
    kept = {item for item, (k, _) in decisions(table).items() if k}
    assert kept
    assert not kept & out


def test_sets_go_together_only_within_the_rollback():
    """None may with a rollback below every drop, all that are candidates with one above; the default is the threshold."""
    about = {
        rollback: im.acdc(
            golden.model(),
            golden.golden_pairs(),
            threshold=0.05,
            **({} if rollback is None else {"rollback": rollback}),
        ).table.attrs
        for rollback in (10.0, 0.05, None, -10.0)
    }
    assert about[None] == about[0.05]
    assert about[10.0]["rounds"] < about[0.05]["rounds"] < about[-10.0]["rounds"]
