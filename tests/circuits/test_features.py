"""Features of dictionaries as items of circuits: against writing values by hand, finite differences and whole passes."""

import dataclasses
import json

import golden
import pytest
import torch
from families.tiny import CONFIGS, model_of, pairs_of

import ioi_mamba as im
from ioi_mamba.circuits.dictionaries import channels
from ioi_mamba.circuits.faithfulness import random_circuits
from ioi_mamba.circuits.features import ERROR, Features, features_at, fingerprint
from ioi_mamba.circuits.graph import Circuit, Item, Masks, kind_of, masks_of, universe_of
from ioi_mamba.circuits.patching import corrupted_run, patched_logits
from ioi_mamba.circuits.scoring import Evaluator
from ioi_mamba.circuits.search import frontiers
from ioi_mamba.model.families import block_of, layers_with, sizes_of
from ioi_mamba.passes.metrics import logit_diff

N = 7


class Coder:
    """A dictionary by duck type: encode and decode, nothing else."""

    def __init__(self, width, out=None, n=N, seed=0):
        draw = torch.Generator().manual_seed(seed)
        self.into = torch.randn(width, n, generator=draw) / width**0.5
        self.back = torch.randn(n, out or width, generator=draw) / n**0.5
        self.rest = 0.1 * torch.randn(out or width, generator=draw)

    def encode(self, value):
        return torch.relu(value @ self.into.to(value))

    def decode(self, found):
        return found @ self.back.to(found) + self.rest.to(found)


def width(model, layer, site):
    return torch.Size(sizes_of(model).shape(block_of(model, layer).sites[site], 1, 1)).numel()


def at(model, layer, site, reads=None, seed=0):
    coder = Coder(width(model, layer, reads or site), width(model, layer, site), seed=seed)
    return features_at(model, layer, coder, site=site, reads=reads)


def by_hand(model, pairs, features, chosen, position=None):
    """The value of the site with these items taken from the corrupted run, from reads of both runs."""
    names = [f"blocks.{features.layer}.hook_{site}" for site in (features.reads, features.writes)]
    clean, corrupted = (im.read(model, tokens, names) for tokens in (pairs.clean, pairs.corrupted))
    flat = [[values[name].flatten(2) for name in names] for values in (clean, corrupted)]
    f, f_there = (features.coder.encode(read) for read, _ in flat)
    error, error_there = (
        value - features.coder.decode(found) for (_, value), found in zip(flat, (f, f_there), strict=True)
    )
    for item in chosen:
        if item == ERROR:
            error = error_there
        else:
            f = f.clone()
            f[..., item] = f_there[..., item]
    value = (features.coder.decode(f) + error).view_as(clean[names[1]])
    if position is not None:
        value = torch.where(
            torch.arange(value.shape[1]).view(-1, *[1] * (value.dim() - 2)) == position, value, clean[names[1]]
        )
    return names[1], value


@pytest.mark.parametrize("family", CONFIGS)
def test_features_and_error_are_the_site_and_some_of_them_what_is_put_together_by_hand(family):
    model, pairs = model_of(family), pairs_of()
    layer = layers_with(model, "h")[-1]
    clean = im.run(model, pairs.clean)
    for site, reads in (("ssm_input", None), ("ssm_write", None), ("out_proj", None), ("out_proj", "layer_input")):
        features = at(model, layer, site, reads)
        name, node = f"blocks.{layer}.hook_{site}", features.node
        there = im.read(model, pairs.corrupted, [name])[name]
        tolerance = {"rtol": 0, "atol": 3e-5 * float(clean.abs().max())}
        everything = [(node, node, None, part) for part in features.parts]
        got = im.patch_edges(model, pairs, everything, features=[features])
        torch.testing.assert_close(got, im.run(model, pairs.clean, {name: there}), **tolerance)
        for chosen, position in (([1, 4], None), ([ERROR], None), ([2, ERROR], 7)):
            items = [(node, node, position, f"{features.name}.{item}") for item in chosen]
            got = im.patch_edges(model, pairs, items, features=[features])
            name, value = by_hand(model, pairs, features, chosen, position)
            torch.testing.assert_close(got, im.run(model, pairs.clean, {name: value}), **tolerance)
            assert (got - clean).abs().max() > 1e-3


def test_an_mlp_and_attention_have_features_too():
    model, pairs = model_of("jamba"), pairs_of()
    for layer in range(model.config.num_hidden_layers):
        for writer in block_of(model, layer).all_writers():
            features = at(model, layer, writer.adds, writer.reads)
            name = f"blocks.{layer}.hook_{writer.adds}"
            there = im.read(model, pairs.corrupted, [name])[name]
            everything = [(features.node, features.node, None, part) for part in features.parts]
            got = im.patch_edges(model, pairs, everything, features=[features])
            want = im.run(model, pairs.clean, {name: there})
            torch.testing.assert_close(got, want, rtol=0, atol=3e-5 * float(want.abs().max()))


def effects(model, pairs, universe, features, share):
    """What patching each item by a share does to the normalized logit diff, [item, pair]."""
    items = [item for item in universe.items() if item.part and "." in item.part]
    sets = masks_of([[], *([item] for item in items)], universe, pairs.clean.shape[1])
    corrupted = corrupted_run(model, pairs, parts=False, features=features)
    logits = patched_logits(model, pairs, corrupted, Masks(*(share * mask for mask in sets)))
    differences = logit_diff(logits, pairs.answer, pairs.wrong)
    ends = differences[0] - logit_diff(corrupted.logits, pairs.answer, pairs.wrong)
    return items, (differences[1:] - differences[0]) / ends.abs() / share


@pytest.mark.parametrize("family", ["mamba", "bamba", "falcon_h1"])
def test_a_score_is_the_slope_of_the_effect_and_the_scores_of_a_dictionary_sum_to_that_of_the_site(family):
    model, pairs = model_of(family, "float64"), pairs_of()
    layer = layers_with(model, "h")[0]
    features = [at(model, layer, "ssm_input"), at(model, layer, "out_proj", "layer_input", seed=3)]
    universe = universe_of(model, features=features)
    # Half way between two finite differences the curve drops out; norms of the stock model round as float32.
    items, ahead = effects(model, pairs, universe, features, 1e-2)
    _, behind = effects(model, pairs, universe, features, -1e-2)
    slopes = (ahead + behind) / 2
    table = im.attribute(model, pairs, method="eap", features=features, per_pair=True).table
    scores = table[table["part"].notna()]["score"].to_numpy().reshape(len(items), len(pairs))
    assert [item.part for item in items] == list(dict.fromkeys(table["part"].dropna()))
    assert (torch.tensor(scores) - slopes).abs().max() < 1e-2 * slopes.abs().max()
    plain = [
        features_at(model, each.layer, channels(width(model, each.layer, each.writes)), site=each.writes)
        for each in features
    ]
    for each, whole in zip(features, plain, strict=True):
        of_site = im.attribute(model, pairs, method="eap", features=[whole]).table
        of_features = im.attribute(model, pairs, method="eap", features=[each]).table
        totals = [found[found["part"].notna()]["score"].sum() for found in (of_site, of_features)]
        assert totals[0] == pytest.approx(totals[1], rel=1e-4)
        assert abs(totals[0]) > 1e-3


def test_features_do_not_change_what_edges_and_parts_score_under_any_variant():
    model, pairs = model_of("mamba"), pairs_of()
    features = [at(model, 1, "ssm_input"), at(model, 1, "delta"), at(model, 2, "after_skip"), at(model, 2, "y")]
    for variant in ("paper", "detached", "clean-difference", "relp"):
        plain = im.attribute(model, pairs, variant=variant, parts=True).table
        found = im.attribute(model, pairs, variant=variant, parts=True, features=features).table
        both = found[: len(plain)]
        assert (both["score"] - plain["score"]).abs().max() < 1e-5 * plain["score"].abs().max()
        assert found[len(plain) :]["score"].abs().max() > 1e-4


def test_they_are_scored_at_positions_and_by_exact_patching():
    model, pairs = model_of("mamba"), pairs_of()
    features = [at(model, 1, "out_proj")]
    at_positions = im.attribute(model, pairs, method="eap", positions=True, features=features).table
    summed = at_positions[at_positions["part"].notna()].groupby("part", sort=False)["score"].sum()
    whole = im.attribute(model, pairs, method="eap", features=features).table.dropna(subset="part").set_index("part")
    assert (summed - whole["score"]).abs().max() < 1e-5
    exact = im.attribute(model, pairs, method="exact", features=features).table
    items, by_hand_ = effects(model, pairs, universe_of(model, features=features), features, 1.0)
    got = exact[exact["part"].notna()]["score"].to_numpy()
    torch.testing.assert_close(torch.tensor(got).double(), by_hand_.mean(1).double(), rtol=1e-4, atol=1e-6)
    assert len(items) == N + 1


def test_a_resumed_pass_with_features_is_the_whole_pass():
    model, pairs = golden.model(), golden.golden_pairs()
    features = [at(model, 1, "ssm_input"), at(model, 2, "out_proj", seed=4)]
    universe = universe_of(model, parts=True, features=features)
    draw = torch.Generator().manual_seed(0)
    items = universe.items()
    sets = [[item for item in items if torch.rand((), generator=draw) < 0.4] for _ in range(4)]
    sets += [[Item("2", "2", None, "out_proj.3")], [Item("1", "1", None, "ssm_input.error")], []]
    for group in (sets, sets[::-1]):
        fast, slow = (Evaluator(model, pairs, universe, resume=resume) for resume in (True, False))
        for each in group:
            one, other = (evaluator.scores([each])["logit_diff"] for evaluator in (fast, slow))
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_they_are_searched_in_groups_after_what_follows_them_in_the_pass():
    model, pairs = golden.model(), golden.golden_pairs()
    features = [at(model, 1, site) for site in ("ssm_input", "out_proj", "y", "layer_input")]
    universe = universe_of(model, parts=True, features=features)
    of_layer = [
        [item.part for item in group] for group in frontiers(universe) if group[0].source == group[0].target == "1"
    ]
    assert [group[0] for group in of_layer] == ["out_proj.0", "y.0", "ssm", "ssm_input.0", "conv-3", "layer_input.0"]
    assert sum(map(len, frontiers(universe))) == universe.size() == len(set(universe.items()))
    found = im.acdc(model, pairs, threshold=0.02, features=features[:2], test_mode=True)
    assert found.circuit().universe.features == tuple(features[:2])
    own = found.table[found.table["part"].fillna("").str.contains(".", regex=False)]
    assert len(own) == 2 * (N + 1)
    again = im.evaluate(model, pairs, found.circuit())
    assert again["normalized_logit_diff"] == pytest.approx(found.table.attrs["score"], abs=1e-4)


def test_a_search_of_a_hybrid_and_of_features_is_resumed(tmp_path):
    model, pairs = model_of("bamba"), pairs_of()
    features = [at(model, 0, "out_proj")]
    first = im.acdc(model, pairs, threshold=0.1, features=features, checkpoint=tmp_path / "search.json")
    again = im.acdc(model, pairs, threshold=0.1, features=features, checkpoint=tmp_path / "search.json")
    assert again.table.attrs["tests"] == first.table.attrs["tests"]
    assert again.table.equals(first.table)
    other = [at(model, 0, "out_proj", seed=9)]
    with pytest.raises(im.InputError, match="belongs to another search"):
        im.acdc(model, pairs, threshold=0.1, features=other, checkpoint=tmp_path / "search.json")


def test_a_circuit_of_features_is_saved_with_a_hash_of_its_dictionaries(tmp_path):
    model = golden.model()
    features = [at(model, 2, "out_proj")]
    universe = universe_of(model, parts=True, features=features)
    circuit = Circuit(frozenset({Item("2", "2", None, "out_proj.5"), Item("2", "2", None, "ssm")}), universe)
    circuit.save(tmp_path / "c")
    assert Circuit.load(tmp_path / "c", features).items == circuit.items
    kept = json.loads((tmp_path / "c.json").read_text())["universe"]["features"]
    assert kept == [
        {
            "node": "2",
            "reads": "out_proj",
            "writes": "out_proj",
            "n": N,
            "name": "out_proj",
            "sha256": fingerprint(features[0].coder),
        }
    ]
    for others in ((), [at(model, 2, "out_proj", seed=1)]):
        with pytest.raises(im.InputError, match="give the same ones"):
            Circuit.load(tmp_path / "c", others)
    table = circuit.to_frame().assign(kept=True)
    assert Circuit.from_frame(table, model, features).items == circuit.items
    assert kind_of(Item("2", "2", None, "out_proj.5")) == "out_proj features"
    assert kind_of(Item("2", "2", None, "out_proj.error")) == "out_proj.error"
    assert all(each.kinds() == circuit.kinds() for each in random_circuits(circuit, 3))
    assert circuit.chart().to_dict()
    with pytest.raises(im.InputError, match=r"out_proj\.0 to out_proj\.error in node 2"):
        universe.check([Item("1", "0")])


class NoDecoder:
    def encode(self, value):
        return value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 9}, "layer is 9: the model has layers 0 to 3"),
        ({"site": "resid_post"}, "no site 'resid_post' with features"),
        ({"site": "h"}, "no site 'h' with features"),
        ({"site": "A"}, "no site 'A' with features"),
        ({"site": "in_proj", "reads": "y"}, "cannot read 'y', which comes after"),
        ({"coder": NoDecoder()}, "NoDecoder is no dictionary"),
        ({"site": "ssm_input"}, "cannot encode and decode 'ssm_input' of block 1, 128 wide"),
        ({"coder": Coder(64, 32)}, "decodes to 32 numbers, and 'out_proj' of block 1 has 64"),
    ],
)
def test_what_cannot_be_split_is_refused(arguments, message):
    model = golden.model()
    given = {"layer": 1, "coder": Coder(64), "site": "out_proj"} | arguments
    with pytest.raises(im.InputError, match=message):
        features_at(model, **given)


def test_two_dictionaries_of_one_site_need_names_and_features_of_another_model_are_refused():
    model, pairs = golden.model(), golden.golden_pairs()
    one = at(model, 1, "out_proj")
    with pytest.raises(im.InputError, match="two dictionaries called out_proj"):
        universe_of(model, features=[one, at(model, 1, "out_proj", seed=2)])
    both = [one, dataclasses.replace(at(model, 1, "out_proj", seed=2), name="others")]
    there = im.read(model, pairs.corrupted, ["blocks.1.hook_out_proj"])
    everything = [("1", "1", None, part) for each in both for part in each.parts]
    got = im.patch_edges(model, pairs, everything, features=both)
    torch.testing.assert_close(got, im.run(model, pairs.clean, there), rtol=1e-4, atol=1e-4)
    with pytest.raises(im.InputError, match="are no features"):
        im.attribute(model, pairs, features=[Coder(64)])
    with pytest.raises(im.InputError, match=r"is a part of a layer|is no edge forward"):
        im.patch_edges(model, pairs, [("1", "1", None, f"out_proj.{N}")], features=[one])
    elsewhere = dataclasses.replace(one, node="7")
    with pytest.raises(im.InputError, match="node 7, which this model has not"):
        Evaluator(model, pairs, universe_of(model, features=[elsewhere]))
    assert isinstance(one, Features)
