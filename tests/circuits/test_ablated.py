"""Kinds of ablation of edges, parts and flows: each against a pass in which the value is written by hand."""

from dataclasses import replace

import conftest  # noqa: F401  sets the environment before transformers is imported
import golden
import pytest
import torch
from conditioning import effect_rounding, logit_rounding, widest
from families.tiny import model_of, pairs_of

import ioi_mamba as im
from ioi_mamba.circuits import flow
from ioi_mamba.circuits.flow import flow_scores
from ioi_mamba.circuits.graph import Circuit, Item, universe_of
from ioi_mamba.circuits.methods import Options
from ioi_mamba.circuits.patching import nodes_of, parts_of, source_hooks
from ioi_mamba.circuits.scoring import Evaluator
from ioi_mamba.model.families import layers_with
from ioi_mamba.passes.ablations import ABLATIONS, Ablation
from ioi_mamba.passes.cross_talk import NO_LAYER, SCANNED, search
from ioi_mamba.passes.metrics import accuracy, logit_diff


@pytest.fixture(scope="module")
def pairs():
    """Prompts of two lengths, with a role at other places in each."""
    lengths = torch.tensor([9, 7, 9, 7, 9])
    found = golden.random_pairs("golden", n_pairs=5, n_pos=9, lengths=lengths)
    roles = {"n1": torch.tensor([2, 3, 2, 3, 2]), "n2": torch.tensor([5, 4, 5, 4, 5])}
    return im.Pairs.from_tokens(found.clean, found.corrupted, found.answer, found.wrong, lengths=lengths, roles=roles)


def by_hand(values, pairs, kind):
    """What is written in place of values [pair, pos, ...]: means cell by cell, from their definition."""
    if kind == "zero":
        return torch.zeros_like(values)
    out = values.clone()
    label = lambda row, p: next((r for r, at in pairs.roles.items() if at[row] == p), "BOS" if p == 0 else "other")
    cells = [(row, p) for row in range(len(pairs)) for p in range(int(pairs.last[row]) + 1)]
    for row, p in cells:
        same = [
            (r, q)
            for r, q in cells
            if (
                label(r, q) == label(row, p)
                if kind == "mean-by-role"
                else (q == p and pairs.last[r] == pairs.last[row])
            )
        ]
        out[row, p] = torch.stack([values[cell] for cell in same]).mean(0)
    return out


def last_logits(logits, pairs):
    return logits[torch.arange(len(pairs)), pairs.last]


@pytest.mark.parametrize("kind", ["mean", "mean-by-role", "zero"])
def test_all_edges_out_of_a_node_are_its_output_written_everywhere(pairs, kind):
    model, universe = golden.model(), universe_of(golden.model())
    hooks = source_hooks(nodes_of(model))
    for name, node in zip(hooks[:3], universe.nodes, strict=False):
        values = im.read(model, pairs.clean, name)[name]
        want = last_logits(im.run(model, pairs.clean, {name: by_hand(values, pairs, kind)}), pairs)
        edges = [(item.source, item.target) for item in universe.items() if item.source == node]
        got = last_logits(im.patch_edges(model, pairs, edges, ablation=kind), pairs)
        rounding = logit_rounding(model, pairs.clean)
        assert (want - last_logits(im.run(model, pairs.clean, {}), pairs)).abs().max() > 10 * rounding
        torch.testing.assert_close(got, want, rtol=0, atol=rounding)


@pytest.mark.parametrize("kind", ["mean", "zero"])
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_a_part_is_its_own_value_written_everywhere(family, kind):
    model, few = model_of(family), pairs_of(4)
    layer, rounding = 1, logit_rounding(model, few.clean)
    for part in parts_of(model):
        name = f"blocks.{layer}.hook_{part.own}"
        values = im.read(model, few.clean, name)[name]
        want = im.run(model, few.clean, {name: by_hand(values, few, kind)})
        got = im.patch_edges(model, few, [(str(layer), str(layer), None, part.name)], ablation=kind)
        torch.testing.assert_close(got, want, rtol=0, atol=rounding)
        assert (want - im.run(model, few.clean, {})).abs().max() > 10 * rounding


@pytest.mark.parametrize("family", ["mamba", "mamba2", "bamba"])
def test_a_flow_that_is_knocked_out_is_left_out_of_the_sum(family):
    model, few = model_of(family), pairs_of(2)
    layer, target = layers_with(model, "h")[-1], 6
    name, rounding = f"blocks.{layer}.hook_y", logit_rounding(model, few.clean)

    def emptied(y):
        y[:, target] = 0
        return y

    flows = [(layer, source, target) for source in range(target + 1)]
    got = im.patch_flow(model, few, flows, ablation="zero")
    torch.testing.assert_close(got, im.run(model, few.clean, {name: emptied}), rtol=0, atol=rounding)
    alone = [im.patch_flow(model, few, [flow], ablation="zero") - im.run(model, few.clean, {}) for flow in flows]
    assert sum(float(moved.abs().max()) > 10 * rounding for moved in alone) > 1


def shrunk(kind, by=1e-4):
    """A kind that goes only a small part of the way, so that its exact effects are gradients."""
    whole = ABLATIONS[kind]
    towards = lambda clean, *others: clean + by * (whole.written(clean, *others) - clean)
    return Ablation(f"little {kind}", "a little of it", towards, over=whole.over, draws=whole.draws)


@pytest.mark.parametrize("kind", ["mean", "zero", "noise"])
def test_gradient_scores_are_what_a_little_of_the_ablation_does(pairs, kind):
    model = golden.model("float64")
    table = im.attribute(model, pairs, method="eap", parts=True, ablation=kind).table
    little = im.attribute(model, pairs, method="exact", parts=True, ablation=shrunk(kind)).table
    got, want = table["score"].to_numpy(), little["score"].to_numpy() / 1e-4
    assert abs(want).max() > 1e-3
    assert abs(got - want).max() < 0.01 * abs(want).max()


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_gradient_scores_of_flows_are_what_a_little_of_a_knockout_does(family):
    model, few, by = model_of(family, dtype="float64"), pairs_of(2), 0.02
    scores = flow_scores(model, few, [1], False, "eap", ablation="zero")[0, 0]
    n, heads, kind = few.clean.shape[1], 4 if family == "mamba2" else 1, ABLATIONS["zero"]
    # The same kernel in all passes, so that a small difference is not one of rounding.
    nothing = {1: torch.zeros(1, heads, n, n).double()}
    swapped = replace(few, clean=few.corrupted)
    ends = [flow._patched(model, of, nothing, kind)[:, -1] for of in (few, swapped)]
    clean, corrupted = (logit_diff(logits, few.answer, few.wrong) for logits in ends)
    found = {}
    for source, target in ((0, 3), (4, 4), (4, 10), (7, 9)):
        weight = torch.zeros_like(nothing[1])
        weight[:, :, target, source] = by
        both = [flow._patched(model, few, {1: sign * weight}, kind)[:, -1] for sign in (1, -1)]
        more, less = (logit_diff(logits, few.answer, few.wrong) for logits in both)
        moved = (more - less) / (clean - corrupted).abs() / (2 * by)
        found[source, target] = (scores[target, source].double(), moved.double())
    got, want = (torch.stack(each) for each in zip(*found.values(), strict=True))
    torch.testing.assert_close(got, want, rtol=0, atol=0.01 * float(want.abs().max()))


@pytest.mark.parametrize("kind", ["mean-by-role", "zero", "noise"])
def test_nothing_kept_is_everything_ablated_and_how_pairs_are_cut_changes_nothing(pairs, kind):
    model, universe = golden.model(), universe_of(golden.model(), parts=True)
    sets = [[], universe.items(), universe.items()[::2]]
    whole = Evaluator(model, pairs, universe, ablation=kind)
    scores = whole.scores(sets)
    assert whole.faithfulness(scores["logit_diff"])[:2].tolist() == pytest.approx([1, 0], abs=1e-4)
    resampled = Evaluator(model, pairs, universe).scores(sets)
    assert not torch.allclose(scores["logit_diff"][2], resampled["logit_diff"][2], atol=1e-3)
    rounding = effect_rounding(model, pairs)
    for options in ({"rows": 2}, {"keep_mib": 0}):
        got = Evaluator(model, pairs, universe, ablation=kind, **options).scores(sets)
        torch.testing.assert_close(got["logit_diff"], scores["logit_diff"], rtol=rounding, atol=rounding)
    one, two = (
        im.attribute(model, pairs, parts=True, ablation=kind, pairs_per_pass=n).table["score"].to_numpy()
        for n in (2, 5)
    )
    assert abs(one - two).max() < rounding * max(1, abs(one).max())


@pytest.mark.parametrize("kind", ["zero"])
def test_a_search_removes_untested_only_what_nobody_reads(kind):
    """Of other kinds than resample a layer that reads nothing of the prompt still differs from what is written there."""
    model = golden.model()
    few = widest(model, golden.golden_pairs())
    found = im.acdc(model, few, threshold=0.05, ablation=kind, test_mode=True)
    kept = found.circuit()
    score = im.evaluate(model, few, kept, ablation=kind)["normalized_logit_diff"]
    assert found.table.attrs["score"] == pytest.approx(score, abs=1e-4)
    assert kept.pruned(from_embed=False) == kept
    assert Circuit(frozenset({Item("0", "output")}), universe_of(model)).pruned(from_embed=False).items
    assert not Circuit(frozenset({Item("0", "output")}), universe_of(model)).pruned().items


def test_layers_without_cross_talk_by_zero_give_nothing_from_any_token():
    model, few = golden.model(), golden.golden_pairs()
    found = search(model, few, 1.0, None, ABLATIONS["zero"])
    n_layers = 4
    off = {f"blocks.{i}.hook_{site}": 0.0 for i in range(n_layers) for site in SCANNED}
    for row in found[: 1 + n_layers].tolist():
        step, layer, share = int(row[0]), int(row[1]), row[2]
        edits = off if layer == NO_LAYER else {k: v for k, v in off.items() if not k.startswith(f"blocks.{layer}.")}
        logits = last_logits(im.run(model, few.clean, edits), few)
        assert step == (0 if layer == NO_LAYER else 1)
        assert share == pytest.approx(float(accuracy(logits, few.answer, few.choices).double().mean()))


def test_kinds_that_mean_nothing_are_refused_in_a_sentence(pairs):
    model = golden.model()
    bare = pairs_of()
    with pytest.raises(im.InputError, match=r"cannot be ablated by mean.* by resample or by zero"):
        im.patch_flow(model, golden.golden_pairs(), [(0, 1, 2)], ablation="mean")
    for work in (
        lambda: im.attribute(model, bare, ablation="mean-by-role"),
        lambda: Evaluator(model, bare, universe_of(model), ablation="mean-by-role"),
        lambda: im.patch_edges(model, bare, [("0", "1")], ablation="mean-by-role"),
    ):
        with pytest.raises(im.InputError, match="no roles to take a mean over: ablate by mean"):
            work()
    with pytest.raises(im.InputError, match="ablation 'zeros' is unknown: did you mean 'zero'"):
        im.attribute(model, pairs, ablation="zeros")
    assert Options().ablation == "resample"
