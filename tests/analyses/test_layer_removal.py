"""Layer removal against an oracle: one prompt at a time, torch hooks on the stock model."""

import math

import pytest
import torch
from conditioning import logit_rounding
from conftest import VOCAB
from transformers import BambaConfig, BambaForCausalLM

import ioi_mamba as im
from ioi_mamba.analyses import layer_removal
from ioi_mamba.errors import InputError
from ioi_mamba.tasks.base import Pairs

BAMBA = BambaConfig(
    vocab_size=VOCAB,
    hidden_size=24,
    num_hidden_layers=3,
    intermediate_size=48,
    num_attention_heads=2,
    num_key_value_heads=2,
    mamba_n_heads=6,
    mamba_d_head=8,
    mamba_d_state=4,
    attn_layer_indices=[1],
    initializer_range=0.5,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=0,
)


def random_pairs(n_pairs, n_pos=7, seed=0, ragged=False):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randint(1, VOCAB, shape, generator=generator)
    names = torch.stack([torch.randperm(VOCAB - 1, generator=generator)[:4] + 1 for _ in range(n_pairs)])
    candidates = names.clone()
    candidates[::2, 3] = -1
    lengths = torch.tensor([n_pos - i % 3 for i in range(n_pairs)]) if ragged else None
    tokens = torch.cat([torch.zeros(n_pairs, 1, dtype=torch.long), draw(n_pairs, n_pos - 1)], 1)
    return Pairs(
        clean=tokens,
        corrupted=tokens,
        answer=names[:, 0],
        wrong=names[:, 1],
        candidates=candidates,
        lengths=lengths,
    )


@pytest.fixture(scope="module", params=["mamba", "gpt2", "bamba"])
def model(request, tiny_mamba, tiny_gpt2_dir, tmp_path_factory):
    """Blocks that give the residual stream alone, and a hybrid's that give a tuple."""
    if request.param == "mamba":
        return tiny_mamba
    path = tiny_gpt2_dir
    if request.param == "bamba":
        path = tmp_path_factory.mktemp("tiny-bamba")
        with torch.random.fork_rng():
            torch.manual_seed(3)
            BambaForCausalLM(BAMBA).save_pretrained(path)
    return im.open_model(str(path), device="cpu", any_architecture=True)


def oracle_blocks(torch_model):
    """The modules whose outputs make the residual stream, found by their class and not by their path."""
    return [m for m in torch_model.modules() if type(m).__name__ in ("MambaBlock", "GPT2Block", "BambaDecoderLayer")]


def oracle(torch_model, pairs, removed):
    """(accuracy, probability) with the layers of `removed` handing on what they were given."""

    def hand_on(module, inputs, output):
        return (inputs[0], *output[1:]) if isinstance(output, tuple) else inputs[0]

    handles = [oracle_blocks(torch_model)[layer].register_forward_hook(hand_on) for layer in removed]
    right, probability = [], []
    for row in range(len(pairs)):
        length = int(pairs.last[row]) + 1
        with torch.no_grad():
            logits = torch_model(pairs.clean[row : row + 1, :length], use_cache=False).logits[0, -1]
        names = [int(name) for name in pairs.candidates[row] if name >= 0]
        exps = [math.exp(float(logits[name])) for name in names]
        answer = names.index(int(pairs.answer[row]))
        right.append(exps[answer] == max(exps))
        probability.append(exps[answer] / sum(exps))
    for handle in handles:
        handle.remove()
    return sum(right) / len(right), sum(probability) / len(probability)


def oracle_greedy(torch_model, pairs, held_out, steps):
    removed, left, rows = [], list(range(len(oracle_blocks(torch_model)))), []
    for _ in range(steps):
        scores = {layer: oracle(torch_model, pairs, [*removed, layer]) for layer in left}
        best = max(left, key=lambda layer: (*scores[layer], -layer))
        removed.append(best)
        left.remove(best)
        rows.append((best, *scores[best], oracle(torch_model, held_out, removed)[0]))
    return rows


def test_single_removals_are_those_of_the_oracle(model):
    pairs = random_pairs(5)
    table = layer_removal.EXPERIMENT(model, pairs, steps=1)
    none = table[table["mode"] == "none"].iloc[0]
    assert (none["accuracy"], none["probability"]) == pytest.approx(oracle(model._module, pairs, []), abs=1e-5)
    single = table[table["mode"] == "single"]
    assert list(single["layer"]) == list(range(model.config.num_hidden_layers))
    for _, row in single.iterrows():
        expected = oracle(model._module, pairs, [row["layer"]])
        assert (row["accuracy"], row["probability"]) == pytest.approx(expected, abs=1e-5)
        assert abs(row["probability"] - none["probability"]) > 1e-3


def test_greedy_removal_is_that_of_the_oracle_on_train_and_held_out(model):
    pairs, held_out = random_pairs(6), random_pairs(5, seed=1)
    table = layer_removal.EXPERIMENT(model, pairs, held_out=held_out)
    greedy = table[table["mode"] == "greedy"]
    rows = list(greedy[["layer", "accuracy", "probability", "valid_accuracy"]].itertuples(index=False, name=None))
    expected = oracle_greedy(model._module, pairs, held_out, model.config.num_hidden_layers - 1)
    assert len(rows) == len(expected)
    for row, by_oracle in zip(rows, expected, strict=True):
        assert row == pytest.approx(by_oracle, abs=1e-5)
    none = table[table["mode"] == "none"].iloc[0]
    assert none["valid_accuracy"] == pytest.approx(oracle(model._module, held_out, [])[0])


def test_ragged_prompts_are_read_at_their_own_last_token(model):
    pairs = random_pairs(4, ragged=True)
    table = layer_removal.EXPERIMENT(model, pairs, steps=1)
    for _, row in table[table["mode"] == "single"].iterrows():
        expected = oracle(model._module, pairs, [row["layer"]])
        assert (row["accuracy"], row["probability"]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("rows", [1, 5, 20, 1000])
def test_the_rows_of_a_pass_do_not_change_the_table(tiny_mamba, rows):
    pairs = random_pairs(8)
    whole = layer_removal.EXPERIMENT(tiny_mamba, pairs)
    split = layer_removal.EXPERIMENT(tiny_mamba, pairs, rows=rows)
    assert list(whole["layer"]) == list(split["layer"])
    assert list(whole["probability"]) == pytest.approx(
        list(split["probability"]), abs=logit_rounding(tiny_mamba, pairs.clean)
    )


def test_equal_candidates_go_in_the_order_of_the_layers(tiny_mamba_dir):
    model = im.open_model(str(tiny_mamba_dir), device="cpu")
    for block in model._module.backbone.layers:
        block.mixer.out_proj.weight.data.zero_()
    table = layer_removal.EXPERIMENT(model, random_pairs(4))
    assert list(table.loc[table["mode"] == "greedy", "layer"]) == [0, 1, 2]


def test_the_table_has_the_promised_columns_and_is_the_same_twice(tiny_mamba):
    calls = []
    pairs = random_pairs(6)
    table = layer_removal.EXPERIMENT(tiny_mamba, pairs, progress=lambda done, total: calls.append((done, total)))
    assert tuple(table.columns) == tuple(column.name for column in layer_removal.COLUMNS)
    assert table["valid_accuracy"].isna().all()
    assert (table["n"] == 6).all()
    assert table.equals(layer_removal.EXPERIMENT(tiny_mamba, pairs))
    assert calls[-1][0] == calls[-1][1]
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_a_model_without_a_known_list_of_blocks_is_refused():
    class Envoy:
        _module = torch.nn.Linear(2, 2)

    with pytest.raises(InputError, match="keeps its layers at none of"):
        layer_removal.EXPERIMENT(Envoy(), random_pairs(2))


@pytest.mark.parametrize("option", [{"rows": 0}, {"steps": 0}])
def test_options_below_one_are_refused(tiny_mamba, option):
    with pytest.raises(InputError, match="at least 1"):
        layer_removal.EXPERIMENT(tiny_mamba, random_pairs(2), **option)


def test_findings_name_the_worst_layer_and_count_the_spare_ones(tiny_mamba):
    table = layer_removal.EXPERIMENT(tiny_mamba, random_pairs(10), held_out=random_pairs(10, seed=1))
    single = table[table["mode"] == "single"]
    worst = single.loc[single["probability"].idxmin(), "layer"]
    found = layer_removal.findings(table)
    assert f"Removing layer {worst} costs most" in found[0]
    assert "held-out" in found[-1]


def test_an_accuracy_has_an_interval_by_pair(tiny_mamba):
    alone = random_pairs(6)
    # The other directions are the same prompts, with the answers they had.
    twice = Pairs.concat([alone, alone])
    once, again = (layer_removal.EXPERIMENT(tiny_mamba, pairs, steps=1) for pairs in (alone, twice))
    for table in (once, again):
        assert (table["low"] <= table["accuracy"]).all()
        assert (table["accuracy"] <= table["high"]).all()
        assert (table["high"] > table["low"]).all()
    assert again["accuracy"].tolist() == pytest.approx(once["accuracy"].tolist())
    # A row twice says nothing more; but for the number of rows in the design effect the interval is the same.
    assert again["low"].tolist() == pytest.approx(once["low"].tolist(), abs=0.03)
