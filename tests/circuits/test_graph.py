"""Items, masks and circuits: what there is to patch, and sets of it."""

import json
import re

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ioi_mamba as im
from ioi_mamba.circuits.graph import Circuit, Item, Universe, items_of, kind_of, masks_of, universe_of
from ioi_mamba.circuits.scoring import Evaluator
from ioi_mamba.errors import InputError
from ioi_mamba.passes.sweep import resample_sweep

UNIVERSE = Universe(3, 3, parts=True, n_positions=2)
LAYERS = Universe(3)
few = settings(max_examples=30, deadline=None)
circuits = st.sets(st.sampled_from(UNIVERSE.items())).map(lambda items: Circuit(frozenset(items), UNIVERSE))


def circuit(*items, universe=LAYERS):
    return Circuit(frozenset(Item(*item) for item in items), universe)


def test_a_graph_has_every_edge_forward_once_and_every_part_of_every_layer():
    nodes = ["embed", "0", "1", "2", "output"]
    assert LAYERS.nodes == nodes
    want = {(nodes[i], nodes[j], None, None) for i in range(5) for j in range(i + 1, 5)}
    assert set(LAYERS.items()) == want
    assert len(LAYERS.items()) == len(want) == 10
    parts = {(i, i, None, part) for i in "012" for part in ("conv-2", "conv-1", "conv0", "ssm", "skip")}
    assert set(Universe(3, 3, parts=True).items()) == want | parts
    assert len(UNIVERSE.items()) == len(set(UNIVERSE.items())) == 2 * (10 + 15)


def test_the_parts_of_a_layer_are_its_taps_from_the_oldest_its_state_and_its_gate():
    assert Universe(1, 4, parts=True).inside == ("conv-3", "conv-2", "conv-1", "conv0", "ssm", "skip")
    assert Universe(1, 4).inside == ()


@pytest.mark.parametrize(
    ("item", "kind"),
    [
        (("embed", "1"), "embed->layer"),
        (("0", "1"), "layer->layer"),
        (("1", "output"), "layer->output"),
        (("embed", "output"), "embed->output"),
        (("1", "1", None, "conv-1"), "conv-1"),
        (("1", "1", 3, "ssm"), "ssm"),
    ],
)
def test_an_item_has_one_kind(item, kind):
    assert kind_of(Item(*item)) == kind


# -- masks --------------------------------------------------------------------------------------------------------


def test_masks_are_one_exactly_where_the_items_of_each_set_are():
    sets = [
        [Item("embed", "0"), Item("1", "output", 2)],
        [
            Item("2", "2", None, "conv-2"),
            Item("0", "0", 1, "conv0"),
            Item("1", "1", 3, "ssm"),
            Item("2", "2", 0, "skip"),
        ],
        [],
    ]
    edges, parts, features = masks_of(sets, Universe(3, 3, parts=True), 4)
    assert features.shape == (len(sets), 0, 4)
    ones = lambda mask: {tuple(index) for index in torch.nonzero(mask).tolist()}
    assert (edges.shape, parts.shape) == ((3, 4, 4, 4), (3, 3, 5, 4))
    assert ones(edges) == {(0, 0, 0, p) for p in range(4)} | {(0, 2, 3, 2)}
    # conv-2, conv-1, conv0, ssm, skip
    assert ones(parts) == {(1, 2, 0, p) for p in range(4)} | {(1, 0, 2, 1), (1, 1, 3, 3), (1, 2, 4, 0)}


@pytest.mark.parametrize(
    "item",
    [
        ("1", "0"),
        ("1", "1"),
        ("output", "0"),
        ("output", "output"),
        ("0", "embed"),
        ("0", "3"),
        ("0", "layer 1"),
        ("embed", "1", 4),
        ("embed", "1", -1),
        ("0", "1", None, "ssm"),
        ("0", "0", None, "conv-3"),
        ("0", "0", None, "gate"),
        ("embed", "embed", None, "ssm"),
        ("embed", "embed", None, "conv0"),
        ("output", "output", None, "skip"),
    ],
)
def test_what_is_no_item_of_the_graph_is_refused_by_name(item):
    with pytest.raises(InputError, match=re.escape(str(Item(*item)))):
        masks_of([[Item(*item)]], Universe(3, 3, parts=True), 4)


def test_a_part_is_no_item_of_a_graph_without_parts():
    with pytest.raises(InputError, match=r"part='ssm'.*parts=True"):
        masks_of([[Item("0", "0", None, "ssm")]], LAYERS, 4)


# -- circuits of a graph ------------------------------------------------------------------------------------------

POSITIONS = Universe(3, n_positions=5)


@pytest.mark.parametrize(
    ("item", "universe"),
    [
        (("0", "7"), LAYERS),
        (("1", "0"), LAYERS),
        (("1", "1"), LAYERS),
        (("output", "output"), LAYERS),
        ((0, 1), LAYERS),
        (("embed", "0", 2), LAYERS),
        (("0", "0", None, "ssm"), LAYERS),
        (("embed", "0"), POSITIONS),
        (("embed", "0", 5), POSITIONS),
        (("embed", "0", -1), POSITIONS),
        (("embed", "0", True), POSITIONS),
        (("embed", "0", 1.5), POSITIONS),
        (("0", "0", 1, "ssm"), POSITIONS),
        (("0", "0", 1, "conv-3"), UNIVERSE),
        (("embed", "embed", 1, "ssm"), UNIVERSE),
        (("0", "1", 1, "ssm"), UNIVERSE),
        (("0", "0", None, "ssm"), UNIVERSE),
    ],
)
def test_a_circuit_has_only_items_of_its_graph(item, universe):
    with pytest.raises(InputError, match=re.escape(str(Item(*item)))):
        Circuit(frozenset([Item(*item), *universe.items()[:2]]), universe)


def test_an_item_given_twice_and_what_is_no_item_are_refused():
    items = LAYERS.items()
    assert Circuit(items, LAYERS) == Circuit.full(LAYERS)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=f"{re.escape(str(items[3]))} is given twice"):
        Circuit([*items, items[3]], LAYERS)  # type: ignore[arg-type]
    for wrong in (("embed", "0"), "embed", 3, ["embed", "0"]):
        with pytest.raises(InputError, match="is no Item"):
            Circuit([wrong], LAYERS)  # type: ignore[list-item]
    with pytest.raises(InputError, match="given twice"):
        items_of(pd.DataFrame({"source": ["0", "0"], "target": ["1", "1"], "pair": [0, 1]}))
    with pytest.raises(InputError, match=r"position 1\.5"):
        items_of(pd.DataFrame({"source": ["0"], "target": ["1"], "position": [1.5]}))
    with pytest.raises(InputError, match="no column 'source'"):
        items_of(pd.DataFrame({"layer": [1]}))


def test_a_graph_of_no_model_is_refused():
    for universe in (Universe(0), Universe(3, 0), Universe(3, 4, 1), Universe(3, n_positions=0), (3,)):  # type: ignore
        with pytest.raises(InputError):
            Circuit(frozenset(), universe)  # type: ignore[arg-type]


@few
@given(st.sampled_from([UNIVERSE, LAYERS, POSITIONS, Universe(2, 4, True)]), st.data())
def test_a_graph_checks_as_the_list_of_its_items_says(universe, data):
    nodes = st.sampled_from([*universe.nodes, "9"])
    parts = st.sampled_from([None, *Universe(1, 4, parts=True).inside])
    item = data.draw(st.builds(Item, nodes, nodes, st.sampled_from([None, -1, 0, 1, 4, 5]), parts))
    if item in universe.items():
        universe.check([item])
    else:
        with pytest.raises(InputError, match=re.escape(str(item))):
            universe.check([item])


def test_a_saved_circuit_with_an_item_of_another_graph_or_twice_is_refused(tmp_path):
    path = tmp_path / "circuit"
    Circuit.full(LAYERS).save(path)
    table = Circuit.full(LAYERS).to_frame()
    for rows, message in ((table.assign(target="7"), "target='7'"), (pd.concat([table, table[:1]]), "given twice")):
        rows.to_parquet(path.with_name("circuit.parquet"))
        with pytest.raises(InputError, match=message):
            Circuit.load(path)


def test_a_circuit_of_another_model_or_of_other_positions_is_not_evaluated(mini):
    pairs = im.ioi.generate(mini.tokenizer, 1, 27, templates=im.ioi.ALIGNED_TEMPLATES, symmetric=True)
    for universe, message in (
        (Universe(3), "has 3 layers, .* 8"),
        (Universe(8, n_positions=5), "has 5 positions, .* 20"),
        (Universe(8, 3, parts=True), "has 3 conv slices, .* 4"),
    ):
        with pytest.raises(InputError, match=message):
            im.evaluate(mini, pairs, Circuit.full(universe))


# -- sets ---------------------------------------------------------------------------------------------------------


@few
@given(circuits, circuits, circuits)
def test_circuits_combine_as_sets_do(a, b, c):
    full = Circuit.full(UNIVERSE)
    assert (a | b) == (b | a)
    assert (a & b) == (b & a)
    assert a & (b | c) == (a & b) | (a & c)
    assert a - (b | c) == (a - b) & (a - c)
    assert (a - b) | (a & b) == a
    assert a | full == full
    assert a & full == a
    assert len(a - a) == 0
    assert len(a | b) + len(a & b) == len(a) + len(b)


@few
@given(circuits)
def test_what_is_kept_and_what_is_patched_make_up_the_graph(a):
    assert set(a.patched()) | a.items == set(UNIVERSE.items())
    assert not set(a.patched()) & a.items
    assert all(item in a for item in a.items)
    assert sum(a.kinds().values()) == len(a)


@few
@given(circuits, circuits)
def test_jaccard_and_overlap_count_the_same_items(a, b):
    assert a.jaccard(b) == b.jaccard(a)
    assert a.jaccard(a) == 1.0
    assert 0 <= a.jaccard(b) <= 1
    table = a.overlap(b)
    assert table["shared"].sum() == len(a & b)
    assert table["only_here"].sum() == len(a - b)
    assert table["only_there"].sum() == len(b - a)
    if len(a | b):
        assert a.jaccard(b) == pytest.approx(table["shared"].sum() / table[table.columns[1:]].to_numpy().sum())


@few
@given(circuits)
def test_pruning_is_idempotent_and_only_takes_away(a):
    pruned = a.pruned()
    assert pruned.items <= a.items
    assert pruned.pruned() == pruned


def test_circuits_of_different_graphs_do_not_combine():
    for verb in ("__or__", "__and__", "__sub__", "jaccard", "overlap"):
        with pytest.raises(InputError, match="different graphs"):
            getattr(Circuit.full(LAYERS), verb)(Circuit.full(UNIVERSE))


def test_pruning_keeps_the_edges_on_a_path_and_the_parts_of_the_layers_it_visits():
    universe = Universe(4, 3, parts=True)
    path = [("embed", "0"), ("0", "2"), ("2", "output"), ("0", "0", None, "ssm"), ("2", "2", None, "conv0")]
    dead_end = [("0", "1"), ("1", "1", None, "skip")]
    no_origin = [("3", "output"), ("3", "3", None, "ssm")]
    whole = circuit(*path, *dead_end, *no_origin, universe=universe)
    assert whole.pruned() == circuit(*path, universe=universe)
    assert len(circuit(*dead_end, *no_origin, universe=universe).pruned()) == 0
    assert Circuit.full(universe).pruned() == Circuit.full(universe)


def test_pruning_does_not_ask_two_edges_of_a_path_to_be_at_one_position():
    universe = Universe(2, n_positions=5)
    path = circuit(("embed", "0", 1), ("0", "output", 4), universe=universe)
    assert path.pruned() == path


# -- files --------------------------------------------------------------------------------------------------------


@few
@given(st.sampled_from([UNIVERSE, LAYERS, Universe(2, 4, True, None), Universe(2, 4, False, 3)]), st.integers(0, 1000))
def test_a_circuit_comes_back_from_its_files_as_it_was(tmp_path_factory, universe, seed):
    keep = torch.rand(len(universe.items()), generator=torch.Generator().manual_seed(seed)) < 0.4
    before = Circuit(frozenset(i for i, k in zip(universe.items(), keep, strict=True) if k), universe)
    path = tmp_path_factory.mktemp("circuit") / "bottleneck.v1"
    before.save(path)
    assert Circuit.load(path) == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["bottleneck.v1.json", "bottleneck.v1.parquet"]


def test_the_table_of_a_circuit_is_in_the_order_of_the_graph():
    table = Circuit.full(UNIVERSE).to_frame()
    assert list(table.columns) == ["source", "target", "position", "part"]
    assert items_of(table) == UNIVERSE.items()


def test_items_are_read_from_a_table_with_or_without_positions_and_parts():
    table = pd.DataFrame({"source": ["embed", 0], "target": [0, "output"]})
    assert items_of(table) == [Item("embed", "0"), Item("0", "output")]


def spoil(path, **files):
    for suffix, data in files.items():
        path.with_name(f"{path.name}.{suffix}").write_bytes(data)


@pytest.mark.parametrize(
    "files",
    [
        {"parquet": b"not parquet"},
        {"json": b"{"},
        {"json": b"[]"},
        {"json": b"{}"},
        {"json": b'{"universe": {"layers": 3}}'},
        {"json": b'{"universe": 3}'},
        {"json": b'{"universe": {"n_layers": "three"}}'},
        {"json": b'{"universe": {"n_layers": 1}}'},
        {"json": b"\xff\xfe"},
    ],
)
def test_a_foreign_file_is_no_circuit(tmp_path, files):
    path = tmp_path / "circuit"
    Circuit.full(LAYERS).save(path)
    spoil(path, **files)
    with pytest.raises(InputError):
        Circuit.load(path)


def test_a_table_of_something_else_is_no_circuit(tmp_path):
    path = tmp_path / "circuit"
    Circuit.full(LAYERS).save(path)
    pd.DataFrame({"layer": [1]}).to_parquet(path.with_name("circuit.parquet"))
    with pytest.raises(InputError, match="no saved circuit"):
        Circuit.load(path)


@pytest.mark.parametrize("missing", ["parquet", "json"])
def test_a_circuit_with_a_file_missing_is_refused_by_its_path(tmp_path, missing):
    path = tmp_path / "circuit"
    Circuit.full(LAYERS).save(path)
    path.with_name(f"circuit.{missing}").unlink()
    with pytest.raises(InputError, match=f"{path} is no saved circuit"):
        Circuit.load(path)


def test_the_json_of_mib_has_every_edge_and_says_which_are_kept():
    kept = circuit(("embed", "0"), ("0", "output"), ("0", "0", None, "ssm"), universe=Universe(2, parts=True))
    mib = json.loads(json.dumps(kept.to_mib()))
    assert mib["cfg"]["n_layers"] == 2
    assert {name: node["in_graph"] for name, node in mib["nodes"].items()} == {
        "input": True,
        "m0": True,
        "m1": False,
        "logits": True,
    }
    assert {name: edge["in_graph"] for name, edge in mib["edges"].items()} == {
        "input->m0": True,
        "input->m1": False,
        "m0->m1": False,
        "input->logits": False,
        "m0->logits": True,
        "m1->logits": False,
    }


def test_circuits_are_part_of_the_public_interface():
    assert im.Circuit is Circuit


def test_a_circuit_is_made_of_a_table_that_says_what_is_kept(mini):
    pairs = im.ioi.generate(mini.tokenizer, 2, 27, templates=im.ioi.ALIGNED_TEMPLATES, symmetric=True)
    table = im.acdc(mini, pairs, threshold=0.05).table
    circuit = Circuit.from_frame(table, mini)
    assert circuit.universe == universe_of(mini, parts=True)
    assert len(circuit) == int(table["kept"].sum()) > 0
    assert im.evaluate(mini, pairs, table) == im.evaluate(mini, pairs, circuit)
    for other in (table.drop(columns="kept"), circuit.items, "edges"):
        with pytest.raises(InputError, match="is no circuit"):
            im.evaluate(mini, pairs, other)


def test_what_is_no_pairs_is_told_how_to_make_them(mini):
    tokens = torch.tensor([[0, 5, 7]])
    verbs = (
        lambda: im.attribute(mini, tokens).table,
        lambda: im.attribute(mini, [[0, 5, 7]], method="exact").table,
        lambda: im.attribute(mini, tokens, positions=True).table,
        lambda: im.acdc(mini, "Then, Ana").table,
        lambda: im.acdc(mini, tokens, positions=True).table,
        lambda: im.evaluate(mini, tokens, Circuit.full(universe_of(mini))),
        lambda: im.patch_edges(mini, tokens, [("0", "output")]),
        lambda: resample_sweep(mini, tokens, "y"),
    )
    for verb in verbs:
        with pytest.raises(InputError, match="is no Pairs: make them with"):
            verb()


def test_no_set_at_all_is_refused_by_what_is_missing(mini):
    pairs = im.ioi.generate(mini.tokenizer, 1, 27, symmetric=True)
    evaluator = Evaluator(mini, pairs, universe_of(mini))
    for verb in (evaluator.scores, evaluator.normalized, evaluator.exact_effects):
        with pytest.raises(InputError, match="no set of items to patch"):
            verb([])
