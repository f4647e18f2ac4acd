"""The embedded model: its tokens, its accuracy on the held-out prompts, and the script that made it."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from ioi_mamba.errors import InputError
from ioi_mamba.files import MINI
from ioi_mamba.mini import corpus, train
from ioi_mamba.mini.corpus import ANSWER, document, vocabulary
from ioi_mamba.mini.tokenizer import build_tokenizer
from ioi_mamba.tasks import ioi

PRINTABLE = "".join(map(chr, range(32, 127)))


@dataclass(frozen=True)
class Tiny(train.Recipe):
    steps: int = 24
    batch: int = 8
    layers: int = 2
    hidden: int = 16
    state: int = 4
    ramp: int = 30
    learning_rate: float = 1e-2
    warmup: int = 2


TINY = Tiny()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MINI)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MINI).eval()


@pytest.fixture(scope="module")
def held_out(tokenizer):
    return corpus.held_out_texts(tokenizer)


def tokens_of(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)


@pytest.mark.parametrize(
    ("opening", "length", "positions"),
    [
        ("Then, Mark, Leah and Erik went to the store. Mark and Leah", 20, (3, 5, 7, 13, 15)),
        ("Afterwards Mark, Leah and Erik went to the store. Mark and Leah", 20, (3, 5, 7, 13, 15)),
        ("Friends Mark, Leah and Erik went to the store. Mark and Leah", 20, (3, 5, 7, 13, 15)),
        ("When Mark, Leah and Erik arrived at the store, Mark and Leah", 19, (2, 4, 6, 12, 14)),
    ],
)
def test_the_papers_prompts_have_the_token_boundaries_of_gpt_neox(tokenizer, opening, length, positions):
    tokens = ["BOS", *tokens_of(tokenizer, f"{opening} gave a necklace to")]
    assert len(tokens) == length
    assert [tokens[at] for at in positions] == ["ĠMark", "ĠLeah", "ĠErik", "ĠMark", "ĠLeah"]
    assert tokens[-1] == "Ġto"


def test_two_openings_split_and_punctuation_stands_alone(tokenizer):
    assert tokens_of(tokenizer, "Afterwards Mark,") == ["After", "wards", "ĠMark", ","]
    assert tokens_of(tokenizer, "Friends (Mark).") == ["Fri", "ends", "Ġ", "(", "Mark", ")", "."]


def test_every_name_place_and_object_is_one_token(tokenizer):
    words = [*ioi.NAMES, *ioi.PLACES, *ioi.OBJECTS]
    assert [word for word in words if tokens_of(tokenizer, f" {word}") != [f"Ġ{word}"]] == []
    assert len(ioi.usable_names(tokenizer)) == 205


def test_no_bos_is_added_and_id_0_is_bos_eos_and_padding(tokenizer):
    assert tokenizer("Then").input_ids == [tokenizer.convert_tokens_to_ids("Then")]
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == 0
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 0)


def test_the_script_builds_the_tokenizer_that_is_embedded(tokenizer):
    assert build_tokenizer(vocabulary()).get_vocab() == tokenizer.get_vocab()


@given(text=st.text(PRINTABLE) | st.text())
def test_decoding_gives_the_text_back(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert "<|endoftext|>" in text or 0 not in ids


@pytest.mark.parametrize("letter", ["y", "7", "é", "\U00020000"])
def test_a_word_of_any_length_is_cut_into_pieces_and_not_unknown(tokenizer, letter):
    ids = tokenizer(f" {letter * 5000}").input_ids
    assert tokenizer.decode(ids) == f" {letter * 5000}"
    assert 0 not in ids


def test_the_checkpoint_fits_in_10_mb_and_has_the_promised_sizes(model):
    files = [path for path in MINI.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    assert model.config.model_type == "mamba"
    assert model.config.num_hidden_layers >= 8


def accurate(figure):
    return figure.among_names >= 0.99 and figure.of_all_tokens >= 0.97


def test_held_out_accuracy_reaches_its_thresholds(model, tokenizer):
    mixed = {
        ("three", ""): ioi.generate(tokenizer, 200, 28, templates=ioi.ALIGNED_TEMPLATES, symmetric=True),
        ("four", ""): ioi.generate(tokenizer, 10, 28, symmetric=True),
    }
    figures = train.measure(model, mixed)
    assert [figure.prompts for figure in figures] == [400, 20]
    assert all(map(accurate, figures))


@pytest.mark.slow
def test_every_template_with_every_corruption_is_as_accurate_as_the_card_says(model, tokenizer):
    figures = train.measure(model, corpus.evaluation_sets(tokenizer, corpus.HELD_OUT_SEED))
    assert len(figures) == 2 + 4 * 5 + 1
    assert all(map(accurate, figures))
    assert train.as_table(figures) in (MINI / "README.md").read_text(encoding="utf-8")


def test_the_embedded_model_is_measured_as_transformers_runs_it(model, tokenizer):
    pairs = ioi.generate(tokenizer, 10, 28, symmetric=True)
    with torch.no_grad():
        expected = model(pairs.clean).logits
        torch.testing.assert_close(train.logits(model, pairs.clean), expected, rtol=1e-4, atol=1e-4)


def test_the_fast_forward_and_its_gradient_equal_those_of_transformers():
    model = train.new_model(TINY, 50).train()
    tokens = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    results = []
    for forward in (lambda: model(tokens).logits, lambda: train.logits(model, tokens)):
        model.zero_grad()
        out = forward()
        out.sin().sum().backward()
        results.append([out, *(weight.grad for weight in model.parameters())])
    for stock, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, stock, rtol=1e-4, atol=1e-5)


def test_no_training_document_holds_an_evaluation_prompt(held_out):
    names = r"\w+(?:, \w+)* and \w+|\w+"
    prompt = re.compile(rf"(?:Then, |Afterwards |When |Friends )(?:{names}) (?:went|arrived) .*? gave a \w+ to")
    rng = random.Random(0)
    found = 0
    for _ in range(3000):
        text = document(rng, held_out).replace(ANSWER, "")
        for match in prompt.finditer(text):
            found += 1
            assert match.group() not in held_out
    assert found > 500


def test_a_prompt_that_is_held_out_is_drawn_anew():
    first = document(random.Random(3), (), variety=0).replace(ANSWER, "")
    prompt = first[: first.rindex(" to ") + 3]
    again = document(random.Random(3), {prompt}, variety=0).replace(ANSWER, "")
    assert prompt in first
    assert prompt not in again


def test_answers_follow_from_the_text_before_them():
    rng = random.Random(1)
    texts = [document(rng, ()) for _ in range(500)]
    for text in texts:
        before, *answers = text.split(ANSWER)
        assert answers
        for answer in answers:
            word = re.findall(r"\w+", answer)[0]
            assert word == "the" or re.search(rf"\b{word}\b", before)
            before += answer


def test_training_repeats_itself_lowers_the_loss_and_can_be_interrupted(tokenizer, tmp_path):
    def weights(model):
        return torch.cat([weight.detach().flatten() for weight in model.parameters()])

    whole, losses, _ = train.train(TINY, tokenizer, ())
    again, _, _ = train.train(TINY, tokenizer, ())
    assert sum(losses[-5:]) < sum(losses[:5])
    assert torch.equal(weights(whole), weights(again))

    state_file = tmp_path / "state.pt"
    train.train(TINY, tokenizer, (), state_file=state_file, save_every=20)
    resumed, resumed_losses, _ = train.train(TINY, tokenizer, (), state_file=state_file, resume=True)
    assert resumed_losses == losses
    assert torch.equal(weights(resumed), weights(whole))
    with pytest.raises(InputError, match="other options"):
        train.train(Tiny(steps=25), tokenizer, (), state_file=state_file, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.pt"]


def test_a_model_below_the_thresholds_is_not_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(train.RECIPES, "mamba", TINY)
    monkeypatch.setattr(train, "held_out_texts", lambda tokenizer: set())
    monkeypatch.setattr(
        train, "evaluation_sets", lambda tokenizer, seed: {("", ""): ioi.generate(tokenizer, 2, seed, symmetric=True)}
    )
    assert train.main(["--out", str(tmp_path), "--threads", str(torch.get_num_threads())]) == 1
    assert "no checkpoint is written" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_loads_as_it_is_and_has_a_card(tokenizer, tmp_path):
    model = train.new_model(TINY, len(tokenizer)).eval()
    figures = [train.Figure("Then", "ABC AB C -> ABC AC B", 400, 1.0, 0.995)]
    train.write_checkpoint(tmp_path, model, tokenizer, TINY, 60.0, figures)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.tensor([[0, *AutoTokenizer.from_pretrained(tmp_path)("Then, Mark").input_ids]])
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| Then | ABC AB C -> ABC AC B | 400 | 1.0000 | 0.9950 |" in card
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors", ".md"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "0"], "--steps is 0; give at least 1."),
        (["--resume"], "does not exist; start without resuming."),
    ],
)
def test_bad_options_are_refused_in_a_sentence(arguments, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "held_out_texts", lambda tokenizer: set())
    assert train.main(["--out", str(tmp_path / "new"), "--threads", "1", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_an_out_directory_that_cannot_be_made_is_refused(tmp_path: Path, capsys):
    (tmp_path / "file").write_text("")
    assert train.main(["--out", str(tmp_path / "file" / "x"), "--threads", "1"]) == 2
    assert "name another directory" in capsys.readouterr().err
