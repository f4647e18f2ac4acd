"""The experiments on what the paper left open: token-flow and decoding, against sums and slow ways to the same numbers."""

from dataclasses import replace

import conftest  # noqa: F401  sets the environment before transformers is imported
import golden
import pytest
import torch
from families.tiny import CONFIGS, model_of, pairs_of

import ioi_mamba as im
from ioi_mamba import analyses
from ioi_mamba.analyses._roles import OTHER, by_role, means
from ioi_mamba.analyses.decoding import exchanged_names
from ioi_mamba.circuits.decoding import RIDGE, direct_attribution, exchanged, logit_lens, tuned_lens
from ioi_mamba.circuits.graph import universe_of
from ioi_mamba.circuits.patching import nodes_of, source_hooks
from ioi_mamba.model.families import family_of, layers_with
from ioi_mamba.passes.metrics import logit_diff
from ioi_mamba.tasks import ioi


@pytest.fixture(scope="module")
def mini():
    return im.open_model("mini", device="cpu")


@pytest.fixture(scope="module")
def pairs(mini):
    """Of several templates, so of several layouts."""
    return ioi.generate(mini.tokenizer, 6, 3)


def with_roles(pairs):
    n = len(pairs)
    roles = {"BOS": torch.zeros(n).long(), "n1": torch.full((n,), 4), "n2": torch.full((n,), 7), "out": pairs.last}
    return replace(pairs, roles=roles)


# -- token-flow ---------------------------------------------------------------------------------------------------


def test_flows_by_role_sum_to_the_parts_of_the_same_pass(mini, pairs):
    table = analyses.load("token-flow")(mini, pairs)
    whole = im.attribute(mini, pairs, method="eap", parts=True, per_pair=True).table
    for layer in (0, 6):
        of_layer = whole[(whole["source"] == str(layer)) & whole["part"].notna()].groupby("part")["score"].sum()
        mine = table[table["layer"] == layer]
        total = (mine["score"] * mine["n"]).groupby(mine["path"]).sum()
        assert total["state"] == pytest.approx(of_layer["ssm"], rel=1e-3, abs=1e-5)
        assert total["conv"] == pytest.approx(of_layer.filter(like="conv").sum(), rel=1e-3, abs=1e-5)


def test_a_cell_is_the_mean_over_the_prompts_that_have_both_roles(mini, pairs):
    labels, layouts = by_role(pairs)
    assert len(layouts) > 1
    assert labels[0] == "BOS"
    assert labels[-1] == OTHER
    sums = []
    for part, _, _ in layouts:
        for k in range(len(part)):
            flows = im.token_flow(mini, part[[k]], layers=[6])
            s, t = (int(part.roles[role][k]) for role in ("n1", "out"))
            sums.append(float(flows[(flows["source"] == s) & (flows["target"] == t)]["score"].iloc[0]))
    table = analyses.load("token-flow")(mini, pairs)
    row = table[
        (table["layer"] == 6) & (table["path"] == "state") & (table["source"] == "n1") & (table["target"] == "out")
    ]
    assert row["score"].iloc[0] == pytest.approx(sum(sums) / len(sums), rel=1e-4, abs=1e-6)
    assert row["n"].iloc[0] == len(sums) == len(pairs)


def test_nothing_flows_backwards_and_every_token_has_one_label(mini, pairs):
    labels, (few,) = by_role(with_roles(pairs_of()))
    assert few.at.sum(1).tolist() == [1, 1, 1, 1, few.at.shape[1] - 4]
    labels, layouts = by_role(pairs)
    for part, _, at in layouts:
        assert torch.equal(at.sum(0), torch.ones(part.clean.shape[1]))
        assert at[0].nonzero().flatten().tolist() == [0]
        assert at[labels.index("n2"), int(part.roles["n2"][0])] == 1
        assert at[-1].sum() == part.clean.shape[1] - len({int(where[0]) for where in part.roles.values()} | {0})
    table = analyses.load("token-flow")(mini, layouts[0].pairs)
    named = table[(table["source"] != OTHER) & (table["target"] != OTHER)]
    assert (named["source_place"] <= named["target_place"]).all()
    assert set(named["path"]) == {"conv", "state"}


@pytest.mark.parametrize("family", ["mamba", "mamba2", "bamba"])
def test_exact_flows_are_patched_one_by_one_and_nothing_else(family):
    model, given = model_of(family), with_roles(pairs_of(2))
    table = analyses.load("token-flow")(model, given, method="exact")
    layer = layers_with(model, "h")[-1]
    (node,) = [each for each in universe_of(model).mixers if each.partition(".")[0] == str(layer)]
    ends = [
        logit_diff(model._module(side, use_cache=False).logits[:, -1], given.answer, given.wrong)
        for side in (given.clean, given.corrupted)
    ]

    def effect(logits):
        return float(
            ((logit_diff(logits[:, -1], given.answer, given.wrong) - ends[0]) / (ends[0] - ends[1]).abs()).mean()
        )

    wanted = {("state", "n1", "n2"): im.patch_flow(model, given, [(layer, 4, 7)])}
    wanted |= {("conv", "n1", "n1"): im.patch_edges(model, given, [(node, node, 4, "conv0")])}
    for (path, source, target), logits in wanted.items():
        at = (
            (table["layer"] == layer)
            & (table["path"] == path)
            & (table["source"] == source)
            & (table["target"] == target)
        )
        assert table[at]["score"].iloc[0] == pytest.approx(effect(logits), rel=1e-3, abs=1e-5)


def test_means_are_those_of_the_rows_that_are_there():
    values = torch.tensor([[1.0, 3.0, torch.nan], [torch.nan] * 3, [2.0, 2.0, 5.0]])
    found = means(values, torch.arange(3))
    assert found[1] is None
    assert (found[0].value, found[0].n) == (2.0, 2)
    assert (found[2].value, found[2].n) == (3.0, 3)
    assert found[0].low < 2 < found[0].high


# -- decoding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_what_the_nodes_add_sums_to_the_logit_difference_and_a_mixers_parts_to_its_node(family):
    model, given = model_of(family), pairs_of()
    found = direct_attribution(model, given)
    want = logit_diff(im.run(model, given.clean)[:, -1], given.answer, given.wrong)
    assert torch.allclose(found["logit_diff"], want, atol=1e-5)
    assert torch.allclose(found["nodes"].sum(0), want, atol=1e-5)
    of_mixers = found["nodes"][1:][[node.mixer for node in nodes_of(model)]]
    assert torch.allclose(found["state"].sum(1) + found["skip"], of_mixers, atol=1e-5)


def test_a_nodes_share_is_what_the_head_makes_of_it_under_the_clean_scale():
    model, given = model_of("falcon_h1"), pairs_of()
    names = source_hooks(nodes_of(model))
    end = f"blocks.{model.config.num_hidden_layers - 1}.hook_resid_post"
    got = im.read(model, given.clean, [*names, end, "hook_norm"])
    scale = got["hook_norm"] / got[end]
    multiplier = getattr(model.config, family_of(model).tree.scaled)
    for name, found in zip(names, direct_attribution(model, given)["nodes"], strict=True):
        logits = multiplier * model._module.lm_head(scale * got[name])[:, -1]
        assert torch.allclose(found, logit_diff(logits, given.answer, given.wrong), atol=1e-4)


@pytest.mark.parametrize("family", ["mamba", "jamba", "zamba2"])
def test_the_lens_reads_each_stream_as_if_it_were_the_last(family):
    model, given = model_of(family), pairs_of()
    lens = logit_lens(model, given)
    tree, last = family_of(model).tree, model.config.num_hidden_layers - 1
    norm = model._module.get_submodule(tree.last_norm)
    for layer in range(last + 1):
        name = f"blocks.{layer}.hook_resid_post"
        logits = model._module.lm_head(norm(im.read(model, given.clean, [name])[name]))[:, -1]
        want = logit_diff(logits, given.answer, given.wrong)
        assert torch.allclose(lens[layer], want, atol=1e-4)


def through_the_end(model, streams, given):
    """The logit difference of streams [pair, pos, D], read by the last norm and the head."""
    norm = model._module.get_submodule(family_of(model).tree.last_norm)
    logits = model._module.lm_head(norm(streams))[torch.arange(len(given)), given.last]
    return logit_diff(logits, given.answer, given.wrong)


def test_a_tuned_lens_reads_each_half_by_the_map_that_is_nearest_on_the_other():
    model, given = golden.model(), golden.golden_pairs()
    given = replace(given, lengths=torch.tensor([20, 18, 20, 20, 19]))
    lens, n_layers = tuned_lens(model, given), model.config.num_hidden_layers
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(n_layers)]
    streams = im.read(model, given.clean, names)
    there = torch.arange(given.clean.shape[1]) <= given.last[:, None]
    half, D = given.clusters % 2, model.config.hidden_size
    for layer in (0, 2):
        for own in (0, 1):
            x, y = (streams[names[k]][half != own][there[half != own]].double() for k in (layer, n_layers - 1))
            one = torch.cat((x, torch.ones(len(x), 1)), 1)
            ridge = (RIDGE * x.pow(2).sum(0).mean()).sqrt() * torch.eye(D + 1)
            solved = torch.linalg.lstsq(torch.cat((one, ridge)), torch.cat((y - x, torch.zeros(D + 1, D)))).solution
            stream = streams[names[layer]][half == own].double()
            mapped = (stream + stream @ solved[:D] + solved[D]).float()
            want = through_the_end(model, mapped, given[half == own])
            assert torch.allclose(lens[layer][half == own], want, rtol=1e-3, atol=1e-3)
    assert torch.allclose(lens[-1], logit_lens(model, given)[-1], atol=1e-4)
    assert not torch.allclose(lens[0], logit_lens(model, given)[0], atol=1e-2)


def test_a_tuned_lens_that_is_given_is_what_reads():
    model, given = model_of("jamba"), pairs_of()
    plain = tuned_lens(model, given, translate=lambda stream, layer: stream)
    assert torch.equal(plain, logit_lens(model, given))
    name = "blocks.1.hook_resid_post"
    turned = tuned_lens(model, given, translate=lambda stream, layer: stream.flip(-1) * (layer + 1))
    stream = im.read(model, given.clean, [name])[name]
    assert torch.allclose(turned[1], through_the_end(model, stream.flip(-1) * 2, given), atol=1e-4)
    with pytest.raises(im.InputError, match="give pairs of different prompts"):
        tuned_lens(model, given[[0, 0]])


@pytest.mark.parametrize("family", ["mamba", "falcon_h1", "granitemoehybrid", "zamba"])
def test_a_nodes_output_at_the_last_token_is_that_of_the_other_prompts_and_nothing_else(family):
    model, given = model_of(family), pairs_of()
    nodes = universe_of(model).nodes[1:-1]
    names = source_hooks(nodes_of(model))[1:]
    found = exchanged(model, given, given.corrupted, nodes)
    there = im.read(model, given.corrupted, names)
    runs = [im.run(model, given.clean), im.run(model, given.corrupted)]
    for name in names:

        def last(value, name=name):
            value[:, -1] = there[name][:, -1]
            return value

        runs.append(im.run(model, given.clean, {name: last}))
    for got, logits in zip(found, runs, strict=True):
        want = logit_diff(logits[:, -1], given.answer, given.wrong)
        assert torch.allclose(got, want, atol=1e-4 * float(want.abs().max()) + 1e-4)
    assert float((found[2:] - found[0]).abs().max(1).values.min()) > 1e-3


def test_exchanged_names_keep_the_place_or_the_answer(mini, pairs):
    seen = 0
    for part in pairs.layouts():
        got = exchanged_names(part)
        seen += len(got["rows"])
        for k, row in enumerate(got["rows"].tolist()):
            clean, answer, other = part.clean[row].tolist(), int(part.answer[row]), int(got["other name"][k])
            assert clean.count(answer) == 1
            assert clean.count(other) > 1
            identity, place = got["identity"][k].tolist(), got["place"][k].tolist()
            assert [{answer: other, other: answer}.get(token, token) for token in clean] == identity
            assert identity.index(other) == clean.index(answer)
            assert place.index(answer) == clean.index(other)
            assert [a != b for a, b in zip(place, clean, strict=True)].count(True) == 2
            assert place.count(answer) == 1
    assert seen == len(pairs)
    assert not len(exchanged_names(golden.golden_pairs())["rows"])
    assert exchanged_names(golden.golden_pairs())["place"].shape == (0, 20)


def test_decoding_of_mini_names_the_layer_that_writes_the_answer_and_who_reads_it(mini, pairs):
    experiment = analyses.load("decoding")
    table = experiment(mini, pairs)
    direct = table[table["what"] == "direct"]
    logits = im.run(mini, pairs.clean)[torch.arange(len(pairs)), pairs.last]
    want = float(logit_diff(logits, pairs.answer, pairs.wrong).mean())
    assert direct["contribution"].sum() == pytest.approx(want, rel=1e-4)
    assert table["bottleneck"].iloc[0] == 6
    carried = table[(table["what"] == "carried") & (table["way"] == "from bottleneck") & (table["layer"] == 7)]
    patched = im.patch_edges(mini, pairs, [("6", "7")])[torch.arange(len(pairs)), pairs.last]
    lost = want - float(logit_diff(patched, pairs.answer, pairs.wrong).mean())
    assert carried["contribution"].iloc[0] == pytest.approx(lost, rel=1e-3)
    assert any("layer 6" in sentence for sentence in experiment.findings(table))
    moved = table[(table["what"] == "exchanged") & (table["part"] == "all")].set_index("way")["contribution"]
    some = [exchanged_names(part) for part in pairs.layouts()]
    ends = []
    for part, got in zip(pairs.layouts(), some, strict=True):
        for side in (part.clean[got["rows"]], got["identity"]):
            logits = im.run(mini, side)[:, -1]
            ends.append(logit_diff(logits, part.answer[got["rows"]], got["other name"]))
    lost = torch.cat(ends[::2]) - torch.cat(ends[1::2])
    assert moved["identity"] == pytest.approx(float(lost.mean()), rel=1e-3)
    tuned = table[table["what"] == "tuned lens"]["contribution"]
    assert tuned.iloc[-1] == pytest.approx(want, rel=1e-3)
    with pytest.raises(im.InputError, match="layer is 8"):
        experiment(mini, pairs, layer=8)


@pytest.mark.parametrize("name", ["token-flow", "decoding"])
def test_they_run_and_are_drawn_for_prompts_without_roles_and_for_a_model_of_random_weights(name):
    experiment = analyses.load(name)
    for model, given in ((golden.model(), golden.golden_pairs()), (model_of("zamba"), pairs_of())):
        table = experiment(model, given)
        assert experiment.findings(table)
        experiment.chart(table).to_dict()
