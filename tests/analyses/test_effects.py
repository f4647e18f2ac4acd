"""The experiments on layers and positions, against patches made one at a time with `im.run`."""

from dataclasses import replace

import pytest
import torch
from scipy import stats

import ioi_mamba as im
from ioi_mamba.analyses import layer_ablation, load
from ioi_mamba.passes import metrics
from ioi_mamba.passes.sweep import swept_logit_diffs
from ioi_mamba.tasks import ioi

SITES = {"layer-ablation": "layer_input", "state-ablation": "h", "output-ablation": "out_proj"}


@pytest.fixture(scope="module")
def pairs(mini):
    return load("layer-ablation").draw(mini.tokenizer, 1, 27, ioi.TASK)


def one_patch(model, pairs, edits):
    """Effect [pair] of one edit, every pass run in full."""
    rows = torch.arange(len(pairs))
    difference = lambda logits: metrics.logit_diff(logits[rows, pairs.last], pairs.answer, pairs.wrong)
    clean, corrupted = (difference(im.run(model, tokens, {})) for tokens in (pairs.clean, pairs.corrupted))
    return metrics.effect(difference(im.run(model, pairs.clean, edits)), clean, corrupted)


def cell(table, corruption, layer, position):
    rows = table[(table["corruption"] == corruption) & (table["layer"] == layer) & (table["position"] == position)]
    assert len(rows) == 1
    return rows.iloc[0]


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("position", [3, 13, 19])
def test_a_cell_is_the_mean_effect_of_patches_made_one_at_a_time(mini, pairs, name, position):
    module, site = load(name), SITES[name]
    with torch.no_grad():
        table = module(mini, pairs)
        for layer in (0, 5):
            hook = f"blocks.{layer}.hook_{site}"
            source = im.read(mini, pairs.corrupted, [hook])[hook]

            def write(x, source=source, position=position):
                x[:, position] = source[:, position]
                return x

            want = one_patch(mini, pairs, {hook: write})
            for corruption, part in pairs.by("corruption").items():
                here = torch.tensor([c == corruption for c in pairs.labels["corruption"]])
                got = cell(table, corruption, layer, position)
                assert got["effect"] == pytest.approx(float(want[here].mean()), abs=1e-4)
                assert got["n"] == len(part)
    assert set(module.required) <= set(table.columns)
    assert module.chart(table).to_dict()["$schema"]
    assert all(isinstance(sentence, str) and sentence for sentence in module.findings(table))


def test_conv_shift_patches_one_slice_at_its_output_position(mini, pairs):
    table = load("conv-shift")(mini, pairs, layer=0)
    strongest = table.loc[table["effect"].abs().idxmax()]
    p, hook = int(strongest["position"]), f"blocks.0.hook_conv_slice.{strongest['slice']}"
    source = im.read(mini, pairs.corrupted, [hook])[hook]

    def write(x):
        x[:, p] = source[:, p]
        return x

    want = one_patch(mini, pairs, {hook: write})
    here = torch.tensor([c == strongest["corruption"] for c in pairs.labels["corruption"]])
    assert strongest["effect"] == pytest.approx(float(want[here].mean()), abs=1e-4)
    assert abs(strongest["effect"]) > 0.01


def test_a_state_with_its_conv_inputs_replaced_forgets_all_before_it(mini):
    pairs = ioi.generate(
        mini.tokenizer, 2, 27, templates=ioi.ALIGNED_TEMPLATES, corruptions=ioi.CORRUPTIONS[:1], symmetric=True
    )
    with torch.no_grad():
        plain = load("state-ablation")(mini, pairs)
        forgot = load("state-ablation")(mini, pairs, with_conv=True)
        corruption = pairs.labels["corruption"][0]
        # Layer 0 reads embeddings, which agree everywhere but at the name (position 3): from 3 on, exchanging state
        # and taps is exchanging all that its outputs after 3 depend on.
        hook = "blocks.0.hook_out_proj"
        source = im.read(mini, pairs.corrupted, [hook])[hook]
        want = one_patch(mini, pairs, {hook: lambda x: torch.cat((x[:, :4], source[:, 4:]), dim=1)})
    got = cell(forgot, corruption, 0, 3)["effect"]
    # The state written at 3 is read out at 3 too (with the clean C): that is the only other change.
    assert got == pytest.approx(float(want.mean()), abs=0.05)
    assert abs(got - cell(plain, corruption, 0, 3)["effect"]) > 1e-4


def test_templates_with_names_elsewhere_are_averaged_by_role(mini):
    pairs = ioi.generate(mini.tokenizer, 12, 27, corruptions=ioi.CORRUPTIONS[:1], symmetric=True)
    assert len(pairs.layouts()) == 2
    table = load("layer-ablation")(mini, pairs)
    first_names = table[(table["label"] == "n1") & (table["layer"] == 0)]
    assert first_names["n"].tolist() == [len(pairs)]


def test_a_position_without_a_role_is_that_of_the_longest_layout_alone(mini):
    templates, corruptions = ioi.TEMPLATES[1:3], ioi.CORRUPTIONS[:1]
    parts = [
        ioi.generate(mini.tokenizer, 1, 27, templates=[each], corruptions=corruptions, symmetric=True)
        for each in templates
    ]
    pairs = im.Pairs.concat(parts)
    pairs = replace(pairs, roles={role: pairs.roles[role] for role in ("n1", "n2", "n3", "n4", "n5", "out")})
    longest = max(pairs.layouts(), key=lambda part: part.clean.shape[1])
    module = load("layer-ablation")
    table, alone = (module(mini, each) for each in (pairs, longest))
    unnamed = [label for label in longest.position_labels() if label.isdigit()]
    got, want = (t[t["label"].isin(unnamed)] for t in (table, alone))
    assert set(got["n"]) == {len(longest)}
    assert got["effect"].tolist() == pytest.approx(want["effect"].tolist(), abs=1e-4)
    assert not table.duplicated(["layer", "position"]).any()
    assert f"as few as {len(longest)} prompts" in " ".join(module.findings(table))
    assert "as few as" not in " ".join(module.findings(alone))


def test_intervals_of_effects_are_those_of_pairs(mini):
    pairs = ioi.generate(
        mini.tokenizer, 6, 27, templates=ioi.ALIGNED_TEMPLATES, corruptions=ioi.CORRUPTIONS[:1], symmetric=True
    )
    diffs = swept_logit_diffs(mini, pairs, "layer_input", layers=[6], positions=[15])
    values = metrics.effect(**diffs)[0, 0].view(2, 6).mean(0).numpy()
    row = cell(load("layer-ablation")(mini, pairs), ioi.CORRUPTIONS[0], 6, 15)
    want = stats.t.interval(0.95, 5, values.mean(), stats.sem(values))
    assert (row["low"], row["high"]) == pytest.approx(want, abs=1e-4)


def test_the_bottleneck_is_the_layer_after_the_first_with_the_strongest_cells(mini, pairs):
    module = load("layer-ablation")
    table = module(mini, pairs)
    forced = table.copy()
    forced.loc[(forced["layer"] == 6) & (forced["position"] == 7), "effect"] = -0.9
    forced.loc[(forced["layer"] == 4) & (forced["position"] == 19), "effect"] = 5.0
    assert layer_ablation.bottleneck(forced) == 6


def test_cross_talk_equals_an_exhaustive_slow_search(tiny_mamba):
    """Every candidate of every step, one patched pass each, on a small random model."""
    module, n_layers = load("cross-talk"), tiny_mamba.config.num_hidden_layers
    vocab = tiny_mamba.config.vocab_size
    generator = torch.Generator().manual_seed(3)
    clean = torch.randint(1, vocab, (12, 9), generator=generator)
    corrupted = clean.clone()
    corrupted[:, 2] = torch.randint(1, vocab, (12,), generator=generator)
    candidates = torch.stack([torch.randperm(vocab - 1, generator=generator)[:3] + 1 for _ in range(12)])
    pairs = im.Pairs.from_tokens(
        clean,
        corrupted,
        candidates[:, 0],
        candidates[:, 1],
        candidates=candidates,
        labels={"template": ["T"] * 12, "corruption": ["c"] * 12},
    )
    with torch.no_grad():
        table = module(tiny_mamba, pairs)
        hooks = [f"blocks.{i}.hook_in_proj" for i in range(n_layers)]
        source = im.read(tiny_mamba, pairs.corrupted, hooks)
        rows, patched = torch.arange(12), set(range(n_layers))
        for step in sorted(s for s in set(table["step"]) if s > 0):
            here = table[table["step"] == step].set_index("layer")
            assert set(here.index) == patched
            for layer in patched:
                edits = {hooks[i]: source[hooks[i]] for i in patched - {layer}}
                logits = im.run(tiny_mamba, pairs.clean, edits)[rows, pairs.last]
                want = float(metrics.accuracy(logits, pairs.answer, pairs.candidates).mean())
                assert here.loc[layer, "accuracy"] == pytest.approx(want, abs=1e-6)
            chosen = here.index[here["chosen"]]
            assert len(chosen) == 1
            assert here.loc[chosen[0], "accuracy"] == here["accuracy"].max()
            patched -= {int(chosen[0])}
