"""Greater-than: what lasted from 1732 ended in a later year of that century (Hanna, Liu and Variengien, 2023).

"The war lasted from the year 1732 to the year 17" goes on with 33 to 99. The corrupted prompt has 01 in place of 32,
after which nearly every year is right. Nouns and centuries vary; all prompts of a call have the same layout.

What is measured. Each pair has one year above the clean prompt's, its `answer`, and one below it (but above 01), its
`wrong`, both drawn evenly. The experiments take the logit difference of the two, as for every task; its mean over
pairs is how much likelier, in logits, a later year is than an earlier one. Accuracy is between these two, so guessing
gives 0.5. The literature's measure, the probability of all years above minus that of all others, is
`probability_difference`; a run keeps it for the clean prompts.

With a tokenizer that writes years in single digits, all of this is about the tens digit. GPT-NeoX's was not at hand
when this was written; years and centuries that a tokenizer cuts elsewhere are left out.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ioi_mamba.errors import InputError
from ioi_mamba.tasks.base import ABSENT, Pairs
from ioi_mamba.tasks.prompts import Prompt, check_drawn, following_ids, read
from ioi_mamba.tasks.task import Task

START, MIDDLE = "The {noun} lasted from the year {century}", " to the year {century}"
CENTURIES = tuple(range(11, 18))
CORRUPTED_YEAR = 1
YEARS = tuple(f"{year:02d}" for year in range(100))
NOUNS = tuple(
    """
    war siege reign voyage project trial campaign conflict dispute journey mission plague famine truce peace strike
    revolt debate drought marriage alliance expedition rebellion revolution occupation construction negotiation
    partnership investigation experiment
    """.split()  # noqa: SIM905
)


def year_tokens(tokenizer: Any) -> Tensor:
    """Int64[100], the token that begins each of the years 00 to 99 after a century: the whole year, or its tens digit.

    A year that is written with more or fewer tokens than most is -1 and takes no part.
    """
    return _first_tokens(_endings(tokenizer))


def _endings(tokenizer: Any) -> dict[int, list[list[int]]]:
    """By century, the tokens of each of the YEARS after it; [] for a year that is not cut off there."""
    return {
        century: following_ids(tokenizer, START.format(noun=NOUNS[0], century=century), YEARS) for century in CENTURIES
    }


def _usual(endings: Mapping[int, list[list[int]]]) -> list[tuple[int, ...]]:
    """The tokens of each year as most centuries have them; () for one that no century has, or of unusual length."""
    by_year = [Counter(tuple(row) for row in rows if row) for rows in zip(*endings.values(), strict=True)]
    usual = [found.most_common(1)[0][0] if found else () for found in by_year]
    length = Counter(len(row) for row in usual if row).most_common(1)
    return [row if length and len(row) == length[0][0] else () for row in usual]


def _first_tokens(endings: Mapping[int, list[list[int]]]) -> Tensor:
    return torch.tensor([row[0] if row else ABSENT for row in _usual(endings)])


def generate(tokenizer: Any, n_pairs: int, seed: int = 27) -> Pairs:
    """`n_pairs` pairs drawn from `seed`, without swapped copies: the corrupted prompt has no wrong later years.

    Roles: `noun`, `century` and `year` (of the first date; `year+1` if it has two tokens), `out`. The labels are the
    same for all.

        >>> from ioi_mamba import open_model
        >>> generate(open_model("mini", device="cpu").tokenizer, 1, 27).texts[0]
        ('The debate lasted from the year 1455 to the year 14', 'The debate lasted from the year 1401 to the year 14')

    Raises InputError for a tokenizer that does not cut a year into its century and its last two digits.
    """
    n_pairs, seed = check_drawn(n_pairs, seed)
    endings = _endings(tokenizer)
    first = {year: token for year, token in enumerate(_first_tokens(endings).tolist()) if token != ABSENT}
    order = list(dict.fromkeys(first.values()))
    rank = {year: order.index(token) for year, token in first.items()}
    years = _years(tokenizer, endings, rank)
    nouns = _nouns(tokenizer)
    rng, prompts, answer, wrong = random.Random(seed), [], [], []
    for _ in range(n_pairs):
        noun = rng.choice(nouns)
        century, year = rng.choice(years)
        start = START.format(noun=noun, century=century)
        middle = MIDDLE.format(century=century)
        prompts.append([f"{start}{YEARS[shown]}{middle}" for shown in (year, CORRUPTED_YEAR)])
        answer.append(first[rng.choice([other for other in rank if rank[other] > rank[year]])])
        wrong.append(first[rng.choice([y for y in rank if rank[CORRUPTED_YEAR] < rank[y] < rank[year]])])
    clean, corrupted = (read(tokenizer, side) for side in zip(*prompts, strict=True))
    for prompt in (*clean, *corrupted):
        if prompt.lacks(tokenizer.unk_token_id):
            raise InputError(
                f"A word of {prompt.text!r} is unknown to the tokenizer: greater-than needs one that has it."
            )
    return Pairs(
        clean=torch.tensor([prompt.tokens for prompt in clean]),
        corrupted=torch.tensor([prompt.tokens for prompt in corrupted]),
        answer=torch.tensor(answer),
        wrong=torch.tensor(wrong),
        candidates=torch.tensor([answer, wrong]).T,
        labels={"template": ("lasted",) * n_pairs, "corruption": (f"YY -> {YEARS[CORRUPTED_YEAR]}",) * n_pairs},
        roles={role: torch.full((n_pairs,), index) for role, index in _roles(clean[0]).items()},
        texts=tuple((clean, corrupted) for clean, corrupted in prompts),
    )


def _roles(prompt: Prompt) -> dict[str, int]:
    """Where the words of a prompt are that vary; it is the same place in all prompts of a call."""
    found = re.fullmatch(r"\w+ (?P<noun>\w+) .* (?P<century>\d\d)(?P<year>\d\d) .*", prompt.text)
    assert found is not None
    # A word begins with its space, which may be a token of its own.
    at = {role: prompt.token_at(found.start(role) - 1) for role in ("noun", "century")}
    at["year"] = prompt.token_at(found.start("year"))
    last = prompt.token_at(found.end("year") - 1)
    at |= {f"year+{k}": at["year"] + k for k in range(1, last - at["year"] + 1)}
    return {"BOS": 0, **at, "out": len(prompt.tokens) - 1}


def probability_difference(logits: Tensor, pairs: Pairs, tokens: Tensor) -> Tensor:
    """P(a year above the prompt's) - P(any other year), over the whole vocabulary; Float[..., pair], in -1..1.

    logits: Float[..., pair, vocab] at the last position of clean prompts. tokens: what `year_tokens` gives.
    """
    choices = torch.tensor(list(dict.fromkeys(tokens[tokens != ABSENT].tolist())))
    own = pairs.clean[torch.arange(len(pairs)), pairs.roles["year"]]
    rank = (choices == own[:, None]).int().argmax(1)
    above = (torch.arange(len(choices)) > rank[:, None]).to(logits.device)
    probabilities = logits.softmax(-1)[..., choices.to(logits.device)]
    return torch.where(above, probabilities, -probabilities).sum(-1)


def measures(logits: Tensor, pairs: Pairs, tokenizer: Any) -> dict[str, Tensor]:
    """What a run keeps of the unpatched model besides its accuracy: `probability_difference`, Float[pair].

    logits: Float[pair, vocab] at the last position of the clean prompts.
    """
    return {"probability difference": probability_difference(logits, pairs, year_tokens(tokenizer))}


def _nouns(tokenizer: Any) -> list[str]:
    """Nouns of one length in tokens, the commonest, so that all prompts have one layout."""
    by_length: dict[int, list[str]] = {}
    before = START.split(" {", 1)[0]
    for noun, ids in zip(NOUNS, following_ids(tokenizer, before, [f" {noun}" for noun in NOUNS]), strict=True):
        if ids:
            by_length.setdefault(len(ids), []).append(noun)
    if not by_length:
        raise InputError(f"This tokenizer knows none of the nouns of greater-than, such as {NOUNS[0]!r}: use another.")
    return max(by_length.values(), key=len)


def _years(tokenizer: Any, endings: Mapping[int, list[list[int]]], rank: Mapping[int, int]) -> list[tuple[int, int]]:
    """(century, year) to draw from: cut where they should be, with a wrong year between 01 and it and one above."""
    found, ranks, lowest = [], rank.values(), rank.get(CORRUPTED_YEAR, len(YEARS))
    years = [year for year in rank if any(lowest < other < rank[year] for other in ranks) and rank[year] < max(ranks)]
    usual = _usual(endings)
    for century, rows in endings.items():
        cut = [row == list(ids) for row, ids in zip(rows, usual, strict=True)]
        found += [(century, year) for year in years if cut[year] and cut[CORRUPTED_YEAR]]
    before = START.rsplit(" ", 1)[0].format(noun=NOUNS[0])
    written = following_ids(tokenizer, before, [f" {century}" for century in CENTURIES])
    lengths = {century: len(ids) for century, ids in zip(CENTURIES, written, strict=True)}
    found = [(century, year) for century, year in found if lengths[century] == lengths[CENTURIES[0]]]
    if not found:
        raise InputError(
            "This tokenizer does not cut years such as 1732 into 17 and 32: greater-than needs one that does, "
            "such as GPT-NeoX's."
        )
    return found


TASK = Task(
    name="greater-than",
    title="How the model works out which year is later",
    varies="the last two digits of the first year",
    generate=generate,
    default_pairs=100,
    measures=measures,
    roles={
        "noun, century, year": "the words of the first date that vary",
        "out": "the last token, where the answer is read",
    },
)
