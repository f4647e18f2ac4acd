"""Layer x position sweeps: against the golden tables, and the resumed form against the plain one."""

import golden
import pytest
import reference
import torch
from conditioning import logit_rounding
from golden import at_last

import ioi_mamba as im
from ioi_mamba.errors import InputError
from ioi_mamba.passes import sweep
from ioi_mamba.passes.metrics import answer_logits
from ioi_mamba.passes.sweep import Roll, choice_scores, resample_sweep
from ioi_mamba.tasks.base import Pairs

TABLES = {
    key.removeprefix("sweep/"): value
    for key, value in golden.TENSORS.items()
    if key.startswith("sweep/") and "edge" not in key
}


def rounding(model, pairs):
    return logit_rounding(model, pairs.clean, pairs.corrupted)


def site_of(table):
    return f"conv_slice.{int(table[-1]) - 3}" if table.startswith("conv_slice") else table.removeprefix("hook_")


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(("resume", "positions"), [(True, range(20)), (False, [3, 4, 7, 13, 15, 19])])
def test_a_sweep_is_the_table_of_mambalens(table, resume, positions):
    model, pairs, want = golden.model(), golden.golden_pairs(), TABLES[table][:, list(positions)]
    got = resample_sweep(model, pairs, site_of(table), positions=list(positions), resume=resume)
    assert got.shape == want.shape
    assert (got - want).abs().max() < 2e-4


@pytest.mark.parametrize(
    "site", ["layer_input", "resid_pre", "skip", "conv_slice.-1", "C", "A_bar", "h", "y", "out_proj"]
)
@pytest.mark.parametrize("name", ["golden", "odd"])
def test_a_resumed_sweep_is_the_plain_one(name, site):
    model, pairs = golden.opened(name), golden.random_pairs(name)
    resumed, plain = (resample_sweep(model, pairs, site, resume=resume) for resume in (True, False))
    scale = im.run(model, pairs.clean, {}).abs().max()
    assert (resumed - plain).abs().max() < 1e-5 * scale
    assert (plain - plain[:, :1]).abs().max() > 1e-3


@pytest.mark.parametrize("site", ["layer_input", "conv_slice.-1", "h", "B_bar"])
def test_every_cell_is_the_run_with_that_one_value_overwritten(site):
    model, pairs, weights = golden.odd_model(), golden.random_pairs("odd"), golden.weights("odd")
    got = resample_sweep(model, pairs, site)
    corrupted = reference.run(weights, pairs.corrupted)
    for layer in range(3):
        for p in range(pairs.clean.shape[1]):
            name = f"blocks.{layer}.hook_{site}" + (f".{p}" if site == "h" else "")

            def write(x, name=name, p=p):
                return corrupted[name] if site == "h" else torch.where(here(x, p), corrupted[name], x)

            logits = at_last(reference.logits(weights, pairs.clean, {name: write}), pairs)
            want = answer_logits(logits, pairs.answer, pairs.wrong)
            assert (got[layer, p] - want).abs().max() < 1e-5 * logits.abs().max()


def here(x, position):
    return (torch.arange(x.shape[1]) == position).view(1, -1, *[1] * (x.ndim - 2))


def test_some_layers_and_positions_are_those_cells_of_the_whole_sweep():
    model, pairs = golden.model(), golden.golden_pairs()
    whole = resample_sweep(model, pairs, "in_proj")
    some = resample_sweep(model, pairs, "in_proj", layers=[3, 1], positions=[15, 4])
    torch.testing.assert_close(some, whole[[3, 1]][:, [15, 4]], rtol=0, atol=rounding(model, pairs))


@pytest.mark.parametrize("resume", [True, False])
def test_ragged_pairs_are_swept_as_each_pair_alone_would_be(resume):
    model = golden.model()
    pairs = golden.random_pairs("golden", lengths=[9, 6, 8, 5])
    whole = resample_sweep(model, pairs, "layer_input", resume=resume)
    for row, length in enumerate(pairs.lengths.tolist()):
        alone = pairs[[row]]
        alone = im.Pairs.from_tokens(alone.clean[:, :length], alone.corrupted[:, :length], alone.answer, alone.wrong)
        table = resample_sweep(model, alone, "layer_input", resume=resume)
        torch.testing.assert_close(whole[:, :length, row], table[:, :, 0], rtol=0, atol=rounding(model, alone))
        clean = answer_logits(choice_scores(model, alone, alone.clean), alone.answer, alone.wrong)
        torch.testing.assert_close(
            whole[:, length:, row], clean.expand(4, 9 - length, 2), rtol=0, atol=rounding(model, alone)
        )


def test_the_number_of_rows_in_a_pass_changes_nothing(monkeypatch):
    model, pairs = golden.model(), golden.golden_pairs()
    whole = resample_sweep(model, pairs, "h", layers=[1], positions=[3, 9])
    monkeypatch.setattr(sweep, "rows_per_chunk", lambda *_: 2)
    split = resample_sweep(model, pairs, "h", layers=[1], positions=[3, 9])
    torch.testing.assert_close(split, whole, rtol=0, atol=rounding(model, pairs))


@pytest.mark.parametrize("tokens", [1, 10**6])
@pytest.mark.parametrize("site", ["layer_input", "ssm_input"])
def test_the_number_of_layers_that_share_a_pass_changes_nothing(tokens, site, monkeypatch):
    model, pairs = golden.opened("odd"), golden.random_pairs("odd")
    plain = resample_sweep(model, pairs, site, layers=[2, 0, 1, 2], resume=False)
    monkeypatch.setattr(sweep, "TOKENS_OF_A_PASS", tokens)
    shared = resample_sweep(model, pairs, site, layers=[2, 0, 1, 2])
    torch.testing.assert_close(shared, plain, rtol=0, atol=rounding(model, pairs))


def test_progress_counts_up_to_its_total(monkeypatch):
    monkeypatch.setattr(sweep, "rows_per_chunk", lambda *_: 2)
    calls = []
    resample_sweep(
        golden.odd_model(),
        golden.random_pairs("odd"),
        "y",
        layers=[0, 2],
        positions=[2, 5],
        progress=lambda *c: calls.append(c),
    )
    done, totals = zip(*calls, strict=True)
    assert set(totals) == {4}
    assert list(done) == sorted(done)
    assert done[-1] == totals[-1]


@pytest.mark.parametrize(
    ("site", "options", "says"),
    [
        ("Bbar", {}, "did you mean"),
        ("conv_slice.-4", {}, "slices are -3 to 0"),
        ("y", {"layers": [4]}, "layers 0 to 3, not 4"),
        ("y", {"positions": [20]}, "positions"),
        ("y", {"positions": [-1]}, "positions"),
        ("y", {"positions": []}, "positions"),
        ("A", {}, "A"),
        ("h_start", {}, "h_start"),
        ("conv_start", {}, "conv_start"),
        ("h.3", {}, "h.3"),
    ],
)
def test_a_sweep_over_what_is_not_there_is_refused(site, options, says):
    with pytest.raises(InputError, match=says):
        resample_sweep(golden.model(), golden.golden_pairs(), site, **options)


def test_a_roll_has_the_states_and_conv_inputs_of_the_whole_pass_and_what_it_reads_on_the_way():
    model, tokens = golden.model(), golden.golden_pairs().clean
    want = im.read(model, tokens, [f"blocks.{i}.hook_{s}" for i in range(4) for s in ("h", "in_proj", "y")])
    roll = Roll.begin(model, tokens)
    for position in range(6):
        roll, at = roll.step(["blocks.2.hook_y", "hook_embed"])
        assert roll.position == position + 1
        torch.testing.assert_close(
            at["blocks.2.hook_y"][:, 0], want["blocks.2.hook_y"][:, position], rtol=1e-4, atol=1e-5
        )
        for i in range(4):
            torch.testing.assert_close(roll.h_start[i], want[f"blocks.{i}.hook_h"][:, position], rtol=1e-4, atol=1e-5)
    for i in range(4):
        torch.testing.assert_close(roll.conv_start[i], want[f"blocks.{i}.hook_in_proj"][:, 3:6], rtol=1e-4, atol=1e-5)


def test_the_whole_memory_of_a_layer_is_exchanged_slice_by_slice(tiny_mamba):
    """`h_and_conv` against the obvious form: the state, and every conv slice that reaches back past the position."""
    generator = torch.Generator().manual_seed(5)
    clean = torch.randint(1, 40, (3, 8), generator=generator)
    corrupted = clean.clone()
    corrupted[:, 2] = (corrupted[:, 2] + 11) % 40
    pairs = Pairs.from_tokens(clean, corrupted, clean[:, 0], corrupted[:, 2])
    layer, width = 2, tiny_mamba.config.conv_kernel
    slices = [f"blocks.{layer}.hook_conv_slice.{s}" for s in range(1 - width, 1)]
    source = im.read(tiny_mamba, corrupted, [*slices, f"blocks.{layer}.hook_h"])
    got = resample_sweep(tiny_mamba, pairs, "h_and_conv", layers=[layer])[0]
    moved = 0.0
    for p in range(2, 8):

        def exchanged(name, p=p):
            s = int(name.rsplit(".", 1)[1])

            def write(x):
                for t in range(p + 1, x.shape[1]):
                    if t + s <= p:
                        x[:, t] = source[name][:, t]
                return x

            return write

        edits = {name: exchanged(name) for name in slices}
        edits[f"blocks.{layer}.hook_h.{p}"] = source[f"blocks.{layer}.hook_h"][:, p]
        logits = im.run(tiny_mamba, clean, edits)[:, -1]
        rows = torch.arange(3)
        want = torch.stack([logits[rows, pairs.answer], logits[rows, pairs.wrong]], -1)
        torch.testing.assert_close(got[p], want, rtol=0, atol=rounding(tiny_mamba, pairs))
        moved = max(moved, float((want - got[0]).abs().max()))
    assert moved > 100 * rounding(tiny_mamba, pairs)
