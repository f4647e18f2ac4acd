"""The experiment on features: against values written by hand and prompts looked through one by one."""

from collections import Counter

import conftest  # noqa: F401  sets the environment before transformers is imported
import golden
import pandas as pd
import pytest
import torch
from families.tiny import CONFIGS, model_of, pairs_of

import ioi_mamba as im
from ioi_mamba import analyses
from ioi_mamba.analyses.features import ALIKE, COMPONENTS, DRIVING, FEATURES, WITH_ERROR
from ioi_mamba.circuits.dictionaries import Dictionary, save_dictionary
from ioi_mamba.model.families import layers_with
from ioi_mamba.passes.metrics import logit_diff, normalized_logit_diff
from ioi_mamba.tasks import ioi

QUICK = {"size": 8, "active": 2, "training_steps": 5, "exact_prompts": 2}
EXPERIMENT = analyses.load("features")


@pytest.fixture(scope="module")
def mini():
    return im.open_model("mini", device="cpu")


@pytest.fixture(scope="module")
def drawn(mini):
    """Pairs of several layouts, and others."""
    return ioi.generate(mini.tokenizer, 8, 3), ioi.generate(mini.tokenizer, 8, 4)


@pytest.fixture(scope="module")
def table(mini, drawn):
    pairs, held_out = drawn
    return EXPERIMENT(mini, pairs, held_out=held_out, layer=5, **QUICK | {"size": 24, "training_steps": 40})


def left(table, site, way):
    rows = table[(table["what"] == "left") & (table["site"] == site) & (table["way"] == way)]
    return dict(zip(rows["size"], rows["value"], strict=True))


def by_hand(model, pairs, name):
    """The normalized logit diffs with a site taken from the corrupted run, and of the clean run itself, means over pairs."""
    there = im.read(model, pairs.corrupted, [name])[name]
    runs = (im.run(model, pairs.clean, {name: there}), im.run(model, pairs.clean), im.run(model, pairs.corrupted))
    patched, *ends = (logit_diff(logits[:, -1], pairs.answer, pairs.wrong) for logits in runs)
    return [float(normalized_logit_diff(each, *ends).mean()) for each in (patched, ends[0])]


@pytest.mark.parametrize("family", CONFIGS)
def test_it_runs_on_every_family_from_the_patched_site_to_the_clean_one(family):
    model, pairs = model_of(family), pairs_of(3)
    layer = layers_with(model, "h")[-1]
    found = EXPERIMENT(model, pairs, held_out=pairs, layer=layer, **QUICK)
    for site in ("ssm_input", "out_proj"):
        none, clean = by_hand(model, pairs, f"blocks.{layer}.hook_{site}")
        for way, size in ((COMPONENTS, None), ("channels", None), (FEATURES, 8), (WITH_ERROR, 8)):
            curve = left(found, site, way)
            if way == WITH_ERROR:
                assert curve[size] == pytest.approx(clean, abs=1e-3)
                continue
            assert curve[0] == pytest.approx(none, rel=1e-3, abs=1e-3)
            assert size is not None or curve[max(curve)] == pytest.approx(clean, abs=1e-3)
    assert EXPERIMENT.findings(found)
    EXPERIMENT.chart(found).to_dict()


def test_a_table_is_the_same_again_and_a_seed_draws_other_dictionaries(mini, drawn, table):
    pairs, held_out = drawn
    options = {"layer": 5, **QUICK | {"size": 24, "training_steps": 40}}
    assert EXPERIMENT(mini, pairs, held_out=held_out, **options).equals(table)
    other = EXPERIMENT(mini, pairs, held_out=held_out, seed=1, **options)
    rows = lambda each: each[(each["what"] == "fit") & each["measure"].str.startswith("unexplained")]["value"]
    assert not rows(other).equals(rows(table))


def test_items_are_in_order_of_what_the_answer_needs_and_their_words_are_those_of_the_strongest_prompts(
    mini, drawn, table
):
    _, held_out = drawn
    shown = table[(table["what"] == "feature") & (table["site"] == "ssm_input") & (table["way"] == "channels")]
    assert shown["value"].is_monotonic_increasing
    assert (shown["low"] <= shown["value"]).all()
    assert (shown["value"] <= shown["high"]).all()
    prompts = [(row, part) for part in held_out.layouts() for row in range(len(part))]
    frequency = Counter()
    for row, part in prompts:
        frequency.update(set(part.clean[row].tolist()))
    answers = Counter(int(part.answer[row]) for row, part in prompts)
    for item in shown.head(4).itertuples():
        strongest = []
        for row, part in prompts:
            name = "blocks.5.hook_ssm_input"
            channel = im.read(mini, part.clean[row : row + 1], [name])[name][0, :, int(item.item)].abs()
            strongest.append((float(channel.max()), int(channel.argmax()), row, part))
        strongest.sort(key=lambda each: -each[0])
        told = {}
        for _, place, row, part in strongest[:DRIVING]:
            for offset in range(min(4, place + 1)):
                key = (offset, int(part.clean[row, place - offset]))
                told[key] = told.get(key, 0) + 1
            key = (None, int(part.answer[row]))
            told[key] = told.get(key, 0) + 1
        worth = lambda key: told[key] * (1 - (answers if key[0] is None else frequency)[key[1]] / len(prompts))  # noqa: B023
        best = max(told, key=worth)
        named = next(key for key in told if mini.tokenizer.decode([key[1]]).strip() == item.word)
        offset = None if pd.isna(item.offset) else int(item.offset)
        assert worth((offset, named[1])) == pytest.approx(worth(best))
        assert item.alike == pytest.approx(told[(offset, named[1])] / min(DRIVING, len(prompts)))
        assert not (item.carries_name and item.alike < ALIKE)


def test_exact_scores_are_those_of_patching_and_need_no_gradients():
    model, pairs = golden.model(), golden.golden_pairs()
    found = EXPERIMENT(model, pairs, held_out=pairs, layer=2, method="exact", sites=("out_proj",), **QUICK)
    channel = found[(found["what"] == "feature") & (found["way"] == "channels")].iloc[0]
    name = "blocks.2.hook_out_proj"
    values = [im.read(model, tokens, [name])[name] for tokens in (pairs.clean, pairs.corrupted)]
    written = values[0].clone()
    written[..., int(channel["item"])] = values[1][..., int(channel["item"])]
    runs = (im.run(model, pairs.clean, {name: written}), im.run(model, pairs.clean), im.run(model, pairs.corrupted))
    differences = [logit_diff(logits[:, -1], pairs.answer, pairs.wrong) for logits in runs]
    change = normalized_logit_diff(*differences) - normalized_logit_diff(differences[1], *differences[1:])
    assert channel["value"] == pytest.approx(float(change.mean()), rel=1e-3, abs=1e-5)
    assert channel["role"] == ""


def test_a_dictionary_of_a_file_serves_one_site_and_a_transcoder_reads_another(tmp_path):
    model, pairs = golden.model(), golden.golden_pairs()
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=draw) for shape in ((64, 6), (6,), (6, 64), (64,))]
    save_dictionary(Dictionary(*weights, k=3), tmp_path / "d")
    options = {"layer": 1, "dictionary": str(tmp_path / "d"), "exact_prompts": 2}
    found = EXPERIMENT(model, pairs, held_out=pairs, sites=("out_proj",), reads="layer_input", **options)
    _, clean = by_hand(model, pairs, "blocks.1.hook_out_proj")
    assert left(found, "out_proj", WITH_ERROR)[6] == pytest.approx(clean, abs=1e-3)
    with pytest.raises(im.InputError, match="of one site"):
        EXPERIMENT(model, pairs, held_out=pairs, **options)
    for options, message in (({"layer": 9}, "layer is 9"), ({"layer": 1, "sites": ("nothing",)}, "Unknown hook name")):
        with pytest.raises(im.InputError, match=message):
            EXPERIMENT(model, pairs, held_out=pairs, **options)
