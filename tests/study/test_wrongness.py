"""Nothing wrong passes in silence: edits that could not take effect, scores that are no numbers, equal names."""

import golden
import pytest
import torch
from conditioning import assert_same_effects, widest
from conftest import VOCAB

import ioi_mamba as im
from ioi_mamba.analyses import (
    cross_talk,
    layer_ablation,
    layer_removal,
    output_ablation,
    state_ablation,
    state_similarity,
)
from ioi_mamba.circuits.graph import Item, universe_of
from ioi_mamba.circuits.scoring import Evaluator
from ioi_mamba.errors import InputError
from ioi_mamba.passes.forward import forward
from ioi_mamba.passes.sweep import Roll, resample_sweep, swept_logit_diffs
from ioi_mamba.tasks.base import Pairs

TOKENS = golden.golden_pairs().clean
RAN_PAST = "can be neither read nor written any more: the model has run past it"


def late(first, second, between=None):
    """A trace in which two mixers are opened, each (layer, site), and the second is written to."""
    model = golden.model()
    with model.trace(TOKENS, use_cache=False):
        with im.mixer(model, first[0]) as m:
            setattr(m, first[1], getattr(m, first[1]) * 0.5)
        if between == "logits":
            seen = model.output.logits.save()  # noqa: F841  asking for it is what makes the model run
        if between == "skip":
            model.backbone.layers[second[0]].skip(model.backbone.layers[second[0]].input)
        with im.mixer(model, second[0]) as m:
            setattr(m, second[1], getattr(m, second[1]) * 0)


@pytest.mark.parametrize(
    ("first", "second", "between"),
    [
        ((2, "y"), (1, "B_bar"), None),
        ((1, "y"), (1, "y"), None),
        ((1, "after_skip"), (1, "h_start"), None),
        ((1, "ssm_input"), (1, "conv"), None),
        ((1, "y"), (1, "C"), None),
        ((1, "resid_post"), (1, "resid_pre"), None),
        ((1, "y"), (2, "y"), "logits"),
        ((1, "y"), (2, "y"), "skip"),
    ],
    ids=[
        "layers turned about",
        "twice",
        "after the scan",
        "after the conv",
        "an earlier stage",
        "the block's end",
        "after the logits",
        "a layer that is skipped",
    ],
)
def test_an_edit_that_the_model_has_run_past_is_refused_by_site_and_layer(first, second, between, tried):
    with pytest.raises(InputError, match=rf"blocks\.{second[0]}\.hook_{second[1]} {RAN_PAST}"):
        late(first, second, between)
    tried("an edit that comes too late", 1)


def test_an_edit_handed_back_after_a_later_layer_ran_is_refused_by_site_and_layer(tried):
    model = golden.model()

    def nested():
        with model.trace(TOKENS, use_cache=False):
            with im.mixer(model, 1) as outer, im.mixer(model, 2) as inner:
                outer.y = outer.y * 0
                inner.y = inner.y * 0.5
            model.output.logits.save()

    with pytest.raises(InputError, match=rf"blocks\.1\.hook_y {RAN_PAST}"):
        nested()
    tried("an edit that comes too late", 1)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("blocks.1.hook_h.2", "blocks.1.hook_h.02"),
        ("blocks.1.hook_conv_slice.0", "blocks.1.hook_conv_slice.-0"),
        ("blocks.1.hook_y", "blocks.01.hook_y"),
    ],
)
def test_two_names_of_one_value_are_refused_since_one_would_be_lost(name, other, tried):
    with pytest.raises(InputError, match="are the same value: give it once"):
        im.run(golden.model(), TOKENS, {name: lambda x: x * 0, other: lambda x: x})
    with pytest.raises(InputError, match="are the same value: give it once"):
        im.read(golden.model(), TOKENS, [name, other])
    tried("two names of one value", 2)


@pytest.mark.parametrize("site", ["h_start", "conv_start"])
def test_an_edit_of_what_a_resumed_pass_starts_from_is_refused(site, tried):
    model, name = golden.model(), f"blocks.1.hook_{site}"
    stream = im.read(model, TOKENS, ["blocks.0.hook_resid_pre"])["blocks.0.hook_resid_pre"]
    start = Roll.begin(model, TOKENS).start(0, stream)
    with pytest.raises(InputError, match=f"'{name}' is where this pass starts from"):
        forward(model, TOKENS, {name: lambda x: x + 1}, start=start)
    tried("an edit that a resumed pass would overwrite", 1)


@pytest.fixture(scope="module")
def poisoned(tiny_mamba_dir):
    """The random Mamba with a token, 13, whose embedding is not a number."""
    model = im.open_model(str(tiny_mamba_dir), device="cpu")
    embedding = model._module.backbone.embeddings
    embedding.weight = torch.nn.Parameter(embedding.weight.clone(), requires_grad=False)
    # The head may be the embedding itself, and must stay as it is.
    embedding.weight[13] = float("nan")
    return model


def poisoned_pairs(where):
    """Five pairs, of which number 3 has token 13 in its clean or its corrupted prompt."""
    tokens = torch.arange(1, 26).reshape(5, 5) % 12 + 1
    pairs = {"clean": tokens, "corrupted": tokens.flip(1).clone()}
    pairs[where][3, 2] = 13
    answer = torch.arange(5) + 14
    return Pairs(**pairs, answer=answer, wrong=answer + 9)


ANALYSES = {
    "the sweep": lambda model, pairs: swept_logit_diffs(model, pairs, "layer_input"),
    "resample": lambda model, pairs: resample_sweep(model, pairs, "h"),
    "layer-ablation": lambda model, pairs: layer_ablation.EXPERIMENT(model, pairs),
    "state-ablation": lambda model, pairs: state_ablation.EXPERIMENT(model, pairs),
    "output-ablation": lambda model, pairs: output_ablation.EXPERIMENT(model, pairs),
    "layer-removal": lambda model, pairs: layer_removal.EXPERIMENT(model, pairs),
    "cross-talk": lambda model, pairs: cross_talk.EXPERIMENT(model, pairs),
    "evaluator": lambda model, pairs: Evaluator(model, pairs, universe_of(model), rows=2).scores([[Item("0", "1")]]),
    "exact": lambda model, pairs: im.attribute(model, pairs, method="exact").table,
    "eap": lambda model, pairs: im.attribute(model, pairs, method="eap").table,
    "eap-ig": lambda model, pairs: im.attribute(model, pairs, pairs_per_pass=2, steps=2).table,
}
NAMES_A_SITE = {("resample", "corrupted")}
NEVER_LOOKS = {("layer-removal", "corrupted")}


@pytest.mark.parametrize("where", ["clean", "corrupted"])
@pytest.mark.parametrize("name", ANALYSES)
def test_scores_that_are_no_numbers_stop_an_analysis_with_the_pair_that_made_them(name, where, poisoned, tried):
    pairs = poisoned_pairs(where)
    if (name, where) in NEVER_LOOKS:
        ANALYSES[name](poisoned, pairs)
        return
    with pytest.raises(InputError, match=r"Pair 3 gives|not finite|NaN") as caught:
        ANALYSES[name](poisoned, pairs)
    if (name, where) not in NAMES_A_SITE:
        assert "Pair 3 gives" in str(caught.value)
    tried("a prompt whose scores are not numbers", 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_infinite_score_is_no_number_either(value, tried):
    scores = torch.zeros(2, 5)
    poisoned_pairs("clean").check_finite("logits", scores)
    scores[1, 3] = value
    with pytest.raises(InputError, match="Pair 3 gives logits that are not finite"):
        poisoned_pairs("clean").check_finite("logits", scores)
    tried("a prompt whose scores are not numbers", 1)


def test_a_prompt_whose_states_are_no_numbers_has_no_similarity(poisoned, tried):
    with pytest.raises(InputError, match="not finite"):
        state_similarity.EXPERIMENT(poisoned, poisoned_pairs("clean"), layer=1, prompt="3 13 5")
    tried("a prompt whose scores are not numbers", 1)


def test_ranges_that_vanish_are_counted_left_out_and_told(tiny_mamba, tried):
    tokens = torch.arange(1, 21).reshape(4, 5) % VOCAB
    answer = torch.arange(4) + 14
    pairs = widest(tiny_mamba, Pairs(clean=tokens, corrupted=tokens.flip(1), answer=answer, wrong=answer + 9))
    pairs.corrupted[1] = tokens[1]
    table = layer_ablation.EXPERIMENT(tiny_mamba, pairs)
    assert set(table["left_out"]) == {1}
    assert set(table["n"]) == {3}
    assert any("no range to normalise by" in sentence for sentence in layer_ablation.findings(table))
    rest = pairs[[0, 2, 3]]
    assert_same_effects(
        table.drop(columns="left_out"),
        layer_ablation.EXPERIMENT(tiny_mamba, rest).drop(columns="left_out"),
        tiny_mamba,
        rest,
    )
    tried("a pair with no range to normalise by", 1)
