"""Edits by name: against the golden file, against the plain reference, and what every write must and must not do."""

from dataclasses import replace

import golden
import pytest
import reference
import torch
from conditioning import logit_rounding
from golden import at_last, relative_error

import ioi_mamba as im
from ioi_mamba.errors import InputError
from ioi_mamba.model import scan
from ioi_mamba.model.families.mamba import MAMBA
from ioi_mamba.passes.forward import Start, forward
from ioi_mamba.passes.sweep import Roll

MODELS = ["golden", "odd", "mini"]
BY_NAME = {intervention["name"]: intervention for intervention in golden.LISTS["interventions"]}
SINGLE = [name for name, intervention in BY_NAME.items() if not intervention["type"].startswith("edge")]


def write_at(position, value):
    """An edit that writes `value` at a position, or (None) everywhere."""

    def edit(x):
        x[:, slice(None) if position is None else position] = value[:, slice(None) if position is None else position]
        return x

    return edit


def edits_of(intervention):
    """The edits that an entry of the golden list stands for."""
    model, pairs = golden.model(), golden.golden_pairs()
    kind, position = intervention["type"], intervention.get("pos")
    layers = intervention.get("layers", [intervention.get("layer")])
    site = intervention["hook"].removeprefix("hook_")
    if kind == "conv_slice":
        site = f"conv_slice.{intervention['rel']}"
    names = [f"blocks.{layer}.hook_{'h' if kind == 'resample_all_h' else site}" for layer in layers]
    if kind.startswith("zero"):
        zeros = torch.zeros(1, 20, *[1] * (3 if "_bar" in site else 1))
        return {name: write_at(position, zeros) for name in names}
    if kind in ("replace", "addsub"):
        corrupted, clean = (golden.TENSORS[f"vec/{site}.mean_{run}.l{layers[0]}"] for run in ("corr", "clean"))
        if kind == "replace":
            return {names[0]: write_at(position, corrupted[None])}
        return {names[0]: lambda x: write_at(position, x + corrupted - clean)(x.clone())}
    source = im.read(model, pairs.corrupted, names)
    if kind in ("resample", "conv_slice"):
        return {name: write_at(position, source[name]) for name in names}
    return source  # states, one or all


@pytest.mark.parametrize("name", SINGLE)
def test_an_intervention_gives_the_logits_of_mambalens(name):
    pairs, want = golden.golden_pairs(), golden.TENSORS[f"iv/{name}"]
    logits = im.run(golden.model(), pairs.clean, edits_of(BY_NAME[name]))
    assert (at_last(logits, pairs)[:, : want.shape[1]] - want).abs().max() < 2e-4
    moved = logits - im.run(golden.model(), pairs.clean, {})
    assert moved.abs().max().item() == pytest.approx(BY_NAME[name]["effect"], abs=2e-4)


# -- every site can be written, and a write there is felt ---------------------------------------------------------


def writable(name):
    """The hooks of one layer, with every conv slice and some single states, and those of the whole model."""
    config = golden.opened(name).config
    layer = config.num_hidden_layers // 2
    inside = [site for site in MAMBA.sites if site != "conv_slice"]
    inside += [f"conv_slice.{s}" for s in range(1 - config.conv_kernel, 1)]
    inside += [f"h.{p}" for p in (0, 4, 8)]
    return ["hook_embed", *(f"blocks.{layer}.hook_{site}" for site in inside), "hook_norm", "hook_logits"]


def resampled(name, hook):
    """Another value for the site: that of other prompts, or where all prompts agree, random numbers."""
    model, pairs = golden.opened(name), golden.random_pairs(name)
    value = im.read(model, pairs.clean, [hook])[hook]
    other = im.read(model, golden.random_pairs(name, seed=1).clean, [hook])[hook]
    if torch.equal(value, other) or hook.endswith(".hook_A"):
        other = value + 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).abs()
    return other


@pytest.mark.parametrize(("name", "hook"), [(name, hook) for name in MODELS for hook in writable(name)])
def test_writing_back_what_was_read_changes_nothing_and_writing_another_value_does(name, hook):
    model, tokens = golden.opened(name), golden.random_pairs(name).clean
    stock = im.run(model, tokens, {})
    value = im.read(model, tokens, [hook])[hook]
    # Rounding grows with the logits, which reach 26 in the golden model: 1e-5 of the largest of them.
    rounding = 1e-5 * stock.abs().max()
    assert (im.run(model, tokens, {hook: value}) - stock).abs().max() < rounding
    assert (im.run(model, tokens, {hook: lambda x: x}) - stock).abs().max() < rounding
    other = resampled(name, hook)
    by_tensor, by_function = (im.run(model, tokens, {hook: edit}) for edit in (other, lambda x: other))
    assert (by_tensor - stock).abs().max() > 1e-3
    assert (by_function - by_tensor).abs().max() < rounding
    assert torch.isfinite(by_tensor).all()


@pytest.mark.parametrize(("name", "hook"), [(name, hook) for name in ("golden", "odd") for hook in writable(name)])
def test_what_is_written_is_what_is_read_back_and_what_the_reference_goes_on_from(name, hook):
    model, tokens = golden.opened(name), golden.random_pairs(name).clean
    other = resampled(name, hook)
    saved = forward(model, tokens, {hook: other}, reads=[hook])
    torch.testing.assert_close(saved[hook], other, rtol=0, atol=0)
    edits = {hook: other}
    if hook.endswith("hook_h"):
        edits = {f"{hook}.{t}": other[:, t] for t in range(tokens.shape[1])}
    want = reference.logits(golden.weights(name), tokens, edits)
    assert relative_error(saved["hook_logits"], want) < 1e-5
    fast = forward(model, tokens, {hook: other}, own_scan=True)["hook_logits"]
    assert relative_error(fast, want) < 1e-5


# -- edits combine ------------------------------------------------------------------------------------------------


def halve(x):
    return x * 0.5


def at_four(x):
    x = x.clone()
    x[:, 4] = x[:, 4] * -0.7
    return x


def several(layers):
    """Edits at many sites of each of some layers, as functions, so that each sees the ones before it."""
    edited = (
        "layer_input",
        "in_proj",
        "skip",
        "conv_slice.-1",
        "conv",
        "B",
        "delta_1",
        "delta_2",
        "B_bar",
        "ssm_write",
        "h.3",
        "h.6",
    )
    edited += ("y", "ssm_output", "after_skip", "out_proj")
    edits = {f"blocks.{layer}.hook_{site}": halve for layer in layers for site in edited if "." in site}
    return edits | {f"blocks.{layer}.hook_{site}": at_four for layer in layers for site in edited if "." not in site}


@pytest.mark.parametrize("name", ["golden", "odd"])
@pytest.mark.parametrize("own_scan", [False, True])
def test_many_edits_in_one_layer_and_in_many_layers_combine(name, own_scan):
    model, pairs, n_layers = (
        golden.opened(name),
        golden.random_pairs(name),
        golden.opened(name).config.num_hidden_layers,
    )
    for layers in ([1], range(n_layers)):
        edits = several(layers) | {"hook_embed": at_four, "hook_norm": halve}
        want = reference.logits(golden.weights(name), pairs.clean, edits)
        shuffled = dict(reversed(edits.items()))  # the order of the mapping means nothing
        for given in (edits, shuffled):
            got = forward(model, pairs.clean, given, own_scan=own_scan)["hook_logits"]
            assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("first", MAMBA.sites)
def test_any_two_sites_of_a_layer_can_be_written_in_one_pass(first):
    model, tokens, weights = golden.odd_model(), golden.random_pairs("odd").clean, golden.weights("odd")
    name = lambda site: f"blocks.1.hook_{site}" + (".-1" if site == "conv_slice" else ".5" if site == "h" else "")
    for second in MAMBA.sites:
        edits = {name(second): lambda x: x * 0.6 + 0.01, name(first): lambda x: x * 0.8 + 0.02}
        assert relative_error(im.run(model, tokens, edits), reference.logits(weights, tokens, edits)) < 1e-5, second


def test_a_function_at_all_states_writes_only_the_entries_it_changes():
    model, tokens = golden.model(), golden.golden_pairs().clean

    def at_seven(h):
        h[:, 7] *= 0.5
        return h

    all_states = im.run(model, tokens, {"blocks.2.hook_h": at_seven})
    one_state = im.run(model, tokens, {"blocks.2.hook_h.7": lambda h: h * 0.5})
    torch.testing.assert_close(all_states, one_state, rtol=0, atol=logit_rounding(model, tokens))
    frozen = im.read(model, tokens, ["blocks.2.hook_h"])["blocks.2.hook_h"]
    frozen[:, 7] *= 0.5
    assert (im.run(model, tokens, {"blocks.2.hook_h": frozen}) - one_state).abs().max() > 1e-3


def test_a_later_state_edit_sees_the_earlier_one():
    tokens = golden.golden_pairs().clean
    edits = {"blocks.1.hook_h.3": torch.zeros(5, 128, 16), "blocks.1.hook_h.9": lambda h: h * 2}
    want = reference.logits(golden.weights("golden"), tokens, edits)
    assert relative_error(im.run(golden.model(), tokens, edits), want) < 1e-5


def test_layer_input_reaches_its_layer_only_and_resid_pre_all_that_follows():
    model, pairs = golden.model(), golden.golden_pairs()
    hook = "blocks.1.hook_{}".format
    other = im.read(model, pairs.corrupted, [hook("resid_pre")])[hook("resid_pre")]
    reads = [hook("resid_pre"), hook("layer_input"), hook("out_proj"), hook("resid_post")]
    plain = im.read(model, pairs.clean, reads)
    own = forward(model, pairs.clean, {hook("layer_input"): other}, reads=reads)
    assert torch.equal(own[hook("resid_pre")], plain[hook("resid_pre")])
    torch.testing.assert_close(own[hook("resid_post")], plain[hook("resid_pre")] + own[hook("out_proj")])
    shared = forward(model, pairs.clean, {hook("resid_pre"): other}, reads=reads)
    assert torch.equal(shared[hook("layer_input")], other)
    torch.testing.assert_close(shared[hook("resid_post")], other + shared[hook("out_proj")])
    assert torch.equal(own[hook("out_proj")], shared[hook("out_proj")])
    assert relative_error(shared["hook_logits"], im.run(model, pairs.corrupted, {})) < 1e-5
    assert (own["hook_logits"] - shared["hook_logits"]).abs().max() > 1


@pytest.mark.parametrize(
    "site", ["resid_pre", "skip", "conv_slice.-2", "C", "delta", "A_bar", "B_bar", "ssm_write", "y", "out_proj"]
)
def test_nothing_before_the_edited_position_changes(site):
    model, tokens = golden.model(), golden.golden_pairs().clean

    def edit(x):
        x[:, 7] = x[:, 7] * 0.3 + 0.2
        return x

    plain, edited = im.run(model, tokens, {}), im.run(model, tokens, {f"blocks.1.hook_{site}": edit})
    assert (edited - plain)[:, :7].abs().max() < 1e-5 * plain.abs().max()
    assert (edited - plain)[:, 7].abs().max() > 1e-3


def test_an_edit_is_given_a_copy_so_that_what_was_read_before_stays():
    kept = {}

    def edit(x):
        kept["seen"] = x
        return torch.zeros_like(x)

    def spoil(x):
        x.zero_()
        return x

    model, tokens = golden.model(), golden.golden_pairs().clean
    plain = im.read(model, tokens, ["blocks.1.hook_layer_input"])["blocks.1.hook_layer_input"]
    im.run(model, tokens, {"blocks.1.hook_layer_input": edit})
    assert torch.equal(kept["seen"], plain)
    spoilt = forward(model, tokens, {"blocks.1.hook_layer_input": spoil}, reads=["blocks.1.hook_resid_pre"])
    assert torch.equal(spoilt["blocks.1.hook_resid_pre"], plain)


def test_the_tensors_of_an_edit_are_left_as_they_were():
    model, tokens = golden.model(), golden.golden_pairs().clean
    names = [f"blocks.1.hook_{site}" for site in ("layer_input", "in_proj", "conv", "B_bar", "h", "y", "out_proj")]
    values = im.read(model, golden.golden_pairs().corrupted, names)
    before = {name: value.clone() for name, value in values.items()}
    im.run(model, tokens, values)
    assert all(torch.equal(values[name], before[name]) for name in names)


# -- what a pass may be asked for besides -------------------------------------------------------------------------


def test_right_padded_rows_equal_the_rows_alone_at_their_own_last_token():
    model, pairs = golden.model(), golden.golden_pairs()
    lengths = torch.tensor([20, 17, 18, 16, 19])
    padded = pairs.clean.clone()
    for row, length in enumerate(lengths):
        padded[row, length:] = 0
    edit = {"blocks.1.hook_B_bar": at_four, "blocks.2.hook_h.3": halve}
    whole = forward(model, padded, edit, logits_at=(lengths - 1)[:, None])["hook_logits"]
    rounding = logit_rounding(model, padded)
    for row, length in enumerate(lengths):
        alone = im.run(model, padded[row : row + 1, :length], edit)[:, -1]
        torch.testing.assert_close(whole[row], alone, rtol=0, atol=rounding)


def test_logits_kept_at_one_position_are_those_of_the_whole_pass_there():
    model, pairs = golden.model(), golden.golden_pairs()
    at = torch.tensor([3, 19, 7, 0, 11])
    kept = forward(model, pairs.clean, logits_at=at[:, None])["hook_logits"]
    assert kept.shape == (5, 1, 512)
    whole = im.run(model, pairs.clean, {})[torch.arange(5), at]
    torch.testing.assert_close(kept[:, 0], whole, rtol=0, atol=logit_rounding(model, pairs.clean))


@pytest.mark.parametrize("name", MODELS)
def test_our_own_scan_gives_the_logits_of_the_stock_one(name):
    model, tokens = golden.opened(name), golden.random_pairs(name).clean
    stock = im.run(model, tokens, {})
    assert relative_error(forward(model, tokens, own_scan=True)["hook_logits"], stock) < 1e-5


@pytest.mark.parametrize("name", ["golden", "odd"])
def test_reads_and_edits_with_our_own_scan_give_the_same_values(name):
    model, pairs = golden.opened(name), golden.random_pairs(name)
    hooks = [f"blocks.1.hook_{site}" for site in (*(s for s in MAMBA.sites if s != "conv_slice"), "conv_slice.0")]
    stock, own = (im.read(model, pairs.clean, hooks, own_scan=own) for own in (False, True))
    for hook in hooks:
        assert relative_error(own[hook], stock[hook]) < 1e-5, hook
    edit = {"blocks.1.hook_B_bar": stock["blocks.1.hook_B_bar"] * 2}
    stock, own = (im.run(model, pairs.clean, edit, own_scan=own) for own in (False, True))
    assert relative_error(own, stock) < 1e-5
    assert relative_error(own, im.run(model, pairs.clean, {})) > 1e-3


def test_an_observer_sees_the_value_after_the_edit_there():
    seen, model, tokens = {}, golden.model(), golden.golden_pairs().clean
    hooks = ["hook_embed", "blocks.1.hook_B_bar", "blocks.3.hook_h.4", "hook_norm", "hook_logits"]
    saved = forward(
        model,
        tokens,
        dict.fromkeys(hooks, halve),
        reads=hooks,
        observe={h: lambda x, h=h: seen.update({h: x}) for h in hooks},
    )
    assert all(torch.equal(seen[hook], saved[hook]) for hook in hooks)


def test_only_what_reduce_returns_comes_back():
    tokens = golden.golden_pairs().clean
    saved = forward(golden.model(), tokens, reduce=lambda saved: {"top": saved["hook_logits"].argmax(-1)})
    assert list(saved) == ["top"]
    assert torch.equal(saved["top"], im.run(golden.model(), tokens, {}).argmax(-1))


@pytest.mark.parametrize(("layer", "position"), [(0, 0), (0, 5), (2, 1), (2, 2), (3, 19), (1, 12)])
def test_a_pass_resumed_at_any_layer_and_position_is_the_rest_of_the_whole_pass(layer, position):
    model, tokens = golden.model(), golden.golden_pairs().clean
    roll = Roll.begin(model, tokens)
    for _ in range(position):
        roll, _ = roll.step()
    hook = f"blocks.{layer}.hook_resid_pre"
    stream = im.read(model, tokens, [hook])[hook]
    start = roll.start(layer, stream[:, position:])
    edits = {f"blocks.{min(layer + 1, 3)}.hook_skip": halve}

    def rest(x):
        x[:, position:] *= 0.5
        return x

    whole = im.run(model, tokens, {name: rest for name in edits})
    resumed = forward(model, tokens[:, position:], edits, start=start)["hook_logits"]
    torch.testing.assert_close(resumed, whole[:, position:], rtol=0, atol=logit_rounding(model, tokens))


def test_rows_that_begin_at_several_layers_are_the_rest_of_a_pass_each():
    model, tokens = golden.model(), golden.golden_pairs().clean
    roll = Roll.begin(model, tokens)
    for _ in range(6):
        roll, _ = roll.step()
    streams = im.read(model, tokens, [f"blocks.{i}.hook_resid_pre" for i in range(4)])
    below, above = (streams[f"blocks.{i}.hook_resid_pre"][:, 6:] for i in (1, 3))
    alone = [
        forward(model, tokens[:, 6:], start=roll.start(*each))["hook_logits"] for each in ((1, below * 2), (3, above))
    ]
    start = replace(roll.start(1, below * 2), above={3: above})
    both = forward(model, tokens[:, 6:], start=start)["hook_logits"]
    torch.testing.assert_close(both, torch.cat(alone), rtol=0, atol=logit_rounding(model, tokens))


@pytest.mark.parametrize("name", ["golden", "odd"])
def test_the_logits_of_some_tokens_are_those_of_all(name):
    model, tokens = golden.opened(name), golden.random_pairs(name).clean
    at, of = torch.tensor([[3, 1]]).expand(len(tokens), 2), torch.arange(6).view(1, 2, 3).expand(len(tokens), 2, 3)
    whole = forward(model, tokens, logits_at=at)["hook_logits"]
    some = forward(model, tokens, logits_at=at, logits_of=of)["hook_logits"]
    torch.testing.assert_close(some, whole.gather(-1, of), rtol=0, atol=logit_rounding(model, tokens))
    assert forward(model, tokens, logits_at=tokens[:, :0])["hook_logits"].shape == (len(tokens), 0, whole.shape[-1])


def test_a_resumed_pass_refuses_what_lies_below_its_start():
    model, tokens = golden.model(), golden.golden_pairs().clean
    stream = im.read(model, tokens, ["blocks.2.hook_resid_pre"])["blocks.2.hook_resid_pre"]
    start = Roll.begin(model, tokens).start(2, stream)
    assert isinstance(start, Start)
    with pytest.raises(InputError, match=r"'blocks.1.hook_y' is below layer 2"):
        forward(model, tokens, reads=["blocks.1.hook_y"], start=start)


# -- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["golden", "odd"])
def test_gradients_at_every_site_are_those_of_the_reference(name):
    model, pairs, last_layer = (
        golden.opened(name),
        golden.random_pairs(name),
        golden.opened(name).config.num_hidden_layers - 1,
    )
    inside = [site for site in MAMBA.sites if site not in ("conv_slice", "h")] + [
        "conv_slice.-1",
        "h.3",
        "h.8",
    ]
    hooks = [f"blocks.{layer}.hook_{site}" for layer in (0, last_layer) for site in inside]
    metric = lambda logits: (logits[torch.arange(len(pairs)), pairs.last, pairs.answer] ** 2).sum()
    leaves, got = {}, {}

    def leaf(hook):
        def edit(x):
            leaves[hook] = x if x.requires_grad else x.requires_grad_()
            return leaves[hook]

        return edit

    def differentiate(saved):
        grads = torch.autograd.grad(metric(saved["hook_logits"]), list(leaves.values()))
        got.update(zip(leaves, grads, strict=True))
        return {}

    with torch.enable_grad():
        forward(model, pairs.clean, {h: leaf(h) for h in ["hook_embed", *hooks]}, reduce=differentiate)
        values = reference.run(
            golden.weights(name),
            pairs.clean,
            {h: lambda x: x if x.requires_grad else x.requires_grad_() for h in ["hook_embed", *hooks]},
        )
        grads = torch.autograd.grad(metric(values["hook_logits"]), [values[hook] for hook in got])
    assert set(got) == {"hook_embed", *hooks}
    bad = {h: e for (h, g), want in zip(got.items(), grads, strict=True) if not (e := relative_error(g, want)) < 1e-4}
    assert not bad
    assert all(grad.abs().max() > 1e-6 for grad in got.values())


def test_a_model_in_float64_has_its_states_in_float64():
    names = [f"blocks.1.hook_{site}" for site in ("ssm_input", "delta", "A", "B", "C", "h", "y")]
    saved = forward(golden.odd_model("float64"), golden.random_pairs("odd").clean, reads=names, own_scan=True)
    x, delta, A, B, C, h, y = (saved[name] for name in names)
    assert {v.dtype for v in (x, delta, B, C, h, y)} == {torch.float64}
    assert A.dtype == torch.float32  # as the stock mixer makes it
    A_bar, B_bar = scan.discretize(delta, A, B)
    want = scan.recurrence_reference(A_bar, B_bar * x[..., None], torch.zeros_like(h[:, 0]))
    assert relative_error(h, want) < 1e-13
    assert relative_error(y, scan.read_out(want, C)) < 1e-13


# -- what cannot be used ------------------------------------------------------------------------------------------

GOOD = torch.tensor([[0, 3, 5, 7]])


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (torch.tensor([[0, 512]]), "tokens must be 0 to 511 for this vocabulary; found 0 to 512"),
        (torch.tensor([[-1, 5]]), "tokens must be 0 to 511 for this vocabulary; found -1 to 5"),
        (torch.tensor([[0.0, 1.0]]), "whole numbers of shape .* not torch.float32"),
        (torch.tensor([0, 1, 2]), r"of shape \[batch, pos\]"),
        (torch.zeros(1, 0, dtype=torch.long), r"of shape \(1, 0\)"),
        (torch.zeros(0, 4, dtype=torch.long), "tokens"),
        (torch.tensor([[True, False]]), "whole numbers"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(tokens, says):
    with pytest.raises(InputError, match=says):
        im.run(golden.model(), tokens, {})
    with pytest.raises(InputError, match=says):
        im.read(golden.model(), tokens, ["hook_embed"])


@pytest.mark.parametrize(
    "hook",
    ["hook_embed", "blocks.1.hook_layer_input", "blocks.1.hook_y", "blocks.1.hook_h", "blocks.1.hook_h.2"],
)
@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (torch.zeros(1, 3), r"{}: the edit has shape \(1, 3\), the site \(1, "),
        (lambda x: x[:, :1], "{}: the edit has shape"),
        (lambda x: x * float("nan"), "{}: the edit holds NaN or infinity"),
        (lambda x: x / 0.0, "{}: the edit holds NaN or infinity"),
        (lambda x: None, "{}: the edit returned NoneType, not a tensor"),
        (lambda x: 3.0, "{}: the edit returned float, not a tensor"),
        ("zeros", "{}: an edit"),
    ],
)
def test_an_edit_that_cannot_be_written_is_refused_by_the_name_of_its_site(hook, edit, says):
    with pytest.raises(InputError, match=says.format(hook.replace(".", r"\."))):
        im.run(golden.model(), GOOD, {hook: edit})


def test_a_refused_edit_leaves_the_model_as_it_was():
    stock = im.run(golden.model(), GOOD, {})
    with pytest.raises(InputError, match="NaN"):
        im.run(golden.model(), GOOD, {"blocks.1.hook_y": lambda x: x * float("nan")})
    assert torch.equal(im.run(golden.model(), GOOD, {}), stock)
