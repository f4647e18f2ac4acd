"""The embedded model: its tokens, its accuracy on the held-out prompts, and the scripts that make and measure it."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from ioi_mamba.errors import InputError
from ioi_mamba.mini import DIRECTORY, corpus, measure, train, wordings
from ioi_mamba.mini.card import card, held_out_forms
from ioi_mamba.mini.corpus import ANSWER, FRAMES, SOURCES, WORDS_OF_TWO, Draw, document, draw_document, vocabulary
from ioi_mamba.mini.model import Recipe, Trained, logits, new_model
from ioi_mamba.mini.tokenizer import build_tokenizer
from ioi_mamba.mini.wordings import RELATIONS, Forms
from ioi_mamba.tasks import greater_than, ioi

PRINTABLE = "".join(map(chr, range(32, 127)))


@dataclass(frozen=True)
class Tiny(Recipe):
    steps: int = 24
    batch: int = 24
    layers: int = 2
    hidden: int = 16
    state: int = 4
    learning_rate: float = 1e-2


TINY = Tiny()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DIRECTORY)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DIRECTORY).eval()


@pytest.fixture(scope="module")
def built():
    """The tokenizer that the script builds."""
    return build_tokenizer(vocabulary())


@pytest.fixture(scope="module")
def held_out(built):
    return corpus.held_out_texts(built)


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
    files = [path for path in DIRECTORY.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    assert model.config.model_type == "mamba"
    assert model.config.num_hidden_layers >= 8


def accurate(figure):
    return figure.among_names >= 0.99 and figure.of_all_tokens >= 0.97


def test_held_out_accuracy_reaches_its_thresholds(model, tokenizer):
    mixed = {
        ("three", ""): ioi.generate(tokenizer, 200, 28, templates=ioi.ALIGNED_TEMPLATES),
        ("four", ""): ioi.generate(tokenizer, 10, 28),
    }
    figures = measure.published(model, mixed)
    assert [figure.prompts for figure in figures] == [400, 20]
    assert all(map(accurate, figures))


@pytest.mark.slow
def test_every_template_with_every_corruption_is_as_accurate_as_the_card_says(model, tokenizer):
    figures = measure.published(model, corpus.evaluation_sets(tokenizer, corpus.HELD_OUT_SEED))
    assert len(figures) == 2 + 4 * 5 + 1
    assert all(map(accurate, figures))
    assert measure.figure_table(figures) in (DIRECTORY / "README.md").read_text(encoding="utf-8")


def test_the_embedded_model_is_measured_as_transformers_runs_it(model, tokenizer):
    pairs = ioi.generate(tokenizer, 10, 28)
    with torch.no_grad():
        expected = model(pairs.clean).logits
        torch.testing.assert_close(logits(model, pairs.clean), expected, rtol=1e-4, atol=1e-4)


def test_the_fast_forward_and_its_gradient_equal_those_of_transformers():
    model = new_model(TINY, 50).train()
    tokens = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    results = []
    for forward in (lambda: model(tokens).logits, lambda: logits(model, tokens)):
        model.zero_grad()
        out = forward()
        out.sin().sum().backward()
        results.append([out, *(weight.grad for weight in model.parameters())])
    for stock, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, stock, rtol=1e-4, atol=1e-5)


def test_a_dropped_layer_adds_nothing_to_its_document_and_others_keep_it():
    model = new_model(TINY, 50)
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    shorter = new_model(replace(TINY, layers=1), 50)
    state = {name.replace("layers.1.", "layers.0."): value for name, value in model.state_dict().items()}
    shorter.load_state_dict({name: value for name, value in state.items() if name in shorter.state_dict()})
    with torch.no_grad():
        dropped = logits(model, tokens, torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
        torch.testing.assert_close(dropped[0], logits(shorter, tokens)[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dropped[1], logits(model, tokens)[1], rtol=1e-4, atol=1e-5)


def test_long_names_and_objects_are_two_tokens_and_years_a_century_and_two_digits(built):
    long = (*corpus.LONG_NAMES, *corpus.HELD_OUT_NAMES, *corpus.LONG_OBJECTS, *corpus.HELD_OUT_OBJECTS)
    assert [word for word in long if len(tokens_of(built, f" {word}")) != 2] == []
    assert [name for name in (*corpus.LONG_NAMES, *corpus.HELD_OUT_NAMES) if len(tokens_of(built, name)) != 2] == []
    years = tokens_of(built, "The war lasted from the year 1732 to the year 17")
    assert years == ["The", "Ġwar", "Ġlasted", "Ġfrom", "Ġthe", "Ġyear", "Ġ17", "32", "Ġto", "Ġthe", "Ġyear", "Ġ17"]
    assert greater_than.generate(built, 5, 27).texts
    assert len(ioi.usable_names(built)) == 205


def test_every_token_of_a_held_out_wording_name_or_object_stands_in_training_documents(built, held_out):
    rng = random.Random(0)
    trained = {token for _ in range(6000) for token in tokens_of(built, document(rng, held_out).replace(ANSWER, ""))}
    names = {token for name in corpus.HELD_OUT_NAMES for token in tokens_of(built, f" {name}")}
    objects = {token for thing in corpus.HELD_OUT_OBJECTS for token in tokens_of(built, f" {thing}")}
    assert names | objects <= trained
    words = {word.lower() for form in held_out_forms() for word in re.findall(r"[A-Za-z]+", re.sub(r"{\w+}", "", form))}
    assert words <= {token.strip("Ġ").lower() for token in trained}


SHAPE_OF_SLOTS = {
    "move": r"[a-z ]+", "lead": r"(?:[A-Z][a-z ]+,? )?", "clause": r"[A-Z][a-z]+", "left": r" \w+(?: and \w+)*",
    "left0": r" \w+", "again": r" [\w ,]+", "params": r"[\w :.]*", "args_": r"[\w :.]*", "args": r"[\w, ]+",
}  # fmt: skip


def as_pattern(form):
    """A regular expression for what a wording can become, its slots as narrow as they can be."""
    several = r"\w+(?:(?:, and|, with|, | and | with ) ?\w+)+"
    some = several[:-1] + "*"
    parts = re.split(r"{(\w+)}", form.replace(ANSWER, ""))
    shapes = SHAPE_OF_SLOTS | {"group": several, "givers": some, "names": some}
    found = "".join(shapes.get(part, r"\w+") if k % 2 else re.escape(part) for k, part in enumerate(parts))
    # A wording with a small letter can stand within a sentence; the others begin one.
    return re.compile(("" if form[0].islower() else r"(?<!\w )") + rf"\b{found}(?!\w)", re.IGNORECASE)


def test_no_training_document_has_a_held_out_wording_name_or_object(held_out):
    rng = random.Random(2)
    texts = [document(rng, held_out).replace(ANSWER, "") for _ in range(3000)]
    words = {word for text in texts for word in re.findall(r"\w+", text)}
    assert not words & {*corpus.HELD_OUT_NAMES, *corpus.HELD_OUT_OBJECTS}
    forms = [form for form in held_out_forms() if form not in wordings.MOVES.held_out]
    assert {form for form in forms if any(map(as_pattern(form).search, texts))} == set()
    kept = [draw_document(rng, source, (FRAMES,))[0].replace(ANSWER, "") for source in SOURCES for _ in range(150)]
    assert {form for form in forms if not any(map(as_pattern(form).search, kept))} == set()
    moves = re.compile("|".join(rf"{move} the" for move in wordings.MOVES.held_out))
    assert [text for text in texts if moves.search(text)] == []


def test_a_draw_of_held_out_frames_takes_a_held_out_wording_wherever_there_is_one():
    forms = Forms(("a", "b"), ("c",))
    assert {Draw(random.Random(seed), (FRAMES,)).form(forms) for seed in range(9)} == {"c"}
    assert {Draw(random.Random(seed)).form(forms) for seed in range(9)} == {"a", "b"}
    assert {Draw(random.Random(seed), (FRAMES,)).form(Forms(("a",))) for seed in range(9)} == {"a"}


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
    assert found > 200


def test_a_prompt_that_is_held_out_is_drawn_anew():
    first = document(random.Random(3), (), {"published prompts": 1.0})
    prompt = next(prompt for prompt in corpus._prompts(first) if prompt.endswith(" to"))
    again = document(random.Random(3), {prompt}, {"published prompts": 1.0}).replace(ANSWER, "")
    assert prompt in first.replace(ANSWER, "")
    assert prompt not in again


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kept", [(), (FRAMES,), (FRAMES, WORDS_OF_TWO)])
def test_answers_follow_from_the_text_before_them_and_are_one_of_their_choices(source, kept):
    rng = random.Random(1)
    for _ in range(150):
        text, choices = draw_document(rng, source, kept)
        assert "{" not in text
        assert text.count(ANSWER) >= 1
        before = ""
        for piece, is_answer in corpus.split_answers(text):
            if is_answer:
                word = piece.strip()
                (among,) = {tuple(words) for words in choices.values() if word in words}
                assert len(set(among)) == len(among) >= 2
                assert source in ("agreement", "years") or re.search(rf"\b{word}\b", before)
            before += piece


def test_the_answer_of_a_published_prompt_is_the_name_that_stands_once():
    rng = random.Random(4)
    for _ in range(200):
        text, _ = draw_document(rng, "published prompts")
        before, after = text.split(ANSWER)
        story = re.search(r"(?:Then, |Afterwards |When |Friends )(?:(?!When |Friends ).)*$", before)
        assert story is not None
        assert story[0].count(re.findall(r"\w+", after)[0]) >= 1


def test_later_years_and_numbers_of_nouns_are_right():
    rng = random.Random(5)
    for _ in range(200):
        before, after = draw_document(rng, "years")[0].split(ANSWER)
        shown = [int(year) for _, year in re.findall(r"(1[1-7])(\d\d)", before)]
        asked_before = "It began in" in before or "came after" in before
        assert (int(after[:2]) < shown[-1]) == asked_before
    for _ in range(200):
        text = draw_document(rng, "agreement")[0]
        for noun, verb in re.findall(r"(?:Today|Yesterday|Monday) the (\w+)[^.]*?\* (\w+) here", text):
            assert (noun not in wordings.NOUNS) == (verb in ("are", "were", "have"))


def test_a_change_moves_one_value_to_another_person_or_a_person_to_a_new_value():
    draw = Draw(random.Random(6))
    draw.choices |= {"people": ["Ana", "Ivan"], "objects": ["bone", "book"], "places": ["store", "park"]}
    holder = {"bone": "Ana", "book": "Ivan"}
    sentence = corpus._change(draw, RELATIONS["who has it"], holder, ["Ana", "Ivan"])
    assert len(set(holder.values())) == 1
    assert all(word in sentence for word in ("Ana", "Ivan"))
    holder = {"store": "Ana", "park": "Ivan"}
    corpus._change(draw, RELATIONS["who is where"], holder, ["Ana", "Ivan"])
    assert sorted(holder.values()) == ["Ana", "Ivan"]
    assert len({"store", "park"} - set(holder)) == 1


def weights(model):
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def test_training_repeats_itself_lowers_the_loss_and_can_be_interrupted(built, tmp_path):
    whole = train.train(TINY, built, ())
    again = train.train(TINY, built, ())
    assert sum(whole.losses[-5:]) < sum(whole.losses[:5])
    assert torch.equal(weights(whole.model), weights(again.model))
    assert len(whole.right) == TINY.steps

    state_file = tmp_path / "state.pt"
    train.train(TINY, built, (), state_file=state_file, save_every=20)
    resumed = train.train(TINY, built, (), state_file=state_file, resume=True)
    assert (resumed.losses, resumed.right) == (whole.losses, whole.right)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    with pytest.raises(InputError, match="other options"):
        train.train(replace(TINY, steps=25), built, (), state_file=state_file, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.pt"]


def test_the_weights_do_not_depend_on_the_number_of_workers(built):
    few = replace(TINY, steps=3, batch=2 * train.PART)
    one, two = (train.train(few, built, (), workers=workers) for workers in (1, 2))
    assert one.losses == two.losses
    assert torch.equal(weights(one.model), weights(two.model))


def test_the_rate_warms_up_and_falls_to_its_end():
    recipe = Recipe(steps=1000, warmup=0.1, learning_rate=1.0, final_rate=0.02)
    rates = [recipe.rate(step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.02, abs=1e-3)


def test_choices_are_scored_by_all_of_their_tokens(built):
    model = new_model(TINY, len(built)).eval()
    found = measure.answered(model, built, "facts", "two-token names", 4)
    right = total = 0
    for before, answer, choices in measure._questions("facts", "two-token names", 4):
        scores = {}
        for choice in choices:
            start, end = [0, *built(before).input_ids], built(choice).input_ids
            with torch.no_grad():
                each = model(torch.tensor([start + end])).logits[0].log_softmax(-1)
            scores[choice] = sum(each[len(start) - 1 + k, token].item() for k, token in enumerate(end))
        right += scores[answer] == max(scores.values())
        total += 1
    assert (found.right, found.questions) == (right, total)
    assert found.interval[0] < found.accuracy < found.interval[1]


def measured(among_names=1.0):
    figures = [measure.Figure("Then", "ABC AB C -> ABC AC B", 400, among_names, 0.995)]
    kinds = ("held-out frames", "two-token names", "known frames", "the published form")
    answers = [measure.Answered("facts", kind, 97, 100) for kind in kinds]
    edges = [("embed", str(k)) for k in range(5)] + [(str(k), "output") for k in range(5)]
    talk = {("Then", "a"): [1, 2], ("Then", "b"): [2, 3]}
    return measure.Measured(
        figures, answers, measure.Structure(edges, list(range(5)), talk, [0.5] * 3 + [1.0] * 5, 1.0)
    )


def test_what_is_asked_of_a_model_is_judged_number_by_number():
    assert all(row.holds for row in measure.judged(measured()))
    missed = [row for row in measure.judged(measured(among_names=0.98)) if not row.holds]
    assert [(row.value, row.bound) for row in missed] == [(0.98, 0.99)]
    assert measure.judgement_table(missed).endswith("| 0.980 | 0.99 | MISSED |")


def test_the_structure_of_the_embedded_model_is_that_of_the_experiments(model):
    found = measure.structure(DIRECTORY, n_pairs=10)
    assert found.edges
    assert len(found.removal) == model.config.num_hidden_layers
    assert len(found.cross_talk) == 20
    assert set(found.edge_layers) == {int(n) for edge in found.edges for n in edge if n.isdigit()}


def test_the_card_has_the_shares_the_curve_the_figures_and_everything_held_out(built):
    trained = Trained(new_model(TINY, len(built)), [3.0, 2.0], [0.1, 0.5], 60.0)
    text = card(TINY, trained, measured())
    assert "| Then | ABC AB C -> ABC AC B | 400 | 1.0000 | 0.9950 |" in text
    assert "| facts | held-out frames | 100 | 0.970 | 0.915 to 0.990 |" in text
    assert "| 2 | 2.000 | 0.500 |" in text
    assert all(f"`{form}`" in text for form in held_out_forms())
    assert all(word in text for word in (*corpus.HELD_OUT_NAMES, *corpus.HELD_OUT_OBJECTS))
    assert sum(source.share for source in SOURCES.values()) == pytest.approx(1)


def tiny_script(monkeypatch):
    monkeypatch.setattr(train, "Recipe", Tiny)
    monkeypatch.setattr(train, "held_out_texts", lambda tokenizer: set())
    monkeypatch.setattr(train, "evaluation_sets", lambda tokenizer, seed: {("", ""): ioi.generate(tokenizer, 2, seed)})


def test_a_model_below_the_thresholds_is_not_written(tmp_path, capsys, monkeypatch):
    tiny_script(monkeypatch)
    assert train.main(["--out", str(tmp_path), "--workers", "1", "--steps", "2"]) == 1
    assert "no checkpoint is written" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_loads_as_it_is_and_has_a_card(tmp_path, monkeypatch, built):
    tiny_script(monkeypatch)
    monkeypatch.setattr(measure, "AMONG_NAMES", 0.0)
    monkeypatch.setattr(measure, "OF_ALL_TOKENS", 0.0)
    monkeypatch.setattr(measure, "knowledge", lambda *arguments: measured().answers)
    monkeypatch.setattr(measure, "structure", lambda path: measured().structure)
    assert train.main(["--out", str(tmp_path), "--workers", "1", "--steps", "2"]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = train.train(replace(TINY, steps=2), built, ()).model
    assert torch.equal(weights(loaded), weights(expected))
    assert tokens_of(AutoTokenizer.from_pretrained(tmp_path), "Then, Mark") == tokens_of(built, "Then, Mark")
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
    assert train.main(["--out", str(tmp_path / "new"), "--workers", "1", *arguments]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["--documents", "0"], "--documents is 0; give at least 1."), (["--model", "nowhere"], "has no config.json")],
)
def test_bad_options_of_the_measuring_are_refused_in_a_sentence(arguments, sentence, capsys):
    assert measure.main(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_an_out_directory_that_cannot_be_made_is_refused(tmp_path: Path, capsys):
    (tmp_path / "file").write_text("")
    assert train.main(["--out", str(tmp_path / "file" / "x"), "--workers", "1"]) == 2
    assert "name another directory" in capsys.readouterr().err
