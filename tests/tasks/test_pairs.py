"""Pairs: built from tokens or a file, taken apart and put together; whatever does not fit is refused."""

import dataclasses
import gzip
import json
from types import SimpleNamespace

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BatchEncoding, PreTrainedTokenizerFast

from ioi_mamba.errors import InputError
from ioi_mamba.tasks import Pairs, greater_than, ioi

ROW = {
    "pair": 0,
    "corruption": "AB A B -> AB B A",
    "uncorrupted": "Ann met Bob at the pub. Ann gave a pie to",
    "corrupted": "Ann met Bob at the pub. Bob gave a pie to",
    "answer_uncorrupted": " Bob",
    "answer_corrupted": " Ann",
    "incorrect_for_uncorrupted": [" Ann"],
    "incorrect_for_corrupted": [" Bob"],
}
OTHER = ROW | {
    "corruption": "BA A B -> CA A C",
    "template": "bar",
    "uncorrupted": "So Cy met Bob. Bob gave a pie to",
    "corrupted": "So Ann met Bob. Bob gave a pie to",
    "answer_uncorrupted": " Cy",
    "incorrect_for_uncorrupted": [" Bob", " Ann"],
    "incorrect_for_corrupted": [" Cy", " Bob"],
}
WORDS = ["<unk>", "<s>", ".", "Ann", "Bob", "Cy", "So", "met", "at", "the", "pub", "gave", "a", "pie", "to"]


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


@pytest.fixture
def write(tmp_path):
    def write_rows(*rows):
        path = tmp_path / "pairs.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        return path

    return write_rows


@pytest.fixture
def ragged():
    return Pairs.from_tokens(
        [[9, 1, 2, 3], [9, 4, 5], [9, 1, 3, 2]],
        [[9, 1, 7, 3], [9, 6, 5], [9, 1, 3, 2]],
        [1, 2, 3],
        [4, 5, 6],
        candidates=[[1, 4, 8], [2, 5], [6, 3]],
        lengths=[4, 3, 4],
        labels={"corruption": ["x", "y", "x"]},
        roles={"name": [1, 1, 1], "verb": [2, -1, 2], "out": [3, 2, 3]},
    )


def test_rows_of_a_file_become_tokens_candidates_labels_and_roles(tokenizer, write):
    pairs = Pairs.from_jsonl(write(ROW, "", OTHER), tokenizer)
    words = [" ".join(WORDS[token] for token in row) for row in pairs.clean]
    assert words[0] == "<s> Ann met Bob at the pub . Ann gave a pie to"
    assert words[1] == "<s> So Cy met Bob . Bob gave a pie to <s> <s>"
    assert pairs.lengths.tolist() == [13, 11]
    assert (pairs.answer.tolist(), pairs.wrong.tolist()) == ([4, 5], [3, 3])
    assert pairs.candidates.tolist() == [[3, 4, -1], [3, 4, 5]]
    assert pairs.labels == {
        "template": ("(none)", "bar"),
        "corruption": ("AB A B -> AB B A", "BA A B -> CA A C"),
    }
    by_role = {role: indices.tolist() for role, indices in pairs.roles.items()}
    assert by_role == {
        "BOS": [0, 0],
        "n1-1": [-1, 1],
        "n1": [1, 2],
        "n1+1": [2, 3],
        "n2": [3, 4],
        "n2+1": [4, 5],
        "n2+2": [5, -1],
        "place": [6, -1],
        "place+1": [7, -1],
        "n3": [8, 6],
        "n3+1": [9, 7],
        "n3+2": [10, 8],
        "object": [11, 9],
        "out": [12, 10],
    }
    assert pairs.first_difference.tolist() == [8, 2]


def test_a_packed_file_reads_like_a_plain_one(tokenizer, write, tmp_path):
    path = write(ROW, OTHER)
    packed = tmp_path / "pairs.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert Pairs.from_jsonl(packed, tokenizer).hash() == Pairs.from_jsonl(path, tokenizer).hash()


def test_a_role_that_the_two_prompts_do_not_share_is_left_out(tokenizer, write):
    pairs = Pairs.from_jsonl(write(ROW | {"corrupted": "So Ann met Bob at pub. Ann gave a pie to"}), tokenizer)
    assert list(pairs.roles) == ["BOS", "n3", "n3+1", "n3+2", "object", "out"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[" * 90_000, "line 2 is not valid JSON"),
        ("[1]", "line 2 is not a JSON object"),
        (
            {key: value for key, value in ROW.items() if key != "answer_corrupted"},
            "line 2 has no 'answer_corrupted'",
        ),
        (ROW | {"uncorrupted": 3}, "line 2: 'uncorrupted' is not text"),
        (ROW | {"uncorrupted": "Ann \ud800 Bob"}, "line 2: 'uncorrupted' is not text"),
        (ROW | {"incorrect_for_corrupted": "Bob"}, "line 2: 'incorrect_for_corrupted' is not a list"),
        (ROW | {"answer_uncorrupted": " Zoe"}, "line 2: ' Zoe' is not one token"),
        (ROW | {"incorrect_for_corrupted": [" Bob Bob"]}, "line 2: ' Bob Bob' is not one token"),
        (ROW | {"corrupted": "Ann met Bob. Bob gave a pie to"}, "line 2: the prompts have 12 and 9 tokens"),
        (ROW | {"corrupted": ROW["corrupted"].replace("pie", "cat")}, "line 2: a word of .* is unknown"),
        (ROW | {"uncorrupted": "a " * 60_000}, "line 2 is longer than 100000 bytes"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_by_file_and_number(line, message, tokenizer, write):
    with pytest.raises(InputError, match=rf"pairs\.jsonl {message}") as caught:
        Pairs.from_jsonl(write(ROW, line, ROW), tokenizer)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_file_that_cannot_be_read_is_refused(tokenizer, write, tmp_path):
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(gzip.compress(json.dumps(ROW).encode())[:-12])
    plain = tmp_path / "plain.jsonl.gz"
    plain.write_text(json.dumps(ROW))
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(json.dumps(ROW | {"template": "x"}).encode().replace(b'"x"', b'"\xff"'))
    for path, message in (
        (tmp_path / "missing.jsonl", r"missing\.jsonl cannot be read \(No such file"),
        (tmp_path, "cannot be read"),
        (torn, "torn.jsonl.gz cannot be read"),
        (plain, "plain.jsonl.gz cannot be read"),
        (latin, "latin.jsonl line 1 is not valid JSON"),
        (write(""), "holds no pairs"),
    ):
        with pytest.raises(InputError, match=message):
            Pairs.from_jsonl(path, tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clean": [[9, 1, 2], [9, 1]]}, "rows of clean are not equally long; give lengths="),
        ({"clean": [[9, 1, 2], [9, 1]], "lengths": [3, 3]}, "Row 1 of clean has 2 tokens and a length of 3"),
        ({"clean": [9, 1, 2]}, r"clean has shape \(3,\)"),
        ({"clean": []}, "clean is empty"),
        ({"clean": [[9, 1, 2.5], [9, 1, 2]]}, "clean has dtype torch.float32"),
        ({"clean": [[9, 1, 2**70], [9, 1, 2]]}, "clean cannot be read as whole numbers"),
        ({"clean": [[9, 1, -2], [9, 1, 2]]}, "clean has values out of range"),
        ({"clean": "tokens"}, "clean cannot be read as whole numbers"),
        ({"clean": ["one two", "three"]}, "clean cannot be read as whole numbers: it is text; give token ids"),
        ({"clean": b"tokens"}, "clean cannot .* it is text"),
        ({"clean": {"input_ids": [[9, 1, 2]]}}, "clean cannot .* it is a dict or an encoding"),
        ({"clean": BatchEncoding({"input_ids": [[9, 1, 2]]})}, "clean cannot .* it is a dict or an encoding"),
        ({"clean": [SimpleNamespace(ids=[9, 1])]}, "clean cannot .* it is an encoding"),
        ({"clean": None}, "clean cannot be read as whole numbers"),
        ({"clean": [[9, 1, None], [9, 1, 2]]}, "clean cannot be read as whole numbers"),
        ({"clean": [[9, 1, True], [9, 1, 2]]}, "clean cannot .* it is True or False"),
        ({"clean": torch.ones(2, 3, dtype=torch.bool)}, "clean has dtype torch.bool"),
        ({"clean": numpy.ones((2, 3), numpy.float16)}, "clean has dtype torch.float16"),
        ({"clean": numpy.array([[9, 1, "a"], [9, 1, 2]], dtype=object)}, "clean cannot be read"),
        ({"clean": numpy.array([[9, 1, 2**64 - 1]] * 2, numpy.uint64)}, "clean has values out of range"),
        ({"answer": [True, False]}, "answer cannot .* it is True or False"),
        ({"answer": [1.0, 2.0]}, "answer has dtype torch.float32"),
        ({"labels": ["x", "y"]}, "labels is a list; give a dict"),
        ({"labels": {"corruption": "xy"}}, "label 'corruption' is one text"),
        ({"roles": [1, 2]}, "roles is a list; give a dict"),
        ({"corrupted": [[9, 1], [9, 2]]}, r"corrupted has shape \(2, 2\) and clean \(2, 3\)"),
        ({"answer": [1]}, r"answer has shape \(1,\)"),
        ({"wrong": [[1, 2]]}, r"wrong has shape \(1, 2\)"),
        ({"lengths": [3, 4]}, "lengths has values out of range; they must be at least 1 and at most 3"),
        ({"lengths": [0, 3]}, "lengths has values out of range"),
        ({"lengths": [3]}, r"lengths has shape \(1,\)"),
        ({"candidates": [1, 2]}, r"candidates has shape \(2,\)"),
        ({"candidates": [[1, 3], [4, 5]]}, "candidates lacks its answer"),
        (
            {"roles": {"n1": [1, 3]}},
            "role 'n1' has values out of range; they must be at least -1 and at most 2",
        ),
        ({"labels": {"corruption": ["x"]}}, "label 'corruption' has 1 entries; give one per pair, 2"),
    ],
)
def test_tokens_that_do_not_fit_are_refused_in_one_sentence(change, message):
    fitting = {
        "clean": [[9, 1, 2], [9, 1, 3]],
        "corrupted": [[9, 4, 2], [9, 4, 3]],
        "answer": [1, 2],
        "wrong": [3, 4],
    }
    assert len(Pairs.from_tokens(**fitting)) == 2
    with pytest.raises(InputError, match=message):
        Pairs.from_tokens(**(fitting | change))


def test_tensors_arrays_and_lists_of_whole_numbers_are_the_same_pairs():
    rows = [[9, 1, 2], [9, 1, 3]], [[9, 4, 2], [9, 4, 3]], [1, 2], [3, 4]
    types = ("uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
    kinds = [list, torch.tensor, *(lambda row, t=t: numpy.array(row, dtype=t) for t in types)]
    kinds += [lambda row, t=t: torch.tensor(row, dtype=getattr(torch, t)) for t in types]
    kinds += [lambda row: list(numpy.array(row)), lambda row: list(torch.tensor(row))]
    made = [Pairs.from_tokens(*map(kind, rows), lengths=kind([3, 2])) for kind in kinds]
    assert len({pairs.hash() for pairs in made}) == 1
    assert all(pairs.clean.dtype == pairs.lengths.dtype == torch.int64 for pairs in made)


def test_ragged_rows_may_be_lists_arrays_or_tensors(ragged):
    rows = [[9, 1, 2, 3], [9, 4, 5], [9, 1, 3, 2]], [[9, 1, 7, 3], [9, 6, 5], [9, 1, 3, 2]]
    want = Pairs.from_tokens(*rows, [1, 2, 3], [4, 5, 6], lengths=[4, 3, 4])
    for kind in (numpy.array, torch.tensor, lambda row: numpy.array(row, "uint8")):
        made = Pairs.from_tokens(
            *([kind(row) for row in side] for side in rows), [1, 2, 3], [4, 5, 6], lengths=[4, 3, 4]
        )
        assert made.hash() == want.hash()


def test_pairs_made_directly_and_of_texts_say_what_they_need(ragged):
    with pytest.raises(InputError, match=r"clean is a list, no tensor; Pairs\.from_tokens takes lists"):
        dataclasses.replace(ragged, clean=[[9, 1]])
    with pytest.raises(InputError, match=r"clean has dtype torch\.uint8"):
        dataclasses.replace(ragged, clean=ragged.clean.to(torch.uint8))
    for prompts, message in (
        ("Ann met Bob", "no PromptPairs"),
        (["Ann met Bob"], "no PromptPairs"),
        ([], "no prompts"),
    ):
        with pytest.raises(InputError, match=message):
            Pairs.from_prompts(prompts, None)


@pytest.mark.parametrize("task", [ioi, greater_than], ids=["ioi", "greater-than"])
@pytest.mark.parametrize(("n_pairs", "seed"), [(2.5, 1), ("3", 1), (True, 1), (None, 1), (2, None), (2, "x"), (2, 1.5)])
def test_what_is_drawn_is_told_by_whole_numbers(task, n_pairs, seed):
    with pytest.raises(InputError, match="give a whole number"):
        task.generate(None, n_pairs, seed)


def test_a_tokenizer_without_character_offsets_is_refused(write):
    slow = SimpleNamespace(is_fast=False, bos_token_id=1, eos_token_id=None, unk_token_id=0)
    with pytest.raises(InputError, match="does not report character offsets"):
        Pairs.from_jsonl(write(ROW), slow)


def test_tokens_outside_the_vocabulary_are_refused(ragged):
    ragged.check_vocab(10)
    with pytest.raises(InputError, match="clean holds token 9, and the model's vocabulary has 9"):
        ragged.check_vocab(9)
    with pytest.raises(InputError, match="candidates holds token 8"):
        dataclasses.replace(ragged, clean=ragged.clean % 8, corrupted=ragged.corrupted % 8).check_vocab(8)


def test_ragged_rows_are_padded_on_the_right_and_trimmed_by_layout(ragged):
    assert ragged.clean.tolist() == [[9, 1, 2, 3], [9, 4, 5, 9], [9, 1, 3, 2]]
    assert ragged.candidates.tolist() == [[1, 4, 8], [2, 5, -1], [6, 3, -1]]
    assert ragged.last.tolist() == [3, 2, 3]
    long, short = ragged.layouts()
    assert (long.clean.tolist(), long.lengths) == ([[9, 1, 2, 3], [9, 1, 3, 2]], None)
    assert (short.clean.tolist(), list(short.roles)) == ([[9, 4, 5]], ["name", "out"])
    assert long.position_labels() == ["BOS", "name", "verb", "out"]
    assert ragged.position_labels() == ["BOS", "name", "2", "3"]


def test_the_first_difference_is_the_last_token_where_there_is_none(ragged):
    assert ragged.first_difference.tolist() == [2, 1, 3]
    only_padding_differs = dataclasses.replace(ragged, clean=ragged.corrupted + (torch.arange(12) == 7).view(3, 4))
    assert only_padding_differs.clean[1].tolist() == [9, 6, 5, 10]
    assert only_padding_differs.first_difference.tolist() == [3, 2, 3]


def test_pairs_of_one_label_value_come_in_the_order_seen(ragged):
    groups = ragged.by("corruption")
    assert [(value, part.answer.tolist()) for value, part in groups.items()] == [("x", [1, 3]), ("y", [2])]
    with pytest.raises(InputError, match="no label 'template'; they have corruption"):
        ragged.by("template")


def test_rows_are_selected_by_slice_mask_tensor_list_and_number(ragged):
    for rows in (slice(1, 3), torch.tensor([False, True, True]), torch.tensor([1, 2]), [1, 2]):
        part = ragged[rows]
        assert part.answer.tolist() == [2, 3]
        assert part.labels["corruption"] == ("y", "x")
        assert part.lengths.tolist() == [3, 4]
    assert ragged[-1].clean.tolist() == [[9, 1, 3, 2]]
    with pytest.raises(InputError, match="No pair of the 3"):
        ragged[3:]


def test_parts_of_different_width_roles_and_labels_go_together(ragged):
    narrow = Pairs.from_tokens([[9, 1]], [[9, 2]], [1], [2], candidates=[[1, 2]], roles={"start": [0], "out": [1]})
    both = Pairs.concat([ragged, narrow])
    assert both.clean[-1].tolist() == [9, 1, 9, 9]
    assert both.lengths.tolist() == [4, 3, 4, 2]
    assert both.labels == {}
    assert {role: indices.tolist() for role, indices in both.roles.items()} == {
        "start": [-1, -1, -1, 0],
        "name": [1, 1, 1, -1],
        "verb": [2, -1, 2, -1],
        "out": [3, 2, 3, 1],
    }
    assert both.candidates[-1].tolist() == [1, 2, -1]
    with pytest.raises(InputError, match="Some parts have candidates"):
        Pairs.concat([ragged, dataclasses.replace(narrow, candidates=None)])
    with pytest.raises(InputError, match="no pairs"):
        Pairs.concat([])


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
)
def test_taking_pairs_apart_and_putting_them_together_changes_nothing(lengths, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randint(0, 50, shape, generator=generator)

    pairs = Pairs.from_tokens(
        [draw(length).tolist() for length in lengths],
        [draw(length).tolist() for length in lengths],
        draw(len(lengths)),
        draw(len(lengths)),
        lengths=lengths,
        roles={"out": [length - 1 for length in lengths]},
    )
    rows = Pairs.concat([pairs[i] for i in range(len(pairs))])
    assert rows.hash() == pairs.hash()
    order = sorted(range(len(lengths)), key=lambda i: lengths.index(lengths[i]))
    regrouped = Pairs.concat(pairs.layouts())
    assert (regrouped.last + 1).tolist() == [lengths[i] for i in order]
    for row, i in enumerate(order):
        assert torch.equal(regrouped.clean[row, : lengths[i]], pairs.clean[i, : lengths[i]])
    back = pairs.symmetric()[len(pairs) :].symmetric()[len(pairs) :]
    assert back.hash() == pairs.hash()


def test_the_hash_tells_apart_what_differs_and_ignores_how_it_was_made(ragged):
    seen = {ragged.hash()}
    for changed in (
        ragged.symmetric(),
        ragged[:2],
        ragged[[1, 0, 2]],
        dataclasses.replace(ragged, answer=ragged.wrong),
        dataclasses.replace(ragged, candidates=None),
        dataclasses.replace(ragged, roles={}),
        dataclasses.replace(ragged, roles={"noun": ragged.roles["name"]}),
    ):
        seen.add(changed.hash())
    assert len(seen) == 8
    assert Pairs.concat([ragged[:1], ragged[1:]]).hash() == ragged.hash()
