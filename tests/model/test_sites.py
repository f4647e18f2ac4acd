"""Hook names, and the values read by them: against the golden file and against the plain reference."""

import dataclasses

import golden
import pytest
import reference
import torch

import ioi_mamba as im
from ioi_mamba.errors import InputError
from ioi_mamba.model import families
from ioi_mamba.model.families.mamba import MAMBA
from ioi_mamba.model.sites import Hooks

HOOKS = {
    key.rsplit("/", 1)[1]: value
    for key, value in golden.TENSORS.items()
    if key.startswith(("hook/corr/", "hook/static/"))
}


@pytest.fixture(scope="module")
def golden_reads():
    return im.read(golden.model(), golden.TENSORS["ids/corr"][:1], HOOKS)


def test_the_golden_file_has_every_site_that_mambalens_has():
    seen = {name.split("hook_")[1] for name in HOOKS}
    assert seen == {*MAMBA.sites, "embed", "norm"} - {"conv_start", "conv_slice", "ssm_write", "h_start"}


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_has_the_value_that_mambalens_gives_it(golden_reads, name):
    got, want = golden_reads[name], HOOKS[name]
    assert got.shape == want.shape
    assert golden.relative_error(got, want) < 1e-5


def test_the_logits_are_those_of_mambalens():
    pairs = golden.golden_pairs()
    got = im.read(golden.model(), pairs.clean, ["hook_logits"])["hook_logits"]
    assert golden.relative_error(golden.at_last(got, pairs), golden.TENSORS["logits/clean"]) < 1e-5
    got = im.run(golden.model(), pairs.corrupted, {})
    assert golden.relative_error(got[:1], golden.TENSORS["logits/corr"]) < 1e-5


@pytest.mark.parametrize("name", ["golden", "odd"])
def test_every_value_of_every_layer_is_that_of_the_plain_reference(name):
    model, pairs = golden.opened(name), golden.random_pairs(name)
    want = reference.run(golden.weights(name), pairs.clean)
    got = im.read(model, pairs.clean, list(want))
    bad = {hook: error for hook in want if not (error := golden.relative_error(got[hook], want[hook])) < 1e-5}
    assert not bad
    for layer in range(model.config.num_hidden_layers):
        whole = im.read(model, pairs.clean, [hook := f"blocks.{layer}.hook_h"])[hook]
        assert golden.relative_error(whole, reference.states(want, layer, pairs.clean.shape[1])) < 1e-5


@pytest.mark.parametrize("name", ["golden", "odd"])
def test_a_value_has_the_shape_that_its_site_promises(name):
    model, pairs = golden.opened(name), golden.random_pairs(name)
    config = model.config
    sizes = {
        "batch": len(pairs),
        "pos": pairs.clean.shape[1],
        "D": config.hidden_size,
        "E": config.intermediate_size,
        "N": config.state_size,
        "R": config.time_step_rank,
        "K-1": config.conv_kernel - 1,
    }
    hooks = {
        f"blocks.1.hook_{site.name}" + (".0" if site.name == "conv_slice" else ""): site
        for site in MAMBA.sites.values()
    }
    for hook, value in im.read(model, pairs.clean, list(hooks)).items():
        assert value.shape == tuple(sizes[letter] for letter in hooks[hook].shape.split()), hook
        assert value.shape == families.sizes_of(model).shape(hooks[hook], *pairs.clean.shape), hook


def test_the_slices_of_a_convolution_sum_to_its_output_without_the_bias():
    model, pairs = golden.model(), golden.golden_pairs()
    slices = [f"blocks.2.hook_conv_slice.{s}" for s in range(-3, 1)]
    got = im.read(model, pairs.clean, [*slices, "blocks.2.hook_conv"])
    bias = model._module.backbone.layers[2].mixer.conv1d.bias
    total = sum(got[name] for name in slices) + bias
    torch.testing.assert_close(total, got["blocks.2.hook_conv"], rtol=1e-5, atol=1e-5)


def test_reading_every_value_leaves_the_logits_bit_for_bit_those_of_the_stock_model():
    model, pairs = golden.model(), golden.golden_pairs()
    stock = model._module(pairs.clean, use_cache=False).logits
    names = [f"blocks.{i}.hook_{s}" for i in range(4) for s in MAMBA.sites if s != "conv_slice"]
    names += [f"blocks.{i}.hook_conv_slice.{s}" for i in range(4) for s in range(-3, 1)]
    got = im.read(model, pairs.clean, [*names, "hook_embed", "hook_norm", "hook_logits"])
    assert torch.equal(got["hook_logits"], stock)
    assert torch.equal(im.run(model, pairs.clean, {}), stock)


def test_reads_come_back_in_the_order_in_which_they_were_asked_for():
    names = ["hook_norm", "blocks.3.hook_y", "blocks.0.hook_h.4", "blocks.0.hook_h.2", "hook_embed"]
    assert list(im.read(golden.model(), golden.golden_pairs().clean, names)) == names


@pytest.mark.parametrize(
    ("hook", "address"),
    [
        ("hook_embed", (None, "embed", None)),
        ("hook_logits", (None, "logits", None)),
        ("blocks.3.hook_B_bar", (3, "B_bar", None)),
        ("blocks.0.hook_h", (0, "h", None)),
        ("blocks.0.hook_h.19", (0, "h", 19)),
        ("blocks.0.hook_h_start", (0, "h_start", None)),
        ("blocks.2.hook_conv_slice.-3", (2, "conv_slice", -3)),
        ("blocks.2.hook_conv_slice.0", (2, "conv_slice", 0)),
    ],
)
def test_a_hook_name_is_taken_apart(hook, address):
    assert Hooks([MAMBA.sites] * 4, n_positions=20, conv_width=4).address(hook) == address


@pytest.mark.parametrize(
    ("hook", "says"),
    [
        ("blocks.2.hook_Bbar", "did you mean 'blocks.2.hook_B_bar'"),
        ("blocks.1.hook_ssm_inpt", "did you mean 'blocks.1.hook_ssm_input'"),
        ("hook_embeddings", "did you mean 'hook_embed'"),
        ("hook_h.3", "did you mean"),
        ("blocks.0.hook_conv_slice", "did you mean 'blocks.0.hook_conv_slice"),
        ("blocks.0.hook_B.3", "did you mean 'blocks.0.hook_B"),
        ("blocks.1.hook_norm", "did you mean 'blocks.1.hook"),
        ("", "did you mean"),
        ("blocks.4.hook_y", "layers 0 to 3, not 4"),
        ("blocks.-5.hook_y", "layers 0 to 3, not -5"),
        ("blocks.0.hook_h.20", "positions 0 to 19, not 20"),
        ("blocks.0.hook_h.-21", "positions 0 to 19, not -21"),
        ("blocks.0.hook_conv_slice.1", "slices are -3 to 0, not 1"),
        ("blocks.0.hook_conv_slice.-4", "slices are -3 to 0, not -4"),
    ],
)
@pytest.mark.parametrize("verb", [lambda *a: im.read(*a[:2], [a[2]]), lambda *a: im.run(*a[:2], {a[2]: lambda x: x})])
def test_a_name_that_is_not_there_is_refused_by_naming_it_and_the_fix(verb, hook, says):
    with pytest.raises(InputError, match=says) as error:
        verb(golden.model(), golden.golden_pairs().clean, hook)
    assert repr(hook) in str(error.value)


def test_a_moved_operation_label_is_named_when_a_model_is_opened(monkeypatch):
    moved = dataclasses.replace(MAMBA, mixer=MAMBA.mixer._replace(operations=("mamba_selective_scan_9",)))
    monkeypatch.setitem(families.FAMILIES, "mamba", moved)
    with pytest.raises(RuntimeError, match="'mamba_selective_scan_9' is not in layer 0"):
        families.check_labels(golden.model())
