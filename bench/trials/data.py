"""Documents as arrays: pools to train on by source, and rows to measure on."""

import random
import re
import sys
import types
from functools import cache
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch

HERE = Path(__file__).parent
# The package without its __init__, which needs nnsight.
package = types.ModuleType("ioi_mamba")
package.__path__ = [str(HERE / "src" / "ioi_mamba")]
sys.modules["ioi_mamba"] = package
for missing in ("nnsight", "nnsight.modeling", "nnsight.intervention"):
    sys.modules.setdefault(missing, MagicMock())

from ioi_mamba.mini import corpus  # noqa: E402
from ioi_mamba.mini.tokenizer import build_tokenizer  # noqa: E402
from ioi_mamba.tasks import greater_than, ioi  # noqa: E402

LONGEST = 56  # positions; longer documents (1 % of them) are left out
ANSWER_WORD = re.compile(r" ?\w+")


@cache
def tokenizer():
    return build_tokenizer(corpus.vocabulary())


@cache
def kept():
    return corpus.held_out_texts(tokenizer())


def encode(text: str) -> tuple[list[int], list[int]]:
    """Ids between two ends of text, and of each id after the first whether it is one of an answer."""
    ids, answer = [0], []
    for part, is_answer in corpus.split_answers(text):
        new = tokenizer()(part).input_ids
        ids += new
        answer += [int(is_answer)] * len(new)
    return [*ids, 0], [*answer, 0]


def pool(job: tuple[str, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(source, seed, n): tokens [n, LONGEST + 1], answer marks [n, LONGEST], lengths."""
    source, seed, n = job
    rng = random.Random(f"{source}/{seed}")
    tokens = np.zeros((n, LONGEST + 1), np.int16)
    marks = np.zeros((n, LONGEST), np.uint8)
    lengths = np.zeros(n, np.int16)
    k = 0
    while k < n:
        ids, answer = encode(corpus.document(rng, kept(), {source: 1.0}))
        if len(ids) <= LONGEST + 1:
            tokens[k, : len(ids)], marks[k, : len(answer)], lengths[k] = ids, answer, len(answer)
            k += 1
    return tokens, marks, lengths


def choice_rows(source: str, held_out: tuple[str, ...], n: int, seed: int):
    """Rows to score each choice of each answer of n documents: tokens, first and last place of the choice, question,
    whether it is the answer."""
    rng = random.Random(f"measure/{source}/{held_out}/{seed}")
    rows, question = [], 0
    for _ in range(n):
        text, choices = corpus.draw_document(rng, source, held_out)
        pieces = text.split(corpus.ANSWER)
        for at in range(1, len(pieces)):
            before = "".join(pieces[:at])
            word = ANSWER_WORD.match(pieces[at]).group()
            among = next((c for c in choices.values() if word.strip() in c), None)
            if among is None:
                continue
            start = [0, *tokenizer()(before).input_ids]
            space = " " if word.startswith(" ") else ""
            for choice in among:
                ids = tokenizer()(space + choice).input_ids
                if len(start) + len(ids) <= LONGEST:
                    rows.append((start + ids, len(start), len(start) + len(ids), question, choice == word.strip()))
            question += 1
    tokens = np.zeros((len(rows), LONGEST), np.int16)
    for k, row in enumerate(rows):
        tokens[k, : len(row[0])] = row[0]
    columns = [np.array([row[c] for row in rows]) for c in (1, 2, 3, 4)]
    return tokens, *columns


MEASURED = [(source, held) for source in corpus.SOURCES for held in ((), (corpus.FRAMES,), (corpus.WORDS_OF_TWO,))
            if not (source == "published prompts" and held == (corpus.FRAMES,))
            and not (source in ("years", "agreement") and held == (corpus.WORDS_OF_TWO,))]  # fmt: skip


def measured(job):
    (source, held), n = job
    return (source, "+".join(held) or "known"), choice_rows(source, held, n, 0)


def as_tensors(pairs, device):
    return {name: getattr(pairs, name).to(device) for name in ("clean", "corrupted", "answer", "wrong", "choices", "last")}


@cache
def published(n: int):
    return {k: v for k, v in corpus.evaluation_sets(tokenizer(), corpus.HELD_OUT_SEED).items()} if n >= 200 else {
        ("all four", "all five"): ioi.generate(tokenizer(), n, 28)}  # fmt: skip
