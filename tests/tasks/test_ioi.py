"""The IOI task: the published prompts, letter by letter, and positions with one meaning in all templates."""

import functools
import hashlib
import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ioi_mamba.errors import InputError
from ioi_mamba.mini.tokenizer import build_tokenizer
from ioi_mamba.tasks import Pairs, ioi

PUBLISHED = json.loads((Path(__file__).parents[1] / "data" / "ioi_published_prompts.json").read_text())
WORDS = (
    *(f" {word}" for word in (*ioi.NAMES, *ioi.PLACES, *ioi.OBJECTS)),
    *("Then", "After", "wards", "When", "Fri", "ends"),
    *(" and", " went", " to", " the", " gave", " a", " arrived", " at"),
)


@pytest.fixture(scope="module")
def tokenizer():
    """Cuts the prompts where GPT-NeoX does: every word one token, but After|wards and Fri|ends."""
    return build_tokenizer(WORDS)


def as_rows(pairs, tokenizer):
    """The pairs in the form of the published files: prompts, answers, and the sorted other names of each."""
    for number, (clean, corrupted) in enumerate(pairs.texts):
        names = {tokenizer.decode([i]) for i in pairs.candidates[number].tolist() if i >= 0}
        answer, wrong = (tokenizer.decode([int(ids[number])]) for ids in (pairs.answer, pairs.wrong))
        yield {
            "corruption": pairs.labels["corruption"][number],
            "uncorrupted": clean,
            "corrupted": corrupted,
            "answer_uncorrupted": answer,
            "answer_corrupted": wrong,
            "incorrect_for_uncorrupted": sorted(names - {answer}),
            "incorrect_for_corrupted": sorted(names - {wrong}),
        }


@functools.cache
def generate_published(number, tokenizer):
    entry = PUBLISHED[number]
    templates = [ioi.TEMPLATES[number] for number in entry["templates"]]
    return ioi.generate(
        tokenizer,
        entry["n_pairs"],
        entry["seed"],
        templates=templates,
        corruptions=entry["corruptions"],
        symmetric=False,
    )


@pytest.mark.parametrize("number", range(len(PUBLISHED)), ids=[entry["set"] for entry in PUBLISHED])
def test_a_seed_gives_the_prompts_answers_and_wrong_names_of_the_published_runs(number, tokenizer):
    entry = PUBLISHED[number]
    rows = list(as_rows(generate_published(number, tokenizer), tokenizer))
    for row, published in zip(rows, entry["first"], strict=False):
        assert row == {key: published[key] for key in row}
    digest = hashlib.sha256()
    for row in rows:
        fields = list(row.values())[1:5] + [",".join(names) for names in list(row.values())[5:]]
        digest.update(("|".join(fields) + "\n").encode())
    assert (len(rows), digest.hexdigest()) == (entry["n_pairs"], entry["sha256"])


def test_a_name_drawn_for_two_letters_is_one_candidate(tokenizer):
    steering = [entry["n_pairs"] for entry in PUBLISHED].index(10_000)
    pairs = generate_published(steering, tokenizer)
    n_candidates = (pairs.candidates >= 0).sum(1)
    n_expected = torch.tensor([4 if "D" in corruption else 3 for corruption in pairs.labels["corruption"]])
    assert (n_candidates != n_expected).nonzero().flatten().tolist() == [3561, 9803]
    rare = next(as_rows(pairs[[9803]], tokenizer))
    assert rare["uncorrupted"].startswith("When Jordan, Garrett and Jordan arrived at the garden, Jordan and Jordan")
    assert (rare["incorrect_for_uncorrupted"], rare["incorrect_for_corrupted"]) == ([" Jordan"], [" Garrett"])


@pytest.mark.parametrize("number", range(4))
def test_names_stand_where_gpt_neox_has_them(number, tokenizer):
    pairs = ioi.generate(tokenizer, 20, 3, templates=[ioi.TEMPLATES[number]], symmetric=True)
    n_tokens, name_positions = (19, [2, 4, 6, 12, 14]) if number == 2 else (20, [3, 5, 7, 13, 15])
    assert pairs.clean.shape == (40, n_tokens)
    assert pairs.lengths is None
    assert [pairs.roles[f"n{k}"].unique().tolist() for k in range(1, 6)] == [[at] for at in name_positions]
    assert (pairs.clean[:, 0] == tokenizer.bos_token_id).all()
    decoded = [tokenizer.decode(row[1:]) for row in pairs.clean]
    assert decoded == [clean for clean, _ in pairs.texts]


def test_every_token_of_every_template_has_one_role_and_the_same_words_share_it(tokenizer):
    words = {}
    for template in ioi.TEMPLATES:
        pairs = ioi.generate(tokenizer, 1, 5, templates=[template], symmetric=False)
        assert sorted(int(index) for index in pairs.roles.values()) == list(range(pairs.clean.shape[1]))
        for role, index in pairs.roles.items():
            words.setdefault(role, set()).add(tokenizer.decode(pairs.clean[0, index]))
    when = ioi.generate(tokenizer, 1, 5, templates=[ioi.TEMPLATES[2]], symmetric=True)
    assert set(words) - set(when.roles) == {"n1-2"}
    assert words["n1-2"] == {"Then", "After", "Fri"}
    assert words["n1-1"] == {",", "wards", "When", "ends"}
    assert words["n3+1"] == {" went", " arrived"}
    assert words["place+1"] == {".", ","}
    assert words["n1+1"] == {","}
    assert words["n2+1"] == words["n4+1"] == {" and"}
    assert words["n5+1"] == {" gave"}
    assert words["out"] == {" to"}
    assert words["place"] <= {f" {place}" for place in ioi.PLACES}
    assert words["object"] <= {f" {thing}" for thing in ioi.OBJECTS}


def test_mixed_templates_keep_their_roles_and_fall_into_two_layouts(tokenizer):
    pairs = ioi.generate(tokenizer, 30, 27, symmetric=True)
    is_when = torch.tensor([template == "When" for template in pairs.labels["template"]])
    assert set(pairs.labels["template"]) == {"Then", "Afterwards", "When", "Friends"}
    assert torch.equal(pairs.roles["n1-2"] == -1, is_when)
    assert torch.equal(pairs.roles["n5"], torch.where(is_when, 14, 15))
    assert torch.equal(pairs.roles["out"], pairs.last)
    layouts = {part.clean.shape[1]: part for part in pairs.layouts()}
    assert {width: len(part) for width, part in layouts.items()} == {
        20: int((~is_when).sum()),
        19: int(is_when.sum()),
    }
    assert layouts[20].position_labels() == list(pairs.roles)
    assert layouts[19].position_labels() == [role for role in pairs.roles if role != "n1-2"]


def test_symmetric_pairs_are_followed_by_their_swapped_copies(tokenizer):
    once = ioi.generate(tokenizer, 7, 1, symmetric=False)
    twice = ioi.generate(tokenizer, 7, 1, symmetric=True)
    assert twice[:7].hash() == once.hash()
    assert torch.equal(twice.clean[7:], once.corrupted)
    assert torch.equal(twice.corrupted[7:], once.clean)
    assert torch.equal(twice.answer[7:], once.wrong)
    assert twice.texts[7:] == tuple((corrupted, clean) for clean, corrupted in once.texts)


def test_generating_leaves_the_global_random_state_alone(tokenizer):
    random.seed(5)
    before = random.getstate()
    first = ioi.generate(tokenizer, 5, 27, symmetric=True)
    assert random.getstate() == before
    random.seed(6)
    assert ioi.generate(tokenizer, 5, 27, symmetric=True).hash() == first.hash()
    assert ioi.generate(tokenizer, 5, 28, symmetric=True).hash() != first.hash()


def test_two_names_give_prompts_whose_answer_is_the_name_mentioned_once(tokenizer):
    pairs = ioi.generate(
        tokenizer, 60, 27, templates=ioi.TWO_NAME_TEMPLATES, corruptions=ioi.TWO_NAME_CORRUPTIONS, symmetric=True
    )
    assert set(pairs.labels["corruption"]) == set(ioi.TWO_NAME_CORRUPTIONS)
    rows = torch.arange(len(pairs))
    for tokens, answer in ((pairs.clean, pairs.answer), (pairs.corrupted, pairs.wrong)):
        first, second, giver = (tokens[rows, pairs.roles[role]] for role in ("n1", "n2", "n3"))
        assert torch.equal(answer, torch.where(first == giver, second, first))
        assert ((first == giver) ^ (second == giver)).all()
    name_tokens = torch.stack([pairs.roles[role] for role in ("n1", "n2", "n3")], 1)
    changed = pairs.clean.gather(1, name_tokens) != pairs.corrupted.gather(1, name_tokens)
    assert (changed.sum(1) == 1).all()
    assert ((pairs.clean != pairs.corrupted).sum(1) == 1).all()


def test_names_that_are_not_one_token_or_begin_another_name_are_left_out():
    tokenizer = build_tokenizer([" Ann", " Anna", " Bo", " Bob", " Cy", " Dee", " Di", "ana"])
    names = ["Dee", "Anna", "Ann", "Bob", "Bo", "Cy", "Cy", "Diana", "Zed"]
    assert ioi.usable_names(tokenizer, names) == ["Anna", "Bob", "Cy", "Cy", "Dee"]
    assert len(ioi.usable_names(build_tokenizer(WORDS))) == 205
    with pytest.raises(InputError, match="has 1 names as one token"):
        ioi.generate(tokenizer, 1, 0, symmetric=True)


def test_a_prompt_starts_with_one_bos_whatever_the_tokenizer_adds():
    words = ["<unk>", "<s>", ",", ".", "Afterwards", "Friends", *(word.strip() for word in WORDS)]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")
    assert tokenizer("Then")["input_ids"][0] == 1
    pairs = ioi.generate(tokenizer, 4, 27, symmetric=True)
    assert ((pairs.clean == 1).sum(1) == 1).all()
    assert (pairs.clean[:, 0] == 1).all()

    tokenizer.bos_token = None
    tokenizer.eos_token = "."
    assert (ioi.generate(tokenizer, 4, 27, symmetric=True).clean[:, 0] == vocabulary["."]).all()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="neither a BOS nor an EOS"):
        ioi.generate(tokenizer, 4, 27, symmetric=True)


def test_a_word_of_several_tokens_has_its_role_on_the_first():
    words = [word for word in WORDS if word not in (" hospital", " basketball")]
    tokenizer = build_tokenizer([*words, " hos", "pital", " basket", "ball"])
    template = ioi.TEMPLATES[3].replace(ioi.PLACE, "hospital").replace(ioi.OBJECT, "basketball")
    pairs = ioi.generate(tokenizer, 2, 0, templates=[template], symmetric=True)
    assert [tokenizer.decode(pairs.clean[0, pairs.roles[role][0]]) for role in ("place", "place+1", "place+2")] == [
        " hos",
        "pital",
        ".",
    ]
    assert [tokenizer.decode(pairs.clean[0, pairs.roles[role][0]]) for role in ("object", "object+1", "out")] == [
        " basket",
        "ball",
        " to",
    ]


def test_generated_pairs_and_pairs_read_from_a_file_are_the_same(tokenizer, tmp_path):
    for templates, corruptions in (
        (ioi.TEMPLATES, ioi.CORRUPTIONS),
        (ioi.TWO_NAME_TEMPLATES, ioi.TWO_NAME_CORRUPTIONS),
    ):
        pairs = ioi.generate(tokenizer, 40, 9, templates=templates, corruptions=corruptions, symmetric=False)
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in as_rows(pairs, tokenizer)))
        read = Pairs.from_jsonl(path, tokenizer)
        assert read.hash() == pairs.hash()
        assert (read.texts, read.labels, list(read.roles)) == (pairs.texts, pairs.labels, list(pairs.roles))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_pairs": 0}, "at least one pair"),
        ({"templates": ioi.TEMPLATES[0]}, "templates is .*list of texts"),
        ({"templates": []}, "templates is .*at least one"),
        ({"corruptions": ["ABC AB C"]}, "cannot be read"),
        ({"corruptions": ["ABC AB C -> AB AB C"]}, "cannot be read"),
        ({"corruptions": ioi.TWO_NAME_CORRUPTIONS}, r"5 times \[NAME\].*3 names"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_one_sentence(options, message, tokenizer):
    with pytest.raises(InputError, match=message):
        ioi.generate(tokenizer, **({"n_pairs": 2, "seed": 0} | options), symmetric=True)
