"""Pairs of prompts as text: read from a file, cut into tokens, searched for positions that have a meaning."""

from __future__ import annotations

import difflib
import gzip
import html
import json
import re
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from numbers import Integral
from pathlib import Path
from typing import Any

from ioi_mamba.errors import InputError
from ioi_mamba.model.tokens import bos_id

MAX_LINE_BYTES, MAX_LINES = 100_000, 100_000  # packed, a small file can hold more than memory does
TEXT_KEYS = ("uncorrupted", "corrupted", "answer_uncorrupted", "answer_corrupted", "corruption")
PLAIN_KEYS = ("clean", "corrupted", "answer", "wrong")
NAME_LIST_KEYS = ("incorrect_for_uncorrupted", "incorrect_for_corrupted")

CONTEXT = "to"
"""The word before a name where no prompt is at hand."""

PLACE = re.compile(r"\bthe (\w+)[.,]")
OBJECT = re.compile(r"\ban? (\w+) to$")


@dataclass(frozen=True)
class PromptPair:
    """One pair as text. `names`: every name of the two prompts once, sorted; `source`: where it is from.

    Prompts and names are kept in Unicode's composed form (NFC): the same name is then the same characters.
    """

    clean: str
    corrupted: str
    answer: str
    wrong: str
    names: tuple[str, ...]
    corruption: str
    source: str
    template: str | None = None

    def __post_init__(self) -> None:
        for name in ("clean", "corrupted", "answer", "wrong"):
            object.__setattr__(self, name, composed(getattr(self, name)))
        object.__setattr__(self, "names", tuple(sorted(set(map(composed, self.names)))))

    @property
    def template_label(self) -> str:
        """The template's name if the pair came with one, else the words before the first name, as "Then"."""
        first_name = next(iter(_mentions(self.clean, self.names)), 0)
        return self.template or self.clean[:first_name].strip(" ,") or "(none)"


@dataclass(frozen=True)
class TokenizedPair:
    """Token ids of the two prompts, equally long, of the answers and of all names; roles hold for both."""

    clean: list[int]
    corrupted: list[int]
    answer: int
    wrong: int
    names: list[int]
    roles: dict[str, int]


@dataclass(frozen=True)
class Prompt:
    """A text as the model reads it. text: composed (NFC); tokens: ids, BOS first.

    spans: of each token the first and the past-the-last character in `text`, (0, 0) for a BOS put in front.
    """

    text: str
    tokens: list[int]
    spans: list[tuple[int, int]]

    def token_at(self, character: int) -> int:
        """Index of the first token that holds a part of this character, which may be several tokens."""
        holding = (k for k, (_, end) in enumerate(self.spans) if end > character)
        return next(holding, len(self.spans) - 1)

    def lacks(self, unknown: int | None) -> bool:
        """Whether a word is unknown to the tokenizer: its token is `unknown`, or it has none."""
        if unknown in self.tokens[1:]:
            return True
        ends = [end for _, end in self.spans]
        starts = [*(start for start, _ in self.spans[1:]), len(self.text)]
        return any(map(str.isalnum, (c for end, start in zip(ends, starts, strict=True) for c in self.text[end:start])))


def composed(text: str) -> str:
    """The text in Unicode's composed form (NFC), in which an accent is no character of its own."""
    return unicodedata.normalize("NFC", text)


def read(tokenizer: Any, texts: Iterable[str]) -> list[Prompt]:
    """The texts as the model reads them, each with exactly one BOS in front."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("This tokenizer does not report character offsets; open it with use_fast=True.")
    texts, bos = list(map(composed, texts)), bos_id(tokenizer)
    if not texts:
        return []
    encoding = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True)
    prompts = []
    for text, ids, spans in zip(texts, encoding["input_ids"], encoding["offset_mapping"], strict=True):
        begins = ids[:1] == [bos]  # a text may begin with it, and a tokenizer may put it there whatever it is told
        spans = [(start, end) for start, end in (spans if begins else [(0, 0), *spans])]
        prompts.append(Prompt(text, ids if begins else [bos, *ids], spans))
    return prompts


def following_ids(tokenizer: Any, context: str, endings: Iterable[str]) -> list[list[int]]:
    """The tokens of each ending as it stands right after `context`; [] where one is unknown or not cut off there.

    What an ending is alone says little: some tokenizers put a space in front of every text, or a token for it.
    """
    before, *whole = read(tokenizer, [context, *(context + ending for ending in endings)])
    n, found = len(before.tokens), []
    for prompt in whole:
        after = Prompt(prompt.text, [0, *prompt.tokens[n:]], [(0, len(before.text)), *prompt.spans[n:]])
        cut = prompt.tokens[:n] == before.tokens and not after.lacks(tokenizer.unk_token_id)
        found.append(prompt.tokens[n:] if cut else [])
    return found


def single_token_ids(tokenizer: Any, names: Iterable[str], context: str = CONTEXT) -> dict[str, int]:
    """The id of each name that is one known token where it stands after `context` and a space, and of no others."""
    names = list(names)
    found = following_ids(tokenizer, context, [f" {name}" for name in names])
    return {name: ids[0] for name, ids in zip(names, found, strict=True) if len(ids) == 1}


def tokenize(pairs: Sequence[PromptPair], tokenizer: Any) -> list[TokenizedPair]:
    """Tokenise both prompts of each pair, BOS in front, and find the roles.

    Raises InputError, naming the pair's `source`, for a name that is not one token with its leading space, two names
    that are the same token, a word unknown to the tokenizer, or unequal lengths.
    """
    names_after: dict[str, set[str]] = {}
    for pair in pairs:
        names_after.setdefault(_last_word(pair.clean), set()).update(pair.names)
    ids_after = {word: single_token_ids(tokenizer, sorted(names), word) for word, names in names_after.items()}
    read_in_turn = iter(read(tokenizer, [text for pair in pairs for text in (pair.clean, pair.corrupted)]))
    tokenized = []
    for pair, clean, corrupted in zip(pairs, read_in_turn, read_in_turn, strict=True):
        ids_of = ids_after[_last_word(pair.clean)]
        name_of: dict[int, str] = {}
        for name in pair.names:
            if name not in ids_of:
                raise InputError(f"{pair.source}: {f' {name}'!r} is not one token of this tokenizer; use another name.")
            other = name_of.setdefault(ids_of[name], name)
            if other != name:
                raise InputError(f"{pair.source}: {other!r} and {name!r} are the same token; use another name.")
        for prompt in (clean, corrupted):
            if prompt.lacks(tokenizer.unk_token_id):
                raise InputError(
                    f"{pair.source}: a word of {prompt.text!r} is unknown to the tokenizer; use words it has."
                )
        if len(clean.tokens) != len(corrupted.tokens):
            raise InputError(
                f"{pair.source}: the prompts have {len(clean.tokens) - 1} and {len(corrupted.tokens) - 1} tokens; "
                "the two prompts of a pair must be equally long."
            )
        roles, others = find_roles(clean, pair.names), find_roles(corrupted, pair.names)
        # An edit writes one prompt's value into the other at a role: it must be the same position in both.
        roles = {role: index for role, index in roles.items() if others.get(role) == index}
        tokenized.append(
            TokenizedPair(
                clean=clean.tokens,
                corrupted=corrupted.tokens,
                answer=ids_of[pair.answer],
                wrong=ids_of[pair.wrong],
                names=[ids_of[name] for name in pair.names],
                roles=roles,
            )
        )
    return tokenized


def find_roles(prompt: Prompt, names: Iterable[str]) -> dict[str, int]:
    """Token index of each semantic position of a prompt (`Pairs` lists them), BOS first and `out` last."""
    text, names = prompt.text, set(map(composed, names))
    anchors = {f"n{k}": prompt.token_at(start) for k, start in enumerate(_mentions(text, names), 1)}
    for role, pattern in (("place", PLACE), ("object", OBJECT)):
        found = pattern.search(text)
        if found and found[1] not in names:
            anchors[role] = prompt.token_at(found.start(1))
    out = len(prompt.tokens) - 1
    named = dict(sorted(anchors.items(), key=lambda item: item[1]))
    roles = {"BOS": 0}
    if named:
        first_role, first = next(iter(named.items()))
        roles |= {f"{first_role}-{first - index}": index for index in range(1, first)}
    taken = {0, out, *named.values()}
    for role, index in named.items():
        roles[role] = index
        following = index + 1
        while following not in taken and following < out:
            roles[f"{role}+{following - index}"] = following
            following += 1
    return roles | {"out": out}


def texts_of(name: str, column: Any) -> list[str]:
    """A text, or several, as a list. Raises InputError, by the column's name, for anything else and for empty texts."""
    listed = [column] if isinstance(column, str) else column
    if not isinstance(listed, Sequence) or not listed or not all(map(_is_text, listed)):
        raise InputError(f"{name} is {str(column)[:100]!r}; give a text or a list of texts, none of them empty.")
    return list(listed)


def marked(clean: str, corrupted: str) -> tuple[str, str]:
    """The two texts as HTML, escaped, with the words in which they differ marked."""
    words = [re.findall(r"\s*\S+", side) for side in (clean, corrupted)]
    matcher = difflib.SequenceMatcher(None, *words, autojunk=False)
    sides: tuple[list[str], list[str]] = ([], [])
    for kind, *ends in matcher.get_opcodes():
        for side, own, (begin, end) in zip(sides, words, (ends[:2], ends[2:]), strict=True):
            shown = html.escape("".join(own[begin:end]))
            side.append(shown if kind == "equal" or not shown else f"<mark>{shown}</mark>")
    return "".join(sides[0]), "".join(sides[1])


def words_of(text: str) -> list[str]:
    """The words of a text, in order: runs of letters, digits and what is written above or below them."""
    return ["".join(run) for is_word, run in groupby(composed(text), _in_word) if is_word]


def check_drawn(n_pairs: Any, seed: Any) -> tuple[int, int]:
    """How many pairs to draw, and from which seed. Raises InputError for what is no whole number, and for none."""
    for name, value in (("n_pairs", n_pairs), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise InputError(f"{name} is {value!r}; give a whole number.")
    if n_pairs < 1:
        raise InputError(f"n_pairs is {n_pairs}; ask for at least one pair.")
    return int(n_pairs), int(seed)


def is_name(role: str) -> bool:
    """Whether a role of `Pairs` is a name: n1, n2, ..."""
    return re.fullmatch(r"n\d+", role) is not None


def read_jsonl(path: Path) -> list[PromptPair]:
    """The pairs of a file with one JSON object a line, `.gz` or plain; InputError names file and line."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            lines = iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b"")
            pairs = []
            for number, line in enumerate(lines, 1):
                if number > MAX_LINES:
                    raise InputError(f"{path} has more than {MAX_LINES} lines; give that many pairs at most.")
                if line.strip():
                    pairs.append(_parse_line(line, f"{path} line {number}"))
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read ({reason}); give a readable .jsonl or .jsonl.gz file.") from error
    if not pairs:
        raise InputError(f"{path} holds no pairs; give a file with one JSON object a line.")
    return pairs


def _parse_line(line: bytes, source: str) -> PromptPair:
    if len(line) > MAX_LINE_BYTES:
        raise InputError(f"{source} is longer than {MAX_LINE_BYTES} bytes; give one pair of prompts a line.")
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} is not valid JSON ({_brief(error)}); give one JSON object a line.") from error
    if not isinstance(row, dict):
        raise InputError(f"{source} is not a JSON object; give one object with a pair of prompts a line.")
    if not {"clean", "answer", "wrong"}.isdisjoint(row):
        return _plain_row(row, source)
    for key in (*TEXT_KEYS, *NAME_LIST_KEYS):
        if key not in row:
            raise InputError(f"{source} has no {key!r}; every pair needs {', '.join((*TEXT_KEYS, *NAME_LIST_KEYS))}.")
    for key in TEXT_KEYS:
        if not _is_text(row[key]):
            raise InputError(f"{source}: {key!r} is not text; give a string that is not empty.")
    for key in NAME_LIST_KEYS:
        if not isinstance(row[key], list) or not all(map(_is_text, row[key])):
            raise InputError(f"{source}: {key!r} is not a list of names; give a list of strings.")
    answer, wrong = row["answer_uncorrupted"].strip(), row["answer_corrupted"].strip()
    incorrect = {name.strip() for key in NAME_LIST_KEYS for name in row[key]}
    return PromptPair(
        clean=row["uncorrupted"],
        corrupted=row["corrupted"],
        answer=answer,
        wrong=wrong,
        names=tuple(sorted({answer, wrong} | incorrect)),
        corruption=row["corruption"],
        source=source,
        # The paper's files number the template, which says nothing that the text does not.
        template=row["template"] if _is_text(row.get("template")) else None,
    )


def _plain_row(row: dict[str, Any], source: str) -> PromptPair:
    """A row with the keys clean, corrupted, answer, wrong, and perhaps candidates, corruption and template."""
    others = sorted(({*TEXT_KEYS, *NAME_LIST_KEYS} - {"corrupted", "corruption"}) & row.keys())
    if others:
        raise InputError(f"{source} mixes two forms: leave out {others[0]!r}, and write {', '.join(PLAIN_KEYS)}.")
    for key in PLAIN_KEYS:
        if not _is_text(row.get(key)):
            state = "has no" if key not in row else "is not text:"
            raise InputError(f"{source} {state} {key!r}; every pair needs {', '.join(PLAIN_KEYS)} as texts.")
    candidates = row.get("candidates", [])
    if not isinstance(candidates, list) or not all(map(_is_text, candidates)):
        raise InputError(f"{source}: 'candidates' is not a list of texts; give one, or leave it out.")
    for key in ("corruption", "template"):
        if key in row and not _is_text(row[key]):
            raise InputError(f"{source}: {key!r} is not text; give a string that is not empty, or leave it out.")
    answers = (row["answer"].strip(), row["wrong"].strip())
    return PromptPair(
        clean=row["clean"],
        corrupted=row["corrupted"],
        answer=answers[0],
        wrong=answers[1],
        names=tuple(sorted({*answers, *(each.strip() for each in candidates)})),
        corruption=row["corruption"] if _is_text(row.get("corruption")) else "given",
        source=source,
        template=row["template"] if _is_text(row.get("template")) else None,
    )


def _mentions(text: str, names: Iterable[str]) -> list[int]:
    """Where in `text` a name begins, in order; names within longer names do not count."""
    ends: dict[int, int] = {}
    for name in filter(None, names):
        start = text.find(name)
        while start >= 0:
            end = start + len(name)
            inside = (start > 0 and _in_word(text[start - 1]) and _in_word(name[0])) or (
                end < len(text) and _in_word(text[end]) and (_in_word(name[-1]) or _is_mark(text[end]))
            )
            if not inside:
                ends[start] = max(end, ends.get(start, 0))
            start = text.find(name, start + 1)
    found, past = [], 0
    for start in sorted(ends):
        if start >= past:
            found.append(start)
            past = ends[start]
    return found


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_" or _is_mark(character)


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")


def _last_word(text: str) -> str:
    return text.split()[-1]


def _is_text(value: object) -> bool:
    # A lone surrogate is valid JSON and no Unicode text: no tokenizer takes it.
    return isinstance(value, str) and bool(value.strip()) and value.encode("utf-8", "replace").decode() == value


def _brief(error: BaseException) -> str:
    return str(error).splitlines()[0].split(": ", 1)[0][:80]
