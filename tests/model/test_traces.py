"""Edits in every kind of pass a trace can make: several invokes, a cache left on, steps of a generation, shapes only."""

import cloudpickle
import golden
import nnsight
import numpy
import pytest
import torch

import ioi_mamba as im
from ioi_mamba.errors import InputError
from ioi_mamba.model.families.mamba import MAMBA
from ioi_mamba.passes.sweep import resample_sweep

TOKENS = golden.golden_pairs().clean
WRITABLE = [site for site in MAMBA.sites if site not in ("h", "conv_slice", "conv_start", "h_start")]
EDITS = {site: {site: lambda x: 0.7 * x + 0.05} for site in WRITABLE}


def same(got, want, rounding=2e-6):
    """Equal up to the rounding of float32 in a pass of another layout."""
    return bool((got - want).abs().max() <= rounding * want.abs().max().clamp(min=1))


def change(m, site):
    setattr(m, site, 0.7 * getattr(m, site) + 0.05)


# -- several invokes ----------------------------------------------------------------------------------------------


def two_invokes(first, second, edit=None, layer=1):
    """Logits of the two, with `edit` of the opened mixer in the first alone."""
    model = golden.model()
    with model.trace(use_cache=False) as tracer:
        with tracer.invoke(first):
            if edit is not None:
                with im.mixer(model, layer) as m:
                    edit(m)
            one = model.lm_head.output.save()
        with tracer.invoke(second):
            two = model.lm_head.output.save()
    return one, two


@pytest.mark.parametrize("site", [*WRITABLE, "h", "conv_slice"])
def test_an_edit_in_one_of_two_invokes_reaches_its_rows_and_no_others(site):
    def edit(m):
        if site == "h":
            m.h[:, 4] = 0.3
        elif site == "conv_slice":
            m.conv_slice[-1] = m.conv_slice[-1] * 0.3
        else:
            change(m, site)

    alone, _ = two_invokes(TOKENS[:2], TOKENS[2:4])
    one, two = two_invokes(TOKENS[:2], TOKENS[2:4], edit)
    model = golden.model()
    with model.trace(TOKENS[:2], use_cache=False):
        with im.mixer(model, 1) as m:
            edit(m)
        want = model.lm_head.output.save()
    # A_log is shared by all rows: what is written to A in one invoke cannot be told apart from the others' by anybody.
    assert same(one, want)
    assert (one - alone).abs().max() > 1e-3
    assert same(two, im.run(model, TOKENS[2:4]))


@pytest.mark.parametrize("first", [1, 100, 127])
def test_parameters_are_not_taken_for_rows_where_the_rows_of_all_invokes_are_as_many_as_channels(first):
    """E of this model is 128: nnsight narrows whatever has that many entries on its first axis."""
    model = golden.model()
    rows = torch.randint(1, 512, (128, 6), generator=torch.Generator().manual_seed(0))
    names = ("conv", "ssm_input", "delta_2", "delta", "A", "A_bar", "B_bar", "h", "y", "ssm_output", "after_skip")
    with model.trace(use_cache=False) as tracer:
        with tracer.invoke(rows[:first]):
            with im.mixer(model, 1) as m:
                got = nnsight.save({"conv_slice": m.conv_slice[-1], **{name: getattr(m, name)[:] for name in names}})
                m.after_skip = m.after_skip * 0.5
            logits = model.lm_head.output.save()
        with tracer.invoke(rows[first:]):
            others = model.lm_head.output.save()
    want = im.read(model, rows[:first], [f"blocks.1.hook_{n}" for n in ("conv_slice.-1", *names)])
    for name, value in got.items():
        expected = want[f"blocks.1.hook_{'conv_slice.-1' if name == 'conv_slice' else name}"]
        assert value.shape == expected.shape, name
        assert same(value, expected), name
    assert same(logits, im.run(model, rows[:first], {"blocks.1.hook_after_skip": lambda x: x * 0.5}))
    assert same(others, im.run(model, rows[first:]))


# -- a cache left on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("site", WRITABLE)
def test_with_the_cache_on_an_edit_is_what_it_is_without(site, length):
    """The default of `use_cache`; a prompt shorter than the kernel is filled up in front by the cache."""
    model = golden.model()
    with model.trace(TOKENS[:2, :length]):
        with im.mixer(model, 1) as m:
            change(m, site)
        got = model.lm_head.output.save()
    assert same(got, im.run(model, TOKENS[:2, :length], {f"blocks.1.hook_{site}": lambda x: 0.7 * x + 0.05}))


@pytest.mark.parametrize("length", [1, 2, 5])
def test_with_the_cache_on_values_are_those_without(length):
    model = golden.model()
    names = [*WRITABLE, "h", "conv_start", "h_start"]
    with model.trace(TOKENS[:2, :length]):  # noqa: SIM117  the body of a trace is what is inside it
        with im.mixer(model, 2) as m:
            found = {}
            for name in MAMBA.sites:
                if name in names:
                    found[name] = m.h[:] if name == "h" else getattr(m, name)
            got = nnsight.save(found)
    want = im.read(model, TOKENS[:2, :length], [f"blocks.2.hook_{name}" for name in names])
    for name in names:
        assert same(got[name], want[f"blocks.2.hook_{name}"]), name


# -- steps of a generation ----------------------------------------------------------------------------------------

N_STEPS = 4


def generated(edit_at, edit, use_cache, layer=1):
    """Logits [step, row, vocab] of the last positions; `edit(m, position)` at the position that step `edit_at` ends at.

    Without a cache every later step runs the whole text again, so the same edit is made in each of them.
    """
    model, tokens = golden.model(), TOKENS[:2, :6]
    options = {"max_new_tokens": N_STEPS, "min_new_tokens": N_STEPS, "do_sample": False, "use_cache": use_cache}
    with model.generate(tokens, **options) as tracer:
        logits = nnsight.save([])
        for step in tracer.iter[0:N_STEPS]:
            with im.mixer(model, layer) as m:
                if step == edit_at or (step > edit_at and not use_cache):
                    edit(m, -1 if use_cache else tokens.shape[1] - 1 + edit_at)
            logits.append(model.lm_head.output[:, -1])
    return torch.stack(logits)


def _state(m, p):
    m.h[:, p] = 0.3


def _of(site):
    def edit(m, p):
        value = getattr(m, site)
        value[:, p] = 0.25

    return edit


STEP_EDITS = {site: _of(site) for site in WRITABLE if site != "A"} | {"h": _state}


@pytest.mark.parametrize("edit_at", [0, 1, 2])
@pytest.mark.parametrize("site", STEP_EDITS)
def test_an_edit_in_a_step_of_a_cached_generation_goes_on_in_the_steps_after_it(site, edit_at):
    edit = STEP_EDITS[site]
    got, want = generated(edit_at, edit, True), generated(edit_at, edit, False)
    plain = generated(edit_at, lambda m, p: None, True)
    assert same(got, want)
    assert same(got[:edit_at], plain[:edit_at]) if edit_at else True
    assert (got[edit_at] - plain[edit_at]).abs().max() > 1e-3


def test_an_edit_in_one_invoke_of_a_cached_generation_reaches_its_rows_alone():
    model, tokens = golden.model(), TOKENS[:, :6]
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}

    def both(edited):
        with model.generate(**options) as tracer:
            with tracer.invoke(tokens[:1]):
                one = nnsight.save([])
                for step in tracer.iter[0:3]:
                    with im.mixer(model, 1) as m:
                        if edited and step == 1:
                            m.h[:, -1] = 0.3
                    one.append(model.lm_head.output[:, -1])
            with tracer.invoke(tokens[1:3]):
                other = nnsight.save([])
                for _ in tracer.iter[0:3]:
                    other.append(model.lm_head.output[:, -1])
        return torch.stack(one), torch.stack(other)

    (one, other), (plain_one, plain_other) = both(True), both(False)
    assert same(other, plain_other)
    assert same(one[:1], plain_one[:1])
    assert all((one[step] - plain_one[step]).abs().max() > 1e-3 for step in (1, 2))


def test_reading_in_a_cached_generation_changes_nothing():
    def read_all(m, p):
        for name in MAMBA.sites:
            if name not in ("conv_slice", "h"):
                getattr(m, name)

    assert same(generated(1, read_all, True), generated(1, lambda m, p: None, True))


# -- edits in place -----------------------------------------------------------------------------------------------


def test_an_edit_in_place_that_leaves_the_numbers_holds_the_state():
    """`s *= 1` is a write: what is written before that position no longer reaches past it."""
    model = golden.model()

    def logits(hold):
        with model.trace(TOKENS, use_cache=False):
            with im.mixer(model, 1) as m:
                s = m.h[:, 10]
                if hold:
                    s *= 1.0
                m.h[:, 5] = 0.5
            out = model.lm_head.output.save()
        return out

    clean = im.read(model, TOKENS, "blocks.1.hook_h.10")["blocks.1.hook_h.10"]
    half = {"blocks.1.hook_h.5": lambda x: torch.full_like(x, 0.5)}
    assert same(logits(True), im.run(model, TOKENS, half | {"blocks.1.hook_h.10": clean}))
    assert same(logits(False), im.run(model, TOKENS, half))
    assert (logits(True) - logits(False)).abs().max() > 1e-3


# -- inference mode and shapes only ------------------------------------------------------------------------------


def test_everything_works_inside_inference_mode(mini):
    pairs = im.ioi.generate(mini.tokenizer, 2, seed=27, templates=im.ioi.ALIGNED_TEMPLATES, symmetric=True)
    edit = {"blocks.3.hook_h.4": 0, "blocks.2.hook_B_bar": lambda x: x * 0.5}
    want = (
        im.read(mini, pairs, "blocks.0.hook_h"),
        im.run(mini, pairs, edit),
        im.attribute(mini, pairs, method="eap").table,
    )
    with torch.inference_mode():
        inside = im.ioi.generate(mini.tokenizer, 2, seed=27, templates=im.ioi.ALIGNED_TEMPLATES, symmetric=True)
        got = (im.read(mini, inside, "blocks.0.hook_h"), im.run(mini, inside, edit))
        scores = im.attribute(mini, inside, method="eap").table
        with mini.trace(inside.clean, use_cache=False):
            with im.mixer(mini, 3) as m:
                s = m.h[:, 4]
                s *= 0
            logits = mini.lm_head.output.save()
    assert torch.equal(got[0]["blocks.0.hook_h"], want[0]["blocks.0.hook_h"])
    assert same(got[1], want[1])
    assert same(logits, im.run(mini, pairs, {"blocks.3.hook_h.4": 0}))
    assert numpy.allclose(scores["score"], want[2]["score"], atol=1e-6)


def test_a_mixer_opens_where_only_shapes_are_followed():
    model = golden.model()
    with model.scan(TOKENS, use_cache=False):  # noqa: SIM117
        with im.mixer(model, 1) as m:
            shape = nnsight.save(tuple(m.A_bar.shape))
            m.B_bar = m.B_bar * 0
            m.h[:, 3] = 0.5
    assert shape == (*TOKENS.shape, 128, 16)


# -- other sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["layer_input", "ssm_input", "conv_slice.0", "h", "h_and_conv"])
def test_a_convolution_of_one_tap_is_swept_like_any_other(site):
    model = golden.odd_model(conv_kernel=1)
    generator = torch.Generator().manual_seed(3)
    clean, corrupted = torch.randint(1, 60, (2, 3, 7), generator=generator)
    corrupted[:, 4:] = clean[:, 4:]
    pairs = im.Pairs.from_tokens(clean, corrupted, [1, 2, 3], [4, 5, 6])
    resumed, whole = (resample_sweep(model, pairs, site, resume=resume) for resume in (True, False))
    assert same(resumed, whole)
    everywhere = {"h_and_conv": "h"}.get(site, site)
    there = im.read(model, corrupted, f"blocks.1.hook_{everywhere}")[f"blocks.1.hook_{everywhere}"]

    def write(x):
        x = x.clone()
        x[:, 2] = there[:, 2]
        return x

    edit = {"blocks.1.hook_h.2": there[:, 2]} if everywhere == "h" else {f"blocks.1.hook_{site}": write}
    want = im.run(model, clean, edit)[torch.arange(3), -1]
    assert same(resumed[1, 2, :, 0], want[torch.arange(3), pairs.answer])
    assert (resumed[1, 2] - resumed[1, 5]).abs().max() > 1e-4


def test_swish_is_silu():
    silu, swish = golden.odd_model(), golden.odd_model(hidden_act="swish")
    tokens = torch.tensor([[0, 5, 9, 30]])
    edit = {"blocks.1.hook_conv": lambda x: x * 0.5}
    assert torch.equal(im.run(silu, tokens, edit), im.run(swish, tokens, edit))


def test_a_position_that_is_swept_twice_has_two_equal_columns():
    pairs = golden.golden_pairs()
    once = resample_sweep(golden.model(), pairs, "layer_input", layers=[1, 2], positions=[15])
    twice = resample_sweep(golden.model(), pairs, "layer_input", layers=[2, 1, 2], positions=[15, 3, 15])
    assert torch.equal(twice[:, 0], twice[:, 2])
    assert torch.equal(twice[0], twice[2])
    assert torch.equal(twice[1, 0], once[0, 0])


# -- what prompts and names may be -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16])
def test_token_ids_of_any_integer_type_are_taken(dtype):
    tokens = TOKENS % 200
    got = im.read(golden.model(), tokens.to(dtype), "blocks.1.hook_y")
    assert torch.equal(got["blocks.1.hook_y"], im.read(golden.model(), tokens, "blocks.1.hook_y")["blocks.1.hook_y"])


def test_prompts_may_be_texts_encodings_arrays_lists_or_pairs(mini):
    pairs = im.ioi.generate(mini.tokenizer, 1, seed=27, templates=im.ioi.ALIGNED_TEMPLATES, symmetric=True)
    text = pairs.texts[0][0]
    want = im.run(mini, pairs.clean[:1])
    bos = {"input_ids": [[0, *mini.tokenizer(text)["input_ids"]]]}
    encoding = mini.tokenizer("<|endoftext|>" + text, return_tensors="pt")
    for prompts in (
        text,
        [text],
        bos,
        encoding,
        dict(encoding),
        pairs[:1],
        pairs.clean[:1].numpy(),
        pairs.clean[:1].tolist(),
    ):
        assert same(im.run(mini, prompts), want)
    assert same(im.run(mini, list(pairs.clean[0].tolist())), want)


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        (["Then, Ana", "Then, Ana and Ivan went"], "3, 6 tokens|[0-9]+, [0-9]+ tokens"),
        ([[0, 1, 2], [0, 1]], "2, 3 tokens"),
        ({"input_ids": [[0, 1], [0, 5]], "attention_mask": [[1, 1], [0, 1]]}, "has padding"),
        ({"ids": [[0, 1]]}, "dict cannot be read as prompts"),
        (None, "NoneType cannot be read as prompts"),
        ([], "tokens"),
        (7, "shape"),
        ([[0.5, 1.0]], "whole numbers"),
        ([["a"], ["b"]], "cannot be read"),
    ],
)
def test_what_cannot_be_read_as_prompts_is_refused_in_one_sentence(mini, prompts, says):
    for verb in (lambda: im.read(mini, prompts, "hook_embed"), lambda: im.run(mini, prompts)):
        with pytest.raises(InputError, match=says) as error:
            verb()
        assert "\n" not in str(error.value)


def test_names_may_be_one_a_pattern_or_count_from_the_end():
    model = golden.model()
    assert list(im.read(model, TOKENS, "blocks.*.hook_h.7")) == [f"blocks.{i}.hook_h.7" for i in range(4)]
    slices = im.read(model, TOKENS, "blocks.2.hook_conv_slice.*")
    assert list(slices) == [f"blocks.2.hook_conv_slice.{s}" for s in (-3, -2, -1, 0)]
    every = im.read(model, TOKENS, ["blocks.1.hook_*", "blocks.1.hook_y"])
    assert "blocks.1.hook_h" in every
    assert len(every) == len(MAMBA.sites) - 1  # a conv slice needs its index
    last = im.read(model, TOKENS, ["blocks.-1.hook_y", "blocks.0.hook_h.-1"])
    assert torch.equal(last["blocks.-1.hook_y"], im.read(model, TOKENS, "blocks.3.hook_y")["blocks.3.hook_y"])
    assert torch.equal(last["blocks.0.hook_h.-1"], im.read(model, TOKENS, "blocks.0.hook_h")["blocks.0.hook_h"][:, -1])
    zeros = im.run(model, TOKENS, {"blocks.*.hook_out_proj": 0})
    by_hand = im.run(model, TOKENS, {f"blocks.{i}.hook_out_proj": torch.zeros_like for i in range(4)})
    assert torch.equal(zeros, by_hand)
    with pytest.raises(InputError, match="No hook name matches"):
        im.read(model, TOKENS, "blocks.*.hook_Bbar")
    with pytest.raises(InputError, match="same value"):
        im.read(model, TOKENS, ["blocks.-1.hook_y", "blocks.3.hook_y"])
    with pytest.raises(InputError, match="dictionary"):
        im.run(model, TOKENS, ["blocks.0.hook_y"])
    with pytest.raises(InputError, match="no hook name"):
        im.read(model, TOKENS, [3])


# -- other serialisers --------------------------------------------------------------------------------------------


def _uses_the_package(seed):
    return len(im.ioi.generate(im.open_model("mini", device="cpu").tokenizer, 1, seed=seed, symmetric=True))


def test_a_function_that_uses_the_package_survives_serialisers_also_after_its_code_travels():
    local = lambda seed: _uses_the_package(seed) + len(im.__all__)
    assert cloudpickle.loads(cloudpickle.dumps(local))(3) == local(3)
    im.open_model("mini", device="cpu", backend="local-serialized")
    assert cloudpickle.loads(cloudpickle.dumps(local))(3) == local(3)
    assert cloudpickle.loads(cloudpickle.dumps(im)) is im
