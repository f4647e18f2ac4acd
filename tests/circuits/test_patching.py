"""Edge patching (equation 11): against the golden values, the slow reference, and what must hold of any patch."""

import golden
import pytest
import reference
import torch
from conditioning import logit_rounding
from golden import NODES, at_last, relative_error

import ioi_mamba as im
from ioi_mamba.circuits.graph import Item, masks_of, universe_of
from ioi_mamba.circuits.patching import corrupted_run, dropped_nodes, nodes_of, patched_logits, patched_run
from ioi_mamba.errors import InputError
from ioi_mamba.passes.metrics import answer_logits, logit_diff, normalized_logit_diff
from ioi_mamba.tasks.base import Pairs

EDGES = [(i, j) for j in range(1, 6) for i in range(j)]


def patched(model, pairs, sets, **options):
    """Logits of many sets of items in one pass, [set, pair, vocab]."""
    masks = masks_of(sets, universe_of(model, parts=True), pairs.clean.shape[1])
    return patched_logits(model, pairs, corrupted_run(model, pairs, parts=True), masks, **options)


# -- golden values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry", [e for e in golden.LISTS["interventions"] if e["type"] == "edge"], ids=lambda e: e["name"]
)
def test_a_patched_edge_gives_the_logits_of_mambalens(entry):
    model, pairs = golden.model(), golden.golden_pairs()
    (i, j), want = entry["edge"], golden.TENSORS[f"iv/{entry['name']}"]
    edge = (NODES[i], NODES[j]) if entry["pos"] is None else (NODES[i], NODES[j], entry["pos"])
    logits = im.patch_edges(model, pairs, [edge])
    assert (at_last(logits, pairs)[:, :128] - want).abs().max() < 2e-4
    moved = (logits - im.run(model, pairs.clean, {})).abs().max().item()
    assert moved == pytest.approx(entry["effect"], abs=2e-4)


def test_sets_of_edges_give_the_logits_of_mambalens():
    pairs, mask, by_position = golden.golden_pairs(), golden.TENSORS["edgeset/mask"], golden.TENSORS["edgeset/mask_pos"]
    everywhere = [(NODES[i], NODES[j]) for i, j in EDGES if mask[i, j]]
    placed = [(NODES[i], NODES[j], p) for i, j in EDGES for p in range(20) if by_position[i, j, p]]
    for edges, name in ((everywhere, "iv/edges.set"), (placed, "iv/edges.set_pos")):
        assert 1 < len(edges) < len(EDGES) * 20
        logits = at_last(im.patch_edges(golden.model(), pairs, edges), pairs)
        assert (logits[:, :128] - golden.TENSORS[name]).abs().max() < 2e-4


def test_every_edge_at_all_positions_and_at_each_is_the_table_of_mambalens():
    model, pairs = golden.model(), golden.golden_pairs()
    sets = [[Item(NODES[i], NODES[j])] for i, j in EDGES]
    logits = answer_logits(patched(model, pairs, sets), pairs.answer, pairs.wrong)
    want = torch.stack([golden.TENSORS["sweep/edge"][i, j] for i, j in EDGES])
    assert (logits - want).abs().max() < 2e-4
    sets = [[Item(NODES[i], NODES[j], p)] for i, j in EDGES for p in range(20)]
    logits = answer_logits(patched(model, pairs, sets), pairs.answer, pairs.wrong).unflatten(0, (-1, 20))
    want = torch.stack([golden.TENSORS["sweep/edge_pos"][i, j] for i, j in EDGES])
    assert (logits - want).abs().max() < 2e-4


@pytest.mark.parametrize("name", golden.LISTS["acdc"])
def test_a_circuit_of_the_acdc_library_has_the_score_it_says(name):
    """Its edges into conv, ssm and skip are our parts; its labels are conv offsets or positions."""
    model, pairs, found = golden.model(), golden.golden_pairs(), golden.LISTS["acdc"][name]
    removed = []
    for source, target, label, is_patched, structural, _ in found["edges"]:
        if not is_patched or structural:
            continue
        node, _, place = target.partition(".")
        if place in ("i", ""):
            removed.append(Item(source.removesuffix(".o"), node, None if label is None else int(label)))
        else:
            removed.append(Item(node, node, None, f"conv{label.strip('[]')}" if place == "conv" else place))
    assert len(removed) > 5
    difference = lambda logits: logit_diff(logits, pairs.answer, pairs.wrong)
    clean, corrupted = (difference(at_last(im.run(model, t, {}), pairs)) for t in (pairs.clean, pairs.corrupted))
    torch.testing.assert_close(clean, golden.TENSORS["metric/clean_logit_diff"], rtol=0, atol=2e-4)
    torch.testing.assert_close(corrupted, golden.TENSORS["metric/corr_logit_diff"], rtol=0, atol=2e-4)
    score = lambda items: (
        normalized_logit_diff(difference(patched(model, pairs, [items])[0]), clean, corrupted).mean().item()
    )
    assert score([]) == pytest.approx(found["score_no_patch"], abs=1e-5)
    assert score(removed) == pytest.approx(found["score_final"], abs=1e-5)


# -- the slow reference -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["odd", "golden"])
def test_the_exact_effect_of_every_edge_and_part_is_that_of_the_slow_loop(name):
    model, pairs, weights = golden.opened(name), golden.random_pairs(name), golden.weights(name)
    items = universe_of(model, parts=True).items()
    got = patched(model, pairs, [[item] for item in items])
    clean = at_last(im.run(model, pairs.clean, {}), pairs)
    for item, logits in zip(items, got, strict=True):
        want = at_last(reference.patch_edges(weights, pairs, [item])["hook_logits"], pairs)
        assert relative_error(logits, want) < 1e-5, item
        # The last token is the same in both prompts, so that at `last` the direct path has nothing to carry.
        assert item[:2] == ("embed", "output") or (logits - clean).abs().max() > 1e-4, item


def test_items_at_single_positions_are_those_of_the_slow_loop():
    model, pairs, weights = golden.odd_model(), golden.random_pairs("odd"), golden.weights("odd")
    items = universe_of(model, parts=True, n_positions=9).items()[3::7]
    got = patched(model, pairs, [[item] for item in items], everywhere=True)
    for item, logits in zip(items, got, strict=True):
        assert relative_error(logits, reference.patch_edges(weights, pairs, [item])["hook_logits"]) < 1e-5, item


@pytest.mark.parametrize("seed", range(4))
def test_sets_of_edges_and_parts_at_any_positions_are_those_of_the_slow_loop(seed):
    model, pairs, weights = golden.odd_model(), golden.random_pairs("odd"), golden.weights("odd")
    universe = universe_of(model, parts=True, n_positions=9)
    drawn = torch.rand(len(universe.items()), generator=torch.Generator().manual_seed(seed)) < 0.3
    items = [item for item, chosen in zip(universe.items(), drawn, strict=True) if chosen]
    want = reference.patch_edges(weights, pairs, items)["hook_logits"]
    assert relative_error(im.patch_edges(model, pairs, items), want) < 1e-5


@pytest.mark.parametrize("alpha", [0.25, 0.75])
def test_edges_and_parts_can_be_patched_in_part(alpha):
    model, pairs, weights = golden.odd_model(), golden.random_pairs("odd"), golden.weights("odd")
    universe = universe_of(model, parts=True)
    masks = masks_of([universe.items()], universe, 9) * alpha
    got = patched_logits(model, pairs, corrupted_run(model, pairs, parts=True), masks, everywhere=True)[0]
    corrupted, values = reference.run(weights, pairs.corrupted), {}
    amounts = {(item.source, item.target, item.part, None): alpha for item in universe.items()}
    want = reference.run(weights, pairs.clean, reference.patch_edits(weights, corrupted, values, amounts), values)
    assert relative_error(got, want["hook_logits"]) < 1e-5


# -- what must hold of any patch ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["golden", "odd"])
@pytest.mark.parametrize("parts", [False, True])
def test_patching_everything_is_the_corrupted_run_and_patching_nothing_the_clean_one(name, parts):
    model, pairs = golden.opened(name), golden.random_pairs(name)
    clean, corrupted = (im.run(model, tokens, {}) for tokens in (pairs.clean, pairs.corrupted))
    every = im.patch_edges(model, pairs, universe_of(model, parts=parts).items())
    assert relative_error(every, corrupted) < 1e-5
    assert relative_error(im.patch_edges(model, pairs, []), clean) < 1e-5
    assert (clean - corrupted).abs().max() > 1
    both = patched(model, pairs, [universe_of(model, parts=parts).items(), []])
    assert relative_error(both[0], at_last(corrupted, pairs)) < 1e-5
    assert relative_error(both[1], at_last(clean, pairs)) < 1e-5


def test_all_slices_of_a_convolution_are_its_whole_output():
    model, pairs = golden.model(), golden.golden_pairs()
    name = "blocks.1.hook_conv"
    resampled = im.run(model, pairs.clean, {name: im.read(model, pairs.corrupted, [name])[name]})
    slices = [("1", "1", None, f"conv{s}") for s in range(-3, 1)]
    assert relative_error(im.patch_edges(model, pairs, slices), resampled) < 1e-5


@pytest.mark.parametrize(("part", "site"), [("ssm", "h"), ("skip", "skip")])
def test_a_part_is_the_value_of_the_corrupted_run_written_everywhere(part, site):
    model, pairs = golden.model(), golden.golden_pairs()
    name = f"blocks.2.hook_{site}"
    resampled = im.run(model, pairs.clean, {name: im.read(model, pairs.corrupted, [name])[name]})
    assert relative_error(im.patch_edges(model, pairs, [("2", "2", None, part)]), resampled) < 1e-5


def test_an_edge_reaches_its_target_only():
    model, pairs = golden.model(), golden.golden_pairs()
    into_last = im.patch_edges(model, pairs, [("embed", "3")])
    name = "blocks.3.hook_layer_input"
    difference = torch.sub(*(im.read(model, t, ["hook_embed"])["hook_embed"] for t in (pairs.corrupted, pairs.clean)))
    assert relative_error(into_last, im.run(model, pairs.clean, {name: lambda x: x + difference})) < 1e-5


def test_positions_place_the_edges_that_have_none_of_their_own():
    model, pairs = golden.odd_model(), golden.random_pairs("odd")
    given = im.patch_edges(model, pairs, [("0", "2"), ("0", "output", 8)], positions=[2, 4])
    spelled = im.patch_edges(model, pairs, [("0", "2", 2), ("0", "2", 4), ("0", "output", 8)])
    assert torch.equal(given, spelled)
    assert not torch.equal(given, im.patch_edges(model, pairs, [("0", "2"), ("0", "output", 8)]))


def test_an_edge_at_all_its_positions_is_the_edge():
    model, pairs = golden.odd_model(), golden.random_pairs("odd")
    whole = im.patch_edges(model, pairs, [("0", "2")])
    assert torch.equal(im.patch_edges(model, pairs, [("0", "2", p) for p in range(9)]), whole)


def test_layers_may_be_named_by_their_number():
    model, pairs = golden.odd_model(), golden.random_pairs("odd")
    assert torch.equal(im.patch_edges(model, pairs, [(0, 2)]), im.patch_edges(model, pairs, [("0", "2")]))


def test_permuting_the_pairs_permutes_the_logits():
    model, pairs = golden.model(), golden.golden_pairs()
    order = torch.tensor([3, 0, 4, 1, 2])
    edges = [("embed", "1"), ("0", "3", 7), ("2", "2", None, "ssm")]
    permuted, plain = im.patch_edges(model, pairs[order], edges), im.patch_edges(model, pairs, edges)
    rounding = logit_rounding(model, pairs.clean, pairs.corrupted)
    torch.testing.assert_close(permuted, plain[order], rtol=0, atol=rounding)


def test_ragged_pairs_are_patched_as_each_pair_alone_would_be():
    model, pairs = golden.model(), golden.random_pairs("golden", lengths=[9, 6, 8, 5])
    sets = [[Item("embed", "1"), Item("2", "2", None, "ssm")], [Item("1", "output")]]
    whole = patched(model, pairs, sets)
    rounding = logit_rounding(model, pairs.clean, pairs.corrupted)
    for row, length in enumerate(pairs.lengths.tolist()):
        one = pairs[[row]]
        alone = Pairs.from_tokens(one.clean[:, :length], one.corrupted[:, :length], one.answer, one.wrong)
        torch.testing.assert_close(whole[:, row], patched(model, alone, sets)[:, 0], rtol=0, atol=rounding)


@pytest.mark.parametrize(
    "edge",
    [
        ("1", "0"),
        ("1", "1"),
        ("0", "3"),
        ("embed", "nowhere"),
        ("embed", "1", 9),
        ("embed", "1", -1),
        ("0", "1", None, "ssm"),
        ("0", "0", None, "conv-3"),
        ("embed",),
        ("embed", "1", 2, None, 7),
        (),
    ],
)
def test_what_is_no_edge_is_refused(edge):
    with pytest.raises(InputError, match=r"is no edge|is not in this graph"):
        im.patch_edges(golden.odd_model(), golden.random_pairs("odd"), [edge])


def test_a_position_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="positions below 9"):
        im.patch_edges(golden.odd_model(), golden.random_pairs("odd"), [("embed", "1")], positions=[9])


# -- resumed ------------------------------------------------------------------------------------------------------


def drawn_sets(model, seed, n_sets, share):
    """Random sets of items at all positions and at single ones."""
    items = universe_of(model, parts=True).items() + universe_of(model, parts=True, n_positions=9).items()[5::11]
    drawn = torch.rand(n_sets, len(items), generator=torch.Generator().manual_seed(seed)) < share
    return [[item for item, chosen in zip(items, row, strict=True) if chosen] for row in drawn.tolist()]


@pytest.mark.parametrize("name", ["odd", "golden"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_runs_that_go_on_from_the_one_before_are_those_from_the_beginning(name, share):
    model, pairs = golden.opened(name), golden.random_pairs(name)
    universe, corrupted = universe_of(model, parts=True), corrupted_run(model, pairs, parts=True)
    common, *extra = drawn_sets(model, 3, 9, share)
    order = sorted(extra, key=len)
    begun = []
    _, before = patched_run(model, pairs, corrupted, masks_of([[]], universe, 9))
    for sets in ([common], *([[*common, *more]] for more in order), [[*common, *more] for more in order], [[]]):
        masks = masks_of(sets, universe, 9)
        begun.append(before.agrees_below(masks))
        got, before = patched_run(model, pairs, corrupted, masks, before)
        assert relative_error(got, patched_logits(model, pairs, corrupted, masks)) < 1e-5


@pytest.mark.parametrize("layer", range(4))
def test_a_set_is_run_from_the_layer_it_is_about(layer):
    model, pairs = golden.model(), golden.random_pairs("golden")
    universe, corrupted = universe_of(model, parts=True), corrupted_run(model, pairs, parts=True)
    removed = [Item("0", "2"), Item("1", "1", None, "conv0"), Item("2", "output")]
    _, before = patched_run(model, pairs, corrupted, masks_of([removed], universe, 9))
    for tested in (Item("embed", str(layer), 4), Item(str(layer), str(layer), None, "ssm")):
        sets = [[*removed, tested], removed]
        assert before.agrees_below(masks_of(sets, universe, 9)) == layer
        runs, masks = calls_of(model), masks_of(sets, universe, 9)
        got, _ = patched_run(model, pairs, corrupted, masks, before)
        assert runs() == list(range(layer, 4))
        assert relative_error(got, patched_logits(model, pairs, corrupted, masks)) < 1e-5


def test_layers_that_nobody_reads_are_not_run_until_somebody_does():
    model, pairs = golden.model(), golden.random_pairs("golden")
    universe, corrupted = universe_of(model, parts=True), corrupted_run(model, pairs, parts=True)
    unread = [Item("1", "2"), Item("1", "3"), Item("1", "output"), Item("1", "1", None, "skip")]
    masks = masks_of([unread], universe, 9)
    assert dropped_nodes(masks, nodes_of(model)) == [1]
    _, before = patched_run(model, pairs, corrupted, masks_of([[]], universe, 9))
    runs = calls_of(model)
    got, before = patched_run(model, pairs, corrupted, masks, before)
    assert runs() == [2, 3]
    assert relative_error(got, patched_logits(model, pairs, corrupted, masks)) < 1e-5
    for read_again in (unread[1:], [*unread[:2], unread[3]], [*unread[:1], Item("1", "3", 4), *unread[2:]]):
        masks = masks_of([read_again], universe, 9)
        got, after = patched_run(model, pairs, corrupted, masks, before)
        assert before.agrees_below(masks) == 1
        assert after.dropped == []
        assert relative_error(got, patched_logits(model, pairs, corrupted, masks)) < 1e-5


def calls_of(model):
    """A function that gives the layers whose mixer has run since, and stops listening."""
    ran, handles = [], []
    for i, block in enumerate(model._module.backbone.layers):
        hook = lambda *_, i=i: ran.append(i)
        handles.append(block.mixer.x_proj.register_forward_hook(hook))

    def finished():
        for handle in handles:
            handle.remove()
        return ran

    return finished
