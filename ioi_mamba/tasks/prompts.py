"""Pairs of prompts as text: read from a file, cut into tokens, searched for positions that have a meaning."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ioi_mamba.errors import InputError

MAX_LINE_BYTES, MAX_LINES = 100_000, 100_000  # packed, a small file can hold more than memory does
TEXT_KEYS = ("uncorrupted", "corrupted", "answer_uncorrupted", "answer_corrupted", "corruption")
NAME_LIST_KEYS = ("incorrect_for_uncorrupted", "incorrect_for_corrupted")

PLACE = re.compile(r"\bthe (\w+)[.,]")
OBJECT = re.compile(r"\ban? (\w+) to$")


@dataclass(frozen=True)
class PromptPair:
    """One pair as text. `names`: every name of the two prompts once, sorted; `source`: where it is from."""

    clean: str
    corrupted: str
    answer: str
    wrong: str
    names: tuple[str, ...]
    corruption: str
    source: str
    template: str | None = None

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


def bos_id(tokenizer: Any) -> int:
    """The token to put before every prompt: the tokenizer's BOS, or where it has none its EOS."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise InputError("This tokenizer has neither a BOS nor an EOS token; set tokenizer.bos_token to start prompts.")


def single_token_ids(tokenizer: Any, names: Iterable[str]) -> dict[str, int]:
    """The id of " " + name for each name that is one known token with its leading space, and no others."""
    names = list(names)
    ids = {}
    for name, tokens in zip(names, _encode(tokenizer, [f" {name}" for name in names])["input_ids"], strict=True):
        if len(tokens) == 1 and tokens[0] != tokenizer.unk_token_id:
            ids[name] = int(tokens[0])
    return ids


def tokenize(pairs: Sequence[PromptPair], tokenizer: Any) -> list[TokenizedPair]:
    """Tokenise both prompts of each pair, BOS in front, and find the roles.

    Raises InputError, naming the pair's `source`, for a name that is not one token with its leading space, a
    word unknown to the tokenizer, or unequal lengths.
    """
    bos = bos_id(tokenizer)
    ids_of = single_token_ids(tokenizer, sorted({name for pair in pairs for name in pair.names}))
    encoding = _encode(tokenizer, [text for pair in pairs for text in (pair.clean, pair.corrupted)], offsets=True)
    rows = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
    tokenized = []
    for pair, (clean, clean_spans), (corrupted, corrupted_spans) in zip(pairs, rows, rows, strict=True):
        for name in pair.names:
            if name not in ids_of:
                raise InputError(f"{pair.source}: {f' {name}'!r} is not one token of this tokenizer; use another name.")
        for text, ids in ((pair.clean, clean), (pair.corrupted, corrupted)):
            if tokenizer.unk_token_id in (ids[1:] if ids[:1] == [bos] else ids):
                raise InputError(f"{pair.source}: a word of {text!r} is unknown to the tokenizer; use words it has.")
        if len(clean) != len(corrupted):
            raise InputError(
                f"{pair.source}: the prompts have {len(clean)} and {len(corrupted)} tokens; "
                "the two prompts of a pair must be equally long."
            )
        prefix = [] if clean[:1] == [bos] else [bos]
        roles = find_roles(pair.clean, pair.names, clean_spans, len(prefix))
        others = find_roles(pair.corrupted, pair.names, corrupted_spans, len(prefix))
        # An edit writes one prompt's value into the other at a role: it must be the same position in both.
        roles = {role: index for role, index in roles.items() if others.get(role) == index}
        tokenized.append(
            TokenizedPair(
                clean=prefix + clean,
                corrupted=prefix + corrupted,
                answer=ids_of[pair.answer],
                wrong=ids_of[pair.wrong],
                names=[ids_of[name] for name in pair.names],
                roles=roles,
            )
        )
    return tokenized


def find_roles(text: str, names: Sequence[str], spans: Sequence[tuple[int, int]], n_prefix: int = 1) -> dict[str, int]:
    """Token index of each semantic position of a prompt (`Pairs` lists them), BOS first and `out` last.

    spans: first and past-the-last character of each token of `text`, before which are `n_prefix` tokens.
    """
    starts = [start for start, _ in spans]

    def token_at(character: int) -> int:
        return bisect_right(starts, character) - 1 + n_prefix

    anchors = {f"n{k}": token_at(start) for k, start in enumerate(_mentions(text, names), 1)}
    for role, pattern in (("place", PLACE), ("object", OBJECT)):
        found = pattern.search(text)
        if found and found[1] not in names:
            anchors[role] = token_at(found.start(1))
    out = len(spans) + n_prefix - 1
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


def _mentions(text: str, names: Sequence[str]) -> list[int]:
    """Where in `text` a name begins, in order."""
    longest_first = sorted(names, key=len, reverse=True)
    return [found.start() for found in re.finditer(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b", text)]


def _encode(tokenizer: Any, texts: list[str], offsets: bool = False) -> Any:
    if not tokenizer.is_fast:
        raise InputError("This tokenizer does not report character offsets; open it with use_fast=True.")
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=offsets)


def _is_text(value: object) -> bool:
    # A lone surrogate is valid JSON and no Unicode text: no tokenizer takes it.
    return isinstance(value, str) and bool(value.strip()) and value.encode("utf-8", "replace").decode() == value


def _brief(error: BaseException) -> str:
    return str(error).splitlines()[0].split(": ", 1)[0][:80]
