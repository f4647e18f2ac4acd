"""Names, answers, roles and years with tokenizers of every kind: found as they stand in a prompt."""

import unicodedata

import pytest
import torch
from conftest import save_mamba
from tokenizers import normalizers
from tokenizers_by_hand import KINDS, byte_level, metaspace, prepend_replace, word_piece

import ioi_mamba as im
from ioi_mamba.analyses import state_similarity
from ioi_mamba.errors import InputError
from ioi_mamba.steering import steer
from ioi_mamba.tasks import Pairs, ioi, prompts
from ioi_mamba.tasks import greater_than as years
from ioi_mamba.tasks.prompts import PromptPair, single_token_ids

NAMES = ("Ana", "Ivan", "Leah", "Mary", "Kelly", "Éva")
IOI_WORDS = [*dict.fromkeys([*ioi.NAMES, *ioi.PLACES, *ioi.OBJECTS])]
IOI_WORDS += ["Then", "Afterwards", "When", "Friends", "and", "went", "to", "the", "gave", "a", "arrived", "at"]
YEAR_WORDS = ["The", "lasted", "from", "the", "year", "to", *years.NOUNS]
CLEAN = "Then, Éva, Ivan and Leah went to the office. Éva and Ivan gave a bone to"
CORRUPTED = "Then, Éva, Ivan and Leah went to the office. Éva and Leah gave a bone to"
WORDS = [*NAMES, *["Then", "went", "to", "the", "office", "and", "gave", "a", "bone"]]


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def shown(tokenizer, token):
    return tokenizer.decode([int(token)]).strip().lower()


def a_pair(form="NFC", names_form="NFC"):
    write = lambda text: unicodedata.normalize(form, text)
    name = lambda text: unicodedata.normalize(names_form, text)
    names = tuple(map(name, ("Éva", "Ivan", "Leah")))
    return PromptPair(write(CLEAN), write(CORRUPTED), name("Leah"), name("Ivan"), names, "x", "pair 0")


def test_every_name_of_the_paper_is_one_token_where_it_stands_in_a_prompt(kind):
    assert len(ioi.usable_names(kind(IOI_WORDS))) == 205


def test_generated_pairs_have_their_answers_and_roles_at_the_words(kind):
    tokenizer = kind(IOI_WORDS)
    pairs = ioi.generate(tokenizer, 20, 27, symmetric=True)
    reference = ioi.generate(im.open_model("mini", device="cpu").tokenizer, 20, 27, symmetric=True)
    assert pairs.texts == reference.texts
    for row, (clean, _) in enumerate(pairs.texts or ()):
        own = pairs.clean[row, : pairs.last[row] + 1].tolist()
        assert (own[0], own.count(tokenizer.bos_token_id)) == (tokenizer.bos_token_id, 1)
        words = clean.replace(",", "").replace(".", "").split()
        mentioned = [word.lower() for word in words if word in ioi.NAMES]
        at = {role: shown(tokenizer, pairs.clean[row, index[row]]) for role, index in pairs.roles.items()}
        assert [at[f"n{k}"] for k in range(1, 6)] == mentioned
        assert (at["place"], at["object"], at["out"]) == (words[words.index("the") + 1].lower(), words[-2], "to")
        answer = tokenizer(clean + " " + next(w for w in words if words.count(w) == 1 and w in ioi.NAMES))
        ids = [i for i in answer["input_ids"] if i not in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
        assert ids == [*own[1:], int(pairs.answer[row])]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("names_form", ["NFC", "NFD"])
def test_a_name_with_an_accent_keeps_its_roles_however_it_is_written(kind, form, names_form):
    tokenizer = kind(WORDS)
    pairs = Pairs.from_prompts([a_pair(form, names_form)], tokenizer)
    assert pairs.hash() == Pairs.from_prompts([a_pair()], tokenizer).hash()
    token = pairs.clean[0, pairs.roles["n1"][0]]
    assert token == pairs.clean[0, pairs.roles["n4"][0]] == single_token_ids(tokenizer, ["Éva"])["Éva"]
    assert {role for role in pairs.roles if role[1:].isdigit()} == {"n1", "n2", "n3", "n4", "n5"}


def test_a_role_stands_at_the_first_of_the_tokens_of_a_character():
    tokenizer = byte_level(False)([word for word in WORDS if word != "office"])
    text = CLEAN.replace("office", "éclair")
    pairs = Pairs.from_prompts(
        [
            PromptPair(
                text, text.replace("Éva and Ivan", "Éva and Leah"), "Leah", "Ivan", ("Éva", "Ivan", "Leah"), "x", "p"
            )
        ],
        tokenizer,
    )
    at = int(pairs.roles["place"][0])
    before, first, second = tokenizer.convert_ids_to_tokens(pairs.clean[0, at - 1 : at + 2].tolist())
    assert (before, tokenizer.convert_tokens_to_string([first, second])) == ("\u0120the", " é")


def test_a_name_in_a_script_with_vowel_signs_keeps_its_roles():
    text = "Then, मेरी and Ivan went to the office. Ivan gave a bone to"
    tokenizer = prepend_replace([*WORDS, "मेरी"])
    pair = PromptPair(text, text.replace(". Ivan", ". मेरी"), "मेरी", "Ivan", ("Ivan", "मेरी"), "x", "p")
    pairs = Pairs.from_prompts([pair], tokenizer)
    assert pairs.clean[0, pairs.roles["n1"][0]] == pairs.answer[0]
    assert int(pairs.roles["n3"][0]) > int(pairs.roles["n2"][0]) > int(pairs.roles["n1"][0])


def test_a_name_before_an_accent_is_no_mention_of_the_name_without_it():
    text = "Then, Evax\u0302, Eva and Ivan went to the office."  # x with a circumflex has no composed form
    (prompt,) = prompts.read(prepend_replace(WORDS), [text.replace("Evax\u0302", "Eva\u0323\u0302b")])
    assert len([role for role in prompts.find_roles(prompt, ["Eva"]) if role[1:].isdigit()]) == 1


def test_two_names_that_a_tokenizer_does_not_tell_apart_are_refused():
    tokenizer = word_piece(normalizers.BertNormalizer(lowercase=True))([*WORDS, "Eva"])
    pair = PromptPair(
        CLEAN, CLEAN.replace("Éva and", "Eva and"), "Éva", "Eva", ("Eva", "Ivan", "Leah", "Éva"), "x", "line 3"
    )
    with pytest.raises(InputError, match="line 3: 'Eva' and 'Éva' are the same token"):
        Pairs.from_prompts([pair], tokenizer)


def test_a_word_that_a_tokenizer_leaves_out_is_unknown_to_it():
    # A byte-pair tokenizer without an unknown token drops what it has no piece for.
    tokenizer = metaspace("first")(WORDS)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("bone", "")
    with pytest.raises(InputError, match="is unknown to the tokenizer"):
        Pairs.from_prompts([a_pair()], tokenizer)


@pytest.mark.parametrize("endings", [years.YEARS, "0123456789"], ids=["whole years", "digits"])
def test_years_are_cut_after_their_century_not_alone(endings):
    tokenizer = prepend_replace([*YEAR_WORDS, *map(str, years.CENTURIES)], inside=endings)
    pairs = years.generate(tokenizer, 30, 27)
    assert pairs.texts is not None
    step = 1 if endings is years.YEARS else 10
    for (clean, _), answer, wrong in zip(pairs.texts, pairs.answer, pairs.wrong, strict=True):
        year = int(clean.split(" to the year")[0][-2:])
        high, low = (int(tokenizer.convert_ids_to_tokens(int(token))) for token in (answer, wrong))
        assert low < year // step < high
    words = [tokenizer.convert_ids_to_tokens(int(pairs.clean[0, pairs.roles[role][0]])) for role in ("noun", "century")]
    assert words == [f"\u2581{pairs.texts[0][0].split()[1]}", f"\u2581{pairs.texts[0][0].split()[-1]}"]


@pytest.mark.parametrize(
    "which",
    ["prepend and replace", "byte fallback", "without accents", "word piece, lower case", "bytes, prefix space"],
)
def test_steering_and_similarity_find_names_with_any_tokenizer(which, tmp_path):
    tokenizer = KINDS[which](IOI_WORDS)
    save_mamba(tmp_path, vocab_size=len(tokenizer), n_layers=2)
    tokenizer.save_pretrained(tmp_path)
    model = im.open_model(str(tmp_path), device="cpu")
    pairs = ioi.generate(model.tokenizer, 30, 27, symmetric=False)
    averages = steer.averages(model, pairs, 0)
    assert pairs.texts is not None
    text = pairs.texts[0][0]
    # What follows the office's full stop or comma is the fourth name.
    new = pairs.texts[1][0].replace(",", ".").split(". ")[-1].split()[0]
    tokens, roles = steer._read_prompt(model.tokenizer, text, averages)
    assert tokens.tolist() == pairs.clean[0, : pairs.last[0] + 1].tolist()
    assert all(index == int(pairs.roles[role][0]) for role, index in roles.items())
    assert {"n1", "n2", "n3", "n4", "n5"} <= roles.keys()
    assert isinstance(im.steer(model, text, {"n4": new}, averages=averages, max_new_tokens=1), str)
    table = state_similarity.EXPERIMENT(model, pairs, layer=0, prompt=text)
    after = sorted(set(table.loc[table["after_name"], "row"]))
    assert after == sorted(int(pairs.roles[f"n{k}"][0]) + 1 for k in range(1, 6))
    assert torch.equal(tokens, pairs.clean[0, : pairs.last[0] + 1])
