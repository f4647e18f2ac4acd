"""`with im.mixer(model, layer) as m` in a plain trace: the same edits as by name, and no edit that is silently dead."""

import golden
import nnsight
import pytest
import torch

import ioi_mamba as im
from ioi_mamba.errors import InputError
from ioi_mamba.model.families.mamba import MAMBA
from ioi_mamba.model.layer_pass import fitted

PLAIN = [site for site in MAMBA.sites if site not in ("h", "conv_slice")]
TOKENS = golden.golden_pairs().clean


def trace(do, layers=(1,), tokens=TOKENS, **options):
    """Logits of a plain trace in which `do` is called with the opened mixer of each layer in turn."""
    model = golden.model()
    with model.trace(tokens, use_cache=False, **options):
        for layer in layers:
            with im.mixer(model, layer) as m:
                do(m)
        logits = model.lm_head.output.save()
    return logits


def stock():
    return im.run(golden.model(), TOKENS, {})


def change(x):
    return x * 0.7 + 0.05


def same(got, want):
    """Equal up to how the graph of the pass rounds: 1e-6 of the largest logit."""
    return bool((got - want).abs().max() <= 1e-6 * want.abs().max())


@pytest.mark.parametrize("site", PLAIN)
def test_assigning_a_site_is_the_edit_of_that_name(site):
    want = im.run(golden.model(), TOKENS, {f"blocks.1.hook_{site}": change})
    assert (want - stock()).abs().max() > 1e-3
    assert same(trace(lambda m: setattr(m, site, change(getattr(m, site)))), want)


@pytest.mark.parametrize("site", PLAIN)
def test_an_edit_in_place_is_the_edit_of_that_name(site):
    def edit(m):
        value = getattr(m, site)
        value *= 0.7
        value += 0.05

    assert same(trace(edit), im.run(golden.model(), TOKENS, {f"blocks.1.hook_{site}": change}))


@pytest.mark.parametrize("s", [-3, -2, -1, 0])
def test_a_conv_slice_is_written_by_its_index_either_way(s):
    def assign(m):
        m.conv_slice[s] = change(m.conv_slice[s])

    def in_place(m):
        m.conv_slice[s][:, 3] = 0.5

    by_name = f"blocks.1.hook_conv_slice.{s}"
    assert same(trace(assign), im.run(golden.model(), TOKENS, {by_name: change}))

    def half_there(x):
        x[:, 3] = 0.5
        return x

    assert same(trace(in_place), im.run(golden.model(), TOKENS, {by_name: half_there}))


def test_a_state_written_at_a_position_is_what_the_recurrence_goes_on_from():
    value = torch.randn(5, 128, 16, generator=torch.Generator().manual_seed(0))

    def assign(m):
        m.h[:, 7] = value

    got = trace(assign)
    assert same(got, im.run(golden.model(), TOKENS, {"blocks.1.hook_h.7": value}))
    assert torch.allclose(got[:, :7], stock()[:, :7], atol=1e-4)
    assert (got - stock())[:, 7:].abs().amax((0, 2)).min() > 1e-3


def test_a_state_can_be_scaled_where_it_stands():
    def scale(m):
        m.h[:, 7] *= 0.5

    def in_place(m):
        m.h[:, 7].mul_(0.5)

    want = im.run(golden.model(), TOKENS, {"blocks.1.hook_h.7": lambda h: h * 0.5})
    assert same(trace(scale), want)
    assert same(trace(in_place), want)


def test_states_of_some_rows_and_channels_can_be_written_and_later_ones_see_earlier_ones():
    def edit(m):
        m.h[1:3, 4, :10] = 0.0
        m.h[:, 9] = m.h[:, 9] * 2

    def first(h):
        h[1:3, :10] = 0
        return h

    want = im.run(golden.model(), TOKENS, {"blocks.1.hook_h.4": first, "blocks.1.hook_h.9": lambda h: h * 2})
    assert same(trace(edit), want)


def test_all_states_can_be_assigned_at_once():
    states = im.read(golden.model(), golden.golden_pairs().corrupted, ["blocks.1.hook_h"])["blocks.1.hook_h"]
    want = im.run(golden.model(), TOKENS, {"blocks.1.hook_h": states})
    assert same(trace(lambda m: setattr(m, "h", states)), want)


def test_edits_at_several_sites_of_several_layers_combine():
    def edit(m):
        m.layer_input[:, 2] *= 0.5
        m.skip = change(m.skip)
        m.conv_slice[-1] *= 0.5
        m.B = change(m.B)
        m.B_bar[:, 4] = 0
        m.h[:, 7] *= 0.5
        m.y = change(m.y)
        m.out_proj[:, 5] *= 0.5

    def at(position, factor):
        def scale(x):
            x[:, position] *= factor
            return x

        return scale

    half = lambda x: x * 0.5
    by_site = {
        "layer_input": at(2, 0.5),
        "skip": change,
        "conv_slice.-1": half,
        "B": change,
        "B_bar": at(4, 0.0),
        "h.7": half,
        "y": change,
        "out_proj": at(5, 0.5),
    }
    edits = {f"blocks.{layer}.hook_{site}": do for layer in (0, 1, 3) for site, do in by_site.items()}
    assert same(trace(edit, layers=(0, 1, 3)), im.run(golden.model(), TOKENS, edits))


def test_reading_every_site_leaves_the_logits_bit_for_bit_as_they_were():
    def look(m):
        for site in PLAIN:
            getattr(m, site)
            if site == "conv_start":
                m.conv_slice[-2]
            if site == "h_start":
                m.h[:, 3]

    assert torch.equal(trace(look, layers=range(4)), stock())


def test_what_is_read_in_a_trace_can_be_saved():
    model, kept = golden.model(), {}
    names = [f"blocks.1.hook_{site}" for site in PLAIN]

    with model.trace(TOKENS, use_cache=False):
        with im.mixer(model, 1) as m:
            for site in PLAIN:
                kept[f"blocks.1.hook_{site}"] = getattr(m, site)
        kept = nnsight.save(kept)
    want = im.read(model, TOKENS, names)
    assert all(torch.equal(kept[name], want[name]) for name in names)


def test_a_mask_of_ones_changes_nothing():
    def edit(m):
        m.B_bar[:, 4] = 0

    ones = torch.ones_like(TOKENS)
    assert torch.equal(trace(lambda m: None, attention_mask=ones), stock())
    assert torch.equal(trace(edit, attention_mask=ones), trace(edit))


def test_a_trace_without_an_opened_mixer_is_the_stock_model():
    assert torch.equal(trace(lambda m: None, layers=()), golden.model()._module(TOKENS, use_cache=False).logits)


def test_nothing_before_the_edited_position_changes():
    def edit(m):
        m.ssm_input[:, 9] = 1.0

    got, before = trace(edit), stock()
    assert (got - before)[:, :9].abs().max() < 1e-5 * before.abs().max()
    assert (got - before)[:, 9].abs().max() > 1e-3


# Each pair: what is asked for first, then what can no longer be written because the first was computed from it.
LATE = [
    ("y", "delta"),
    ("y", "A_bar"),
    ("y", "h_start"),
    ("h", "B_bar"),
    ("h", "ssm_write"),
    ("ssm_write", "B_bar"),
    ("A_bar", "delta_2"),
    ("ssm_output", "y"),
    ("after_skip", "ssm_output"),
    ("after_skip", "delta"),
    ("conv", "conv_start"),
    ("ssm_input", "conv"),
    ("ssm_input", "conv_start"),
    ("delta", "B"),
    ("out_proj", "after_skip"),
    ("resid_post", "resid_pre"),
]


@pytest.mark.parametrize(("used", "late"), LATE)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_write_that_comes_too_late_is_refused_and_says_what_to_do(used, late, in_place):
    def edit(m):
        value = None if late == "h" else getattr(m, late)
        _ = m.h[:, 3] if used == "h" else getattr(m, used)
        if in_place:
            value += 1.0
            m.out_proj  # noqa: B018  the mixer looks at what it lent when the next value is asked for, or at its end
        else:
            setattr(m, late, value * 0.5)

    with pytest.raises(InputError, match=f"blocks.1.hook_{late} cannot be written any more.*write it first"):
        trace(edit)


def test_a_conv_slice_cannot_be_written_once_the_convolution_was_read():
    def edit(m):
        m.conv  # noqa: B018
        m.conv_slice[-1] = 0 * m.conv

    with pytest.raises(InputError, match=r"hook_conv_slice\.-1 cannot be written any more: conv was already"):
        trace(edit)


def test_a_state_cannot_be_written_once_the_output_was_read():
    def edit(m):
        m.y  # noqa: B018
        m.h[:, 3] = 0.0

    with pytest.raises(InputError, match="hook_h cannot be written any more: y was already"):
        trace(edit)


def test_a_site_that_the_pass_has_left_is_refused_and_says_so():
    def look(m):
        m.y  # noqa: B018
        m.conv  # noqa: B018

    with pytest.raises(InputError, match=r"blocks.1.hook_conv was asked for too late"):
        trace(look)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.zeros(2, 2), r"blocks.1.hook_y: the edit has shape \(2, 2\), the site \(5, 20, 128\)"),
        (torch.full((5, 20, 128), torch.inf), "blocks.1.hook_y: the edit holds NaN or infinity"),
        (3.0, "blocks.1.hook_y: an edit must be a tensor, not float"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_the_name_of_its_site(value, says):
    with pytest.raises(InputError, match=says):
        trace(lambda m: setattr(m, "y", value))


def test_a_state_that_is_not_finite_is_refused():
    def edit(m):
        m.h[:, 3] = torch.nan

    with pytest.raises(InputError, match="NaN"):
        trace(edit)


@pytest.mark.parametrize(
    "verb", [lambda m: m.y, lambda m: m.h[:, 2], lambda m: m.conv_slice[0], lambda m: setattr(m, "y", 0)]
)
def test_a_mixer_outside_its_block_is_refused(verb):
    with pytest.raises(InputError, match="used in a block of its own"):
        verb(im.mixer(golden.model(), 1))


def test_a_mixer_after_its_block_is_refused():
    model = golden.model()

    def write_after_the_block():
        with model.trace(TOKENS, use_cache=False):
            with im.mixer(model, 1) as m:
                m.y = m.y * 2
            m.out_proj *= 0

    with pytest.raises(InputError, match="used in a block of its own"):
        write_after_the_block()


@pytest.mark.parametrize("layer", [-5, 4])
def test_a_mixer_of_a_layer_that_is_not_there_is_refused(layer):
    with pytest.raises(InputError, match=f"layers 0 to 3, not {layer}"):
        im.mixer(golden.model(), layer)


@pytest.mark.parametrize("s", [1, -4])
def test_a_slice_that_is_not_there_is_refused(s):
    with pytest.raises(InputError, match=f"slices are -3 to 0, not {s}"):
        trace(lambda m: m.conv_slice[s])


@pytest.mark.parametrize("key", [(slice(None), 20), (slice(None), 3, 128)])
def test_a_state_that_is_not_there_is_refused(key):
    with pytest.raises((InputError, IndexError), match=r"out of bounds|positions 0 to 19"):
        trace(lambda m: m.h[key])


def test_a_site_that_is_not_there_is_no_attribute():
    with pytest.raises(AttributeError, match="no site 'Bbar'"):
        trace(lambda m: m.Bbar)
    with pytest.raises(AttributeError, match="'Bbar' cannot be assigned"):
        trace(lambda m: setattr(m, "Bbar", 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_whose_sum_overflows_are_finite_and_one_that_is_not_is_found_among_them(dtype):
    large = torch.full((2, 3, 4), torch.finfo(dtype).max, dtype=dtype)
    assert torch.equal(fitted("site", large, large), large)
    for bad in ([torch.inf], [torch.inf, -torch.inf], [torch.nan]):
        values = torch.zeros(24, dtype=dtype)
        values[torch.arange(len(bad))] = torch.tensor(bad, dtype=dtype)
        with pytest.raises(InputError, match="holds NaN or infinity"):
            fitted("site", values.view(2, 3, 4), large)
