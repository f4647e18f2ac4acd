"""Steering against prompts run one at a time, and its test prompts against the published ones."""

import hashlib
import random
from typing import NamedTuple

import pytest
import torch

import ioi_mamba as im
from ioi_mamba.analyses import layer_ablation, name_steering
from ioi_mamba.errors import InputError
from ioi_mamba.passes.intervals import share_interval
from ioi_mamba.passes.sweep import resample_sweep
from ioi_mamba.steering import bottleneck, steer
from ioi_mamba.tasks.base import Pairs

SLOTS = ("n1", "n2", "n3", "n4", "n5")


class Place(NamedTuple):
    layer: int
    offset: int

    @property
    def hook(self):
        return f"blocks.{self.layer}.hook_ssm_input"


@pytest.fixture(scope="module")
def place(mini):
    """Where `mini` takes a name in, so that steering there has effects both ways."""
    corrupted_first = im.ioi.generate(
        mini.tokenizer, 8, 27, templates=im.ioi.ALIGNED_TEMPLATES, corruptions=im.ioi.CORRUPTIONS[:1], symmetric=True
    )
    name = int(corrupted_first.first_difference[0])
    positions = list(range(name, name + mini.config.conv_kernel))
    logits = resample_sweep(mini, corrupted_first, "ssm_input", positions=positions)
    kept = (logits[..., 0] - logits[..., 1]).mean(-1)
    return Place(*divmod(int(kept.argmin()), len(positions)))


@pytest.fixture(scope="module")
def pairs(mini):
    return im.ioi.generate(mini.tokenizer, 60, 27, symmetric=True)


@pytest.fixture(scope="module")
def averages(mini, pairs, place):
    return steer.averages(mini, pairs, place.layer, offset=place.offset)


def by_hand(model, pairs, place, leave_out=()):
    """{(name, slot): [vectors]} of every clean and corrupted prompt, each read alone."""
    found = {}
    for tokens in (pairs.clean, pairs.corrupted):
        for row in range(len(pairs)):
            if tokens[row].tolist() not in leave_out:
                x = im.read(model, tokens[row : row + 1], [place.hook])[place.hook][0]
                for slot in SLOTS:
                    at = int(pairs.roles[slot][row])
                    found.setdefault((int(tokens[row, at]), slot), []).append(x[at + place.offset])
    return found


@pytest.fixture(scope="module")
def vectors(mini, pairs, place):
    return {key: torch.stack(found).mean(0) for key, found in by_hand(mini, pairs, place).items()}


def steered_logits(model, place, tokens, last, at, method, vectors, new, old, source):
    """Last-position logits of one prompt, edited by hand."""

    def edit(x):
        if method == "replace":
            x[0, at + place.offset] = vectors[new, source]
        else:
            x[0, at + place.offset] += vectors[new, source] - vectors[old, source]
        return x

    return im.run(model, tokens[None], {place.hook: edit})[0, last]


def test_averages_are_those_of_prompts_read_one_at_a_time(mini, pairs, place, averages, vectors):
    counts = {key: len(found) for key, found in by_hand(mini, pairs, place).items()}
    assert averages.slots == SLOTS
    assert int(averages.count.sum()) == 2 * len(pairs) * 5
    for (name, slot), count in counts.items():
        row = averages.names.tolist().index(name)
        assert averages.count[row, SLOTS.index(slot)] == count
        mean = averages.look_up(torch.tensor([name]), slot)[0]
        torch.testing.assert_close(mean, vectors[name, slot], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_averages_may_be_taken_anywhere_after_the_name(mini, pairs, place, offset):
    part, place = pairs[:15], place._replace(offset=offset)
    made = steer.averages(mini, part, place.layer, offset=offset)
    for (name, slot), found in by_hand(mini, part, place).items():
        mean = made.look_up(torch.tensor([name]), slot)[0]
        torch.testing.assert_close(mean, torch.stack(found).mean(0), atol=1e-5, rtol=1e-4)


def test_a_name_too_near_the_end_has_no_average(mini, pairs):
    part = pairs[:15]
    made = steer.averages(mini, part, 0, offset=5)
    assert (made.count[:, 4] == 0).all()
    assert int(made.count[:, 3].sum()) == 2 * len(part)


def test_prompts_left_out_are_in_no_average(mini, pairs, place):
    part = pairs[:20]
    out = part.clean[:3]
    kept = by_hand(mini, part, place, leave_out=out.tolist())
    made = steer.averages(mini, part, place.layer, offset=place.offset, leave_out=out)
    assert int(made.count.sum()) == sum(map(len, kept.values())) < 2 * len(part) * 5
    for (name, slot), found in kept.items():
        torch.testing.assert_close(
            made.look_up(torch.tensor([name]), slot)[0], torch.stack(found).mean(0), atol=1e-5, rtol=1e-4
        )
    with pytest.raises(InputError, match="left out"):
        steer.averages(mini, part, place.layer, leave_out=torch.cat([part.clean, part.corrupted]))


def test_the_test_prompts_are_the_published_ones(mini):
    pairs = name_steering.default_pairs(mini.tokenizer, None, 27)
    cells = name_steering.sample_cells(pairs, 101, 27)
    assert pairs.texts is not None
    lines = [f"{slot},{source},{pairs.texts[k][0]}" for (slot, source), rows in cells.items() for k in rows.tolist()]
    assert lines[0].startswith("1,1,Afterwards Steven, Kyle and Elizabeth went to the station.")
    # The 2,525 prompts behind figure 9 in their order, reconstructed from the published code.
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "9b77f3421d3e504ff3ac1002fa90470512dc0623ea8558c133d9cf7b39517a6f"


def test_sampling_leaves_the_global_generator_alone(pairs):
    random.seed(1)
    before = random.getstate()
    name_steering.sample_cells(pairs, 2, 27)
    assert random.getstate() == before


def distinct_rows(pairs, per_cell, seed):
    """Of each cell the rows that are drawn, each prompt once, as [(row, the name in the slot)]."""
    rng, cells = random.Random(seed), {}
    for slot in range(1, 6):
        for source in range(1, 6):
            rows = []
            while len(rows) < per_cell:
                row = rng.choice(range(2 * len(pairs))) // 2
                holder = int(pairs.clean[row, pairs.roles[f"n{slot}"][row]])
                if slot > 3 or holder == int(pairs.answer[row]):
                    rows.append((row, holder))
            cells[slot, source] = list(dict.fromkeys(rows))
    return cells


def wins_of(model, pairs, place, vectors_of, cell, rows):
    """{row: whether the intended name wins} of the rows of a cell that can be tested; vectors_of: of a row."""
    wins = {}
    for row, holder in rows:
        answer, wrong = int(pairs.answer[row]), int(pairs.wrong[row])
        new, target = (wrong, wrong) if cell.slot <= 3 else (answer, holder)
        needed, vectors = [new] if cell.method == "replace" else [new, holder], vectors_of(row)
        if all((name, f"n{cell.source_slot}") in vectors for name in needed):
            logits = steered_logits(
                model,
                place,
                pairs.clean[row],
                int(pairs.last[row]),
                int(pairs.roles[f"n{cell.slot}"][row]),
                cell.method,
                vectors,
                new,
                holder,
                f"n{cell.source_slot}",
            )
            wins[row] = float(logits[target] > logits[answer])
    return wins


def share_of(pairs, outcomes):
    """(share, n, low, high) of outcomes by row, the two directions of a pair being one cluster."""
    rows = torch.tensor(list(outcomes))
    values = torch.tensor(list(outcomes.values()), dtype=torch.float64)
    low, high = share_interval(values, (rows % (len(pairs) // 2)).unique(return_inverse=True)[1])
    return float(values.mean()), len(rows), float(low), float(high)


def test_every_cell_is_that_of_prompts_steered_one_at_a_time(mini, pairs, place, vectors):
    table = name_steering.EXPERIMENT(
        mini, pairs, layer=place.layer, offset=place.offset, per_cell=4, seed=5, leave_out=False
    )
    assert tuple(table.columns) == tuple(column.name for column in name_steering.COLUMNS)
    assert len(table) == 50
    seen, blocks = distinct_rows(pairs, 4, 5), {}
    for cell in table.itertuples():
        wins = wins_of(mini, pairs, place, lambda row: vectors, cell, seen[cell.slot, cell.source_slot])
        assert cell.n == len(wins)
        if wins:
            assert (cell.success, cell.n, cell.low, cell.high) == pytest.approx(share_of(pairs, wins))
        block = blocks.setdefault((cell.method, cell.slot <= 3, cell.source_slot <= 3), {})
        for row, win in wins.items():
            block.setdefault(row, []).append(win)
    for cell in table.itertuples():
        block = blocks[cell.method, cell.slot <= 3, cell.source_slot <= 3]
        want = share_of(pairs, {row: sum(wins) / len(wins) for row, wins in sorted(block.items())})
        assert (cell.block_success, cell.block_n, cell.block_low, cell.block_high) == pytest.approx(want)
    assert 0 < table["success"].mean() < 1


def test_a_prompt_drawn_many_times_is_one_outcome(mini, pairs, place):
    few = pairs[[0, 1, 2, 60, 61, 62]]
    table = name_steering.EXPERIMENT(mini, few, layer=place.layer, offset=place.offset, leave_out=False)
    assert table["n"].max() <= 6
    assert table["block_n"].max() <= 6
    # Three pairs that all win say no more than three draws.
    assert (table["high"] - table["low"]).min() > 0.5


def test_a_test_prompts_own_pair_is_in_none_of_the_averages_it_is_steered_with(mini, place):
    pairs = im.ioi.generate(mini.tokenizer, 40, 27, symmetric=True)
    table = name_steering.EXPERIMENT(mini, pairs, layer=place.layer, offset=place.offset, per_cell=6, seed=5)
    assert table["leave_out"].all()
    assert set(table["prompts_a_name"]) == {80 / len(set(names_in(pairs)))}
    seen = distinct_rows(pairs, 6, 5)

    every = [(side[row].tolist(), row) for side in (pairs.clean, pairs.corrupted) for row in range(len(pairs))]
    x = {tuple(tokens): im.read(mini, torch.tensor([tokens]), [place.hook])[place.hook][0] for tokens, _ in every}

    def vectors_of(row):
        out, found = [side[row].tolist() for side in (pairs.clean, pairs.corrupted)], {}
        for tokens, k in every:
            for slot in SLOTS if tokens not in out else ():
                at = int(pairs.roles[slot][k])
                found.setdefault((tokens[at], slot), []).append(x[tuple(tokens)][at + place.offset])
        return {key: torch.stack(each).mean(0) for key, each in found.items()}

    cells = table[(table["slot"].isin([1, 4])) & table["source_slot"].isin([2, 4])]
    assert cells["n"].sum() >= 5
    for cell in cells.itertuples():
        wins = wins_of(mini, pairs, place, vectors_of, cell, seen[cell.slot, cell.source_slot])
        assert cell.n == len(wins)
        if wins:
            assert cell.success == pytest.approx(sum(wins.values()) / len(wins))


def names_in(pairs):
    return [name for slot in SLOTS for name in pairs.clean.gather(1, pairs.roles[slot][:, None])[:, 0].tolist()]


def test_with_enough_prompts_a_name_the_averages_are_the_published_ones(mini, place, monkeypatch):
    pairs = im.ioi.generate(mini.tokenizer, 10, 27, symmetric=True)
    with monkeypatch.context() as patch:
        patch.setattr(name_steering, "ENOUGH", 0.1)
        many = name_steering.EXPERIMENT(mini, pairs, layer=place.layer, offset=place.offset, per_cell=2)
    few = name_steering.EXPERIMENT(mini, pairs, layer=place.layer, offset=place.offset, per_cell=2)
    assert not many["leave_out"].any()
    assert few["leave_out"].all()
    assert "test prompts included" in name_steering.findings(many)[1]
    assert "without a test prompt's own pair" in name_steering.findings(few)[1]
    # Names of ten pairs are rarely in another prompt: what was steered were the test prompts' own vectors.
    assert few["n"].sum() < many["n"].sum()


def test_steer_continues_as_the_prompt_edited_by_hand(mini, pairs, place, averages, vectors):
    for method in steer.METHODS:
        row, slot = 3, "n3"
        at, tokens = int(pairs.roles[slot][row]), pairs.clean[row, : int(pairs.last[row]) + 1]
        old = int(tokens[at])
        new = next(name for name, own in vectors if own == slot and name not in tokens.tolist())
        word = mini.tokenizer.decode([new]).strip()
        expected, grown = [], tokens
        for _ in range(3):
            logits = steered_logits(mini, place, grown, -1, at, method, vectors, new, old, slot)
            if int(logits.argmax()) == mini.tokenizer.eos_token_id:
                break
            expected.append(int(logits.argmax()))
            grown = torch.cat([grown, logits.argmax()[None]])
        assert pairs.texts is not None
        text = pairs.texts[row][0]
        found = steer.steer(mini, text, {slot: word}, method=method, averages=averages, max_new_tokens=3)
        assert found == mini.tokenizer.decode(expected)


def test_steer_without_names_is_the_model_itself(mini, averages):
    prompt = "Then, Sarah, Ivan and Leah went to the office. Sarah and Ivan gave a bone to"
    assert steer.steer(mini, prompt, {}, averages=averages, max_new_tokens=1) == " Leah"


def test_several_names_are_rewritten_in_one_pass(mini, pairs, place, averages, vectors):
    row = next(k for k in range(len(pairs)) if pairs.answer[k] == pairs.clean[k, pairs.roles["n3"][k]])
    tokens = pairs.clean[row, : int(pairs.last[row]) + 1]
    new = {
        slot: next(name for name, own in vectors if own == slot and name not in tokens.tolist())
        for slot in ("n1", "n3")
    }

    def edit(x):
        for slot, name in new.items():
            x[0, int(pairs.roles[slot][row]) + place.offset] = vectors[name, slot]
        return x

    expected = int(im.run(mini, tokens[None], {place.hook: edit})[0, -1].argmax())
    words = {slot: mini.tokenizer.decode([name]).strip() for slot, name in new.items()}
    assert pairs.texts is not None
    found = steer.steer(mini, pairs.texts[row][0], words, averages=averages, method="replace", max_new_tokens=1)
    assert found == mini.tokenizer.decode([expected])


def test_the_averages_of_steer_are_made_once_for_a_model_and_a_place(mini, monkeypatch):
    made, real = [], steer.averages
    monkeypatch.setattr(steer, "_PAIRS_FOR_STEER", 40)
    monkeypatch.setattr(steer, "_kept", steer._OfModel())  # what other tests find is not to be made of so few
    monkeypatch.setattr(steer, "averages", lambda *a, **k: made.append((a[2], k["offset"])) or real(*a, **k))
    monkeypatch.setattr(steer, "find_layer", lambda model: 3)
    prompt = "Then, Sarah, Ivan and Leah went to the office. Sarah and Ivan gave a bone to"
    monkeypatch.setattr(steer, "find_offset", lambda model, layer: 2)
    for layer, offset in ((1, 0), (1, 0), (1, 1), (None, None), (None, None), (3, None)):
        steer.steer(mini, prompt, {}, layer=layer, offset=offset, max_new_tokens=1)
    assert made == [(1, 0), (1, 1), (3, 2)]


def test_after_the_weights_changed_the_averages_and_the_layer_are_those_of_the_new_weights(monkeypatch):
    monkeypatch.setattr(steer, "_PAIRS_FOR_STEER", 40)
    monkeypatch.setattr(steer, "_kept", steer._OfModel())  # what other tests find is not to be made of so few
    model = im.open_model("mini", device="cpu")
    looked = []
    monkeypatch.setattr(steer, "find_layer", lambda model: looked.append(1) or 2)
    first = steer._kept_averages(model, None, 1)
    assert steer._kept_averages(model, None, 1) is first
    convolution = model._module.backbone.layers[0].mixer.conv1d
    before = convolution.bias.data.clone()
    edits = (
        lambda: convolution.bias.add_(0.7),
        lambda: setattr(convolution.bias, "data", before - 0.5),  # other storage, no version counted
        lambda: setattr(convolution, "bias", torch.nn.Parameter(before + 0.2)),
    )
    for number, edit in enumerate(edits, 2):
        with torch.no_grad():
            edit()
        found = steer._kept_averages(model, None, 1)
        pairs = im.ioi.generate(model.tokenizer, 40, 27, symmetric=True)
        torch.testing.assert_close(found.mean, steer.averages(model, pairs, 2, offset=1).mean)
        assert (found.mean - first.mean).abs().max() > 1e-3
        assert len(looked) == number
    convolution.bias.data = before
    torch.testing.assert_close(steer._kept_averages(model, None, 1).mean, first.mean)


def test_the_bottleneck_is_the_one_of_layer_ablation(mini):
    table = layer_ablation.EXPERIMENT(mini, layer_ablation.default_pairs(mini.tokenizer, 8, 27))
    assert bottleneck.find_layer(mini) == layer_ablation.bottleneck(table)


def test_the_offset_is_where_a_state_input_has_the_largest_effect(mini, place):
    expected = torch.zeros(mini.config.conv_kernel)
    for corruption in im.ioi.CORRUPTIONS:
        pairs = im.ioi.generate(
            mini.tokenizer, 8, 27, templates=im.ioi.ALIGNED_TEMPLATES, corruptions=[corruption], symmetric=True
        )
        first = int(pairs.first_difference[0])
        expected += torch.stack([mean_effect(mini, pairs, place, first + k) for k in range(len(expected))])
    assert bottleneck.find_offset(mini, place.layer) == int(expected.argmax())


def mean_effect(model, pairs, place, at):
    """|1 - normalized logit diff|, mean over pairs, of resampling the place's layer at one position."""
    source = im.read(model, pairs.corrupted, [place.hook])[place.hook]

    def edit(x):
        x[:, at] = source[:, at]
        return x

    def difference(tokens, edits):
        logits = im.run(model, tokens, edits)[torch.arange(len(pairs)), pairs.last]
        return (logits.gather(1, pairs.answer[:, None]) - logits.gather(1, pairs.wrong[:, None]))[:, 0]

    clean, corrupted = difference(pairs.clean, {}), difference(pairs.corrupted, {})
    return (1 - (difference(pairs.clean, {place.hook: edit}) - corrupted) / (clean - corrupted)).mean().abs()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"n6": "Leah"}, "has no name 'n6'; it has n1, n2, n3, n4, n5"),
        ({"out": "Leah"}, "has no name 'out'"),
        ({"n1": "Wilhelmina"}, "not one token"),
        ({"n1": "When"}, "is never in n1"),
    ],
)
def test_names_that_cannot_be_steered_are_refused(mini, averages, names, message):
    seen = [mini.tokenizer.decode([int(name)]).strip() for name in averages.names[:3]]
    prompt = f"Then, {seen[0]}, {seen[1]} and {seen[2]} went to the office. {seen[0]} and {seen[1]} gave a bone to"
    with pytest.raises(InputError, match=message):
        steer.steer(mini, prompt, names, averages=averages)


def test_other_bad_input_is_refused(mini, pairs, place, averages, tiny_mamba):
    prompt = "Then, Sarah, Ivan and Leah went to the office. Sarah and Ivan gave a bone to"
    with pytest.raises(InputError, match=f"averages are those of layer {place.layer} and offset {place.offset}"):
        steer.steer(mini, prompt, {}, layer=place.layer + 1, averages=averages)
    with pytest.raises(InputError, match="empty"):
        steer.steer(mini, "", {}, averages=averages)
    for text, names in (([prompt], {}), (prompt, ["Mary"]), (pairs.clean, {})):
        with pytest.raises(InputError, match="one prompt at a time"):
            steer.steer(mini, text, names, averages=averages)
    at, name = torch.tensor([3]), averages.names[:1]
    with pytest.raises(InputError, match="method"):
        steer.steering_edit(averages, "swap", at, name, name, "n1")
    with pytest.raises(InputError, match="layers 0 to 7"):
        steer.averages(mini, pairs, 8)
    with pytest.raises(InputError, match="offset is -1"):
        steer.averages(mini, pairs, 0, offset=-1)
    later = steer.averages(mini, pairs, 0, offset=1)
    known = mini.tokenizer.decode([int(later.names[0])]).strip()
    with pytest.raises(InputError, match="add words"):
        steer.steer(mini, f"Then, {known}", {"n1": "Mary"}, averages=later)
    with pytest.raises(InputError, match="per_cell"):
        name_steering.EXPERIMENT(mini, pairs, layer=0, per_cell=0)
    tokens = torch.ones(2, 4, dtype=torch.int64)
    nameless = Pairs(tokens, tokens, tokens[:, 0], tokens[:, 0])
    with pytest.raises(InputError, match="is about names, and these prompts have none"):
        name_steering.EXPERIMENT(tiny_mamba, nameless, layer=0)


def test_few_pairs_leave_cells_without_prompts_and_the_findings_say_so(mini):
    one = im.ioi.generate(mini.tokenizer, 1, 27, corruptions=[im.ioi.CORRUPTIONS[0]], symmetric=True)
    calls = []
    table = name_steering.EXPERIMENT(mini, one, layer=0, per_cell=2, progress=lambda *call: calls.append(call))
    # Only the first name ever is the answer.
    assert (table[table["slot"].isin([2, 3])]["n"] == 0).all()
    assert table[table["n"] == 0]["success"].isna().all()
    assert calls[-1][0] == calls[-1][1]
    assert "no prompt" in " ".join(name_steering.findings(table))
    name_steering.chart(table).to_dict()
