"""Pairs of prompts: one the model should read as it is, one that differs in a word, and the answers to both.

Every analysis takes `Pairs` and nothing else about the task, so a new task is a new way to make `Pairs`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ioi_mamba.errors import InputError
from ioi_mamba.model.portable import portable
from ioi_mamba.tasks import prompts as text
from ioi_mamba.tasks.prompts import PromptPair
from ioi_mamba.tasks.readout import Readout

ABSENT = -1
"""In `candidates` no further choice, in `roles` no such position in this row."""


@portable
@dataclass(frozen=True, eq=False, repr=False)
class Pairs:
    """Prompts in pairs, as token ids. The n-th row of every field belongs to the n-th pair.

    clean, corrupted: Int64[pair, pos], BOS at position 0, padded on the right where lengths differ.
    answer, wrong: Int64[pair], the token that continues the clean and the corrupted prompt.
    candidates: Int64[pair, choice] or None, the tokens to choose among (of IOI: every name of the pair), each
        once, padded with -1; accuracy is among these.
    lengths: Int64[pair] or None, tokens with BOS; the two prompts of a pair are equally long. None: all full.
    labels: text of each pair, such as "template" and "corruption".
    roles: Int64[pair] for each semantic position, a token index, or -1 in a row that has no such position.
        Of IOI: `n1`, `n2`, ... are the names in order of mention, `place` and `object` the two other words that vary,
        `n3+1` is the token after `n3` and `n1-1` the one before `n1`, `BOS` is 0 and `out` the last token. A
        word of several tokens has its role on the first of them, so `n1+1` may be the rest of a long name.
    texts: (clean, corrupted) of each pair, or None.
    readout: how an answer of several tokens is read (`tasks.readout`), or None: one token at the last position.

    Raises InputError where shapes, dtypes or values do not fit each other.
    """

    clean: Tensor
    corrupted: Tensor
    answer: Tensor
    wrong: Tensor
    candidates: Tensor | None = None
    lengths: Tensor | None = None
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    roles: dict[str, Tensor] = field(default_factory=dict)
    texts: tuple[tuple[str, str], ...] | None = None
    readout: Readout | None = None

    def __post_init__(self) -> None:
        for name, tensor in self._tensors():
            if not isinstance(tensor, Tensor):
                raise InputError(
                    f"{name} is a {type(tensor).__name__}, no tensor; Pairs.from_tokens takes lists and arrays."
                )
            if tensor.dtype != torch.int64:
                raise InputError(f"{name} has dtype {tensor.dtype}; give int64 token ids or indices.")
        if self.clean.ndim != 2 or 0 in self.clean.shape:
            raise InputError(f"clean has shape {_shape(self.clean)}; give [pair, pos] with at least one of each.")
        if self.corrupted.shape != self.clean.shape:
            raise InputError(
                f"corrupted has shape {_shape(self.corrupted)} and clean {_shape(self.clean)}; "
                "the two prompts of a pair must be equally long."
            )
        n_pairs, n_pos = self.clean.shape
        one_per_pair = {"answer": self.answer, "wrong": self.wrong}
        one_per_pair |= {f"role {name!r}": value for name, value in self.roles.items()}
        if self.lengths is not None:
            one_per_pair["lengths"] = self.lengths
        for name, tensor in one_per_pair.items():
            if tensor.shape != (n_pairs,):
                raise InputError(f"{name} has shape {_shape(tensor)}; give one value per pair, ({n_pairs},).")
        if self.candidates is not None:
            if self.candidates.ndim != 2 or len(self.candidates) != n_pairs:
                raise InputError(f"candidates has shape {_shape(self.candidates)}; give [pair, choice].")
            for name in ("answer", "wrong"):
                if not (self.candidates == getattr(self, name)[:, None]).any(1).all():
                    raise InputError(f"A row of candidates lacks its {name}; give the ids of all names of the pair.")
        bounds = [("lengths", self.lengths, 1, n_pos), ("candidates", self.candidates, ABSENT, None)]
        bounds += [(f"role {name!r}", value, ABSENT, n_pos - 1) for name, value in self.roles.items()]
        bounds += [(name, getattr(self, name), 0, None) for name in ("clean", "corrupted", "answer", "wrong")]
        for name, tensor, low, high in bounds:
            if tensor is not None and (tensor.min() < low or (high is not None and tensor.max() > high)):
                upper = "" if high is None else f" and at most {high}"
                raise InputError(f"{name} has values out of range; they must be at least {low}{upper}.")
        if self.readout is not None:
            n_choices = self.readout.tokens.shape[1]
            if len(self.readout.at) != n_pairs or bool((self.readout.at > self.last[:, None]).any()):
                raise InputError(f"The readout must have positions within the prompt for each of the {n_pairs} pairs.")
            for name in ("answer", "wrong"):
                if int(getattr(self, name).max()) >= n_choices:
                    raise InputError(f"{name} must be numbers of the readout's choices, 0 to {n_choices - 1}.")
        texts_of = {f"label {name!r}": column for name, column in self.labels.items()}
        for name, column in (texts_of | ({} if self.texts is None else {"texts": self.texts})).items():
            if len(column) != n_pairs:
                raise InputError(f"{name} has {len(column)} entries; give one per pair, {n_pairs}.")

    @classmethod
    def from_tokens(
        cls,
        clean: Any,
        corrupted: Any,
        answer: Any,
        wrong: Any,
        *,
        candidates: Any = None,
        lengths: Any = None,
        labels: Mapping[str, Sequence[str]] | None = None,
        roles: Mapping[str, Any] | None = None,
        readout: Readout | None = None,
    ) -> Pairs:
        """Pairs from token ids: tensors or arrays of any integer type, or (nested) lists, shaped as the fields of `Pairs`.

        Lists of unequal length need `lengths` and are padded on the right, which a causal model does not see
        at `last`. Raises InputError for values that are no integers, or rows that do not fit.
        """
        for what, columns in (("labels", labels), ("roles", roles)):
            if columns is not None and not isinstance(columns, Mapping):
                raise InputError(f"{what} is a {type(columns).__name__}; give a dict with a column for each name.")
        for name, column in (labels or {}).items():
            if isinstance(column, str):
                raise InputError(f"label {name!r} is one text; give a list with one for each pair.")
        clean, corrupted, candidates = map(_rows, (clean, corrupted, candidates))
        if lengths is not None:
            lengths = _integers("lengths", lengths).reshape(-1)
        if _is_ragged(candidates):
            candidates = _filled(candidates, ABSENT)
        return cls(
            clean=_token_rows("clean", clean, lengths),
            corrupted=_token_rows("corrupted", corrupted, lengths),
            answer=_integers("answer", answer),
            wrong=_integers("wrong", wrong),
            candidates=None if candidates is None else _integers("candidates", candidates),
            lengths=lengths,
            labels={name: tuple(column) for name, column in (labels or {}).items()},
            roles={name: _integers(f"role {name!r}", value) for name, value in (roles or {}).items()},
            readout=readout,
        )

    @classmethod
    def from_texts(
        cls,
        clean: str | Sequence[str],
        corrupted: str | Sequence[str],
        answer: str | Sequence[str],
        wrong: str | Sequence[str],
        tokenizer: Any,
        *,
        candidates: Sequence[Sequence[str]] | None = None,
        labels: Mapping[str, Sequence[str]] | None = None,
    ) -> Pairs:
        """Pairs from texts, with BOS in front; roles are the names among the answers and candidates, as `ioi` has them.

        Args:
            clean: The prompt of each pair; one text is one pair.
            corrupted: The other prompt of each pair, as many tokens long.
            answer: What continues each clean prompt: one token, written with or without its leading space.
            wrong: What continues each corrupted prompt.
            tokenizer: Any fast Hugging Face tokenizer.
            candidates: Of each pair, all answers to choose among; default the two.
            labels: A text of each pair by name, such as "corruption".

        Raises:
            InputError: For lists of unequal length, and, naming the pair, for answers that are not one token and prompts
                of unequal length.
        """
        columns = {"clean": clean, "corrupted": corrupted, "answer": answer, "wrong": wrong}
        listed = {name: text.texts_of(name, column) for name, column in columns.items()}
        n = len(listed["clean"])
        for name, column in listed.items():
            if len(column) != n:
                raise InputError(f"{name} has {len(column)} texts and clean {n}; give one for each pair.")
        if candidates is not None and len(candidates) != n:
            raise InputError(f"candidates has {len(candidates)} rows and clean {n}; give one for each pair.")
        labels = dict(labels or {})
        for name, column in labels.items():
            if isinstance(column, str) or len(column) != n:
                raise InputError(f"label {name!r} must be a list with a text for each of the {n} pairs.")
        prompts = []
        for row, (one, other, right, not_right) in enumerate(zip(*listed.values(), strict=True)):
            names = {
                right.strip(),
                not_right.strip(),
                *(each.strip() for each in (candidates[row] if candidates else ())),
            }
            prompts.append(
                PromptPair(
                    clean=one,
                    corrupted=other,
                    answer=right.strip(),
                    wrong=not_right.strip(),
                    names=tuple(sorted(names)),
                    corruption=str(labels["corruption"][row]) if "corruption" in labels else "given",
                    source=f"pair {row}",
                    template=str(labels["template"][row]) if "template" in labels else None,
                )
            )
        pairs = cls.from_prompts(prompts, tokenizer)
        own = {name: tuple(map(str, column)) for name, column in labels.items()}
        return replace(pairs, labels=pairs.labels | own)

    @classmethod
    def from_jsonl(cls, path: str | Path, tokenizer: Any) -> Pairs:
        """Pairs from a file with one JSON object a line (`.gz` is unpacked), tokenised with BOS in front.

        Keys: clean, corrupted, answer, wrong, and if wanted candidates (a list) and corruption; or, as the paper's files
        have them, uncorrupted, corrupted, answer_uncorrupted, answer_corrupted, incorrect_for_uncorrupted,
        incorrect_for_corrupted, corruption. `template` (text) is optional, other keys are not read. Rows are
        those of the file: `.symmetric()` adds the swapped copies. Roles are read from the text, as
        `ioi.generate` does. Raises InputError with the file and the line.
        """
        return cls.from_prompts(text.read_jsonl(Path(path)), tokenizer)

    @classmethod
    def from_prompts(cls, prompts: Sequence[PromptPair], tokenizer: Any) -> Pairs:
        """Pairs from text: BOS in front, roles found, every name one token with its leading space.

        Raises InputError, naming the pair's `source`, where a name is not one token, a word is unknown to the
        tokenizer, or the two prompts of a pair differ in length.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, PromptPair) for prompt in prompts):
            raise InputError("prompts are no PromptPairs: give a list of these, or a file of them to Pairs.from_jsonl.")
        if not prompts:
            raise InputError("There are no prompts; give at least one pair.")
        rows = text.tokenize(prompts, tokenizer)
        lengths = [len(row.clean) for row in rows]
        return cls(
            clean=torch.tensor(_filled([row.clean for row in rows])),
            corrupted=torch.tensor(_filled([row.corrupted for row in rows])),
            answer=torch.tensor([row.answer for row in rows]),
            wrong=torch.tensor([row.wrong for row in rows]),
            candidates=torch.tensor(_filled([row.names for row in rows], ABSENT)),
            lengths=None if len(set(lengths)) == 1 else torch.tensor(lengths),
            labels={
                "template": tuple(prompt.template_label for prompt in prompts),
                "corruption": tuple(prompt.corruption for prompt in prompts),
            },
            roles=_by_position(
                {
                    role: torch.tensor([row.roles.get(role, ABSENT) for row in rows])
                    for role in dict.fromkeys(role for row in rows for role in row.roles)
                }
            ),
            texts=tuple((prompt.clean, prompt.corrupted) for prompt in prompts),
        )

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, rows: Any) -> Pairs:
        """The pairs selected by a slice, mask, index tensor, list or integer, padded as they are here."""
        index = torch.arange(len(self))[rows].reshape(-1)
        if len(index) == 0:
            raise InputError(f"No pair of the {len(self)} is selected; select at least one.")
        order = index.tolist()

        def take(tensor: Tensor) -> Tensor:
            return tensor[index.to(tensor.device)]

        return Pairs(
            clean=take(self.clean),
            corrupted=take(self.corrupted),
            answer=take(self.answer),
            wrong=take(self.wrong),
            candidates=None if self.candidates is None else take(self.candidates),
            lengths=None if self.lengths is None else take(self.lengths),
            labels={name: tuple(column[i] for i in order) for name, column in self.labels.items()},
            roles={role: take(indices) for role, indices in self.roles.items()},
            texts=None if self.texts is None else tuple(self.texts[i] for i in order),
            readout=None if self.readout is None else self.readout.of(index),
        )

    def __repr__(self) -> str:
        """How many, how long, of what kinds, and the first pair."""
        n, width = self.clean.shape
        lengths = sorted({int(last) + 1 for last in self.last})
        tokens = f"{width} tokens" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]} tokens"
        kinds = [f"  {name}: {', '.join(map(str, list(dict.fromkeys(c))[:5]))}" for name, c in self.labels.items()]
        first = self.texts[0] if self.texts else tuple(str(ids[0].tolist()) for ids in (self.clean, self.corrupted))
        lines = [f"<{n} pair{'' if n == 1 else 's'} of {tokens}", *kinds, f"  clean:     {first[0]}"]
        return "\n".join([*lines, f"  corrupted: {first[1]}"]) + ">"

    def _repr_html_(self) -> str:
        """The first prompts, with the words that differ marked."""
        rows = []
        for row in range(min(5, len(self))):
            sides = (
                self.texts[row]
                if self.texts
                else [" ".join(map(str, t[row].tolist())) for t in (self.clean, self.corrupted)]
            )
            rows.append("".join(f"<td>{side}</td>" for side in text.marked(*sides)))
        more = f"<p>The first {len(rows)} of {len(self)} pairs.</p>" if len(rows) < len(self) else ""
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return f"<table><thead><tr><th>clean</th><th>corrupted</th></tr></thead><tbody>{body}</tbody></table>{more}"

    def without_text(self) -> Pairs:
        """The same token ids without labels and texts: all that a computation needs, and less to send."""
        return replace(self, labels={}, texts=None)

    @property
    def read_at(self) -> Tensor:
        """Int64[pair, k], the positions where the answer is read: the last one, unless a readout says otherwise."""
        return self.last[:, None] if self.readout is None else self.readout.at

    def scores(self, logits: Tensor) -> Tensor:
        """What each choice scores, Float[..., pair, choice], of logits Float[..., pair, k, vocab] at `read_at`.

        Without a readout a choice is a token of the vocabulary and its score its logit.
        """
        return logits[..., 0, :] if self.readout is None else self.readout.scores(logits)

    @property
    def answer_tokens(self) -> Tensor:
        """Int64[pair, k, 2], the tokens at `read_at` whose logits, summed over k, are the scores of answer and wrong."""
        pair = torch.stack([self.answer, self.wrong], -1)
        if self.readout is None:
            return pair[:, None]
        tokens = self.readout.tokens
        return tokens.gather(1, pair.to(tokens.device)[..., None].expand(-1, -1, tokens.shape[2])).transpose(1, 2)

    @property
    def last(self) -> Tensor:
        """Int64[pair], index of the last token, where the answer is read."""
        if self.lengths is None:
            return torch.full_like(self.answer, self.clean.shape[1] - 1)
        return self.lengths - 1

    @property
    def first_difference(self) -> Tensor:
        """Int64[pair], the first position at which the two prompts differ; `last` where they do not."""
        positions = torch.arange(self.clean.shape[1], device=self.clean.device)
        differs = (self.clean != self.corrupted) & (positions <= self.last[:, None])
        return torch.where(differs.any(1), differs.int().argmax(1), self.last)

    @property
    def clusters(self) -> Tensor:
        """Int64[pair], a number from 0 for each set of pairs that are not independent draws.

        Pairs that have a prompt in common, clean or corrupted on either side, are in one cluster, and so are pairs
        that other pairs connect: the two directions of a symmetric pair, or repeated rows. Told by the token ids.
        """
        n_pairs, width = self.clean.shape
        within = torch.arange(width) < self.last.cpu()[:, None] + 1
        sides = torch.cat([torch.where(within, side.cpu(), ABSENT) for side in (self.clean, self.corrupted)])
        prompt = sides.unique(dim=0, return_inverse=True)[1]
        first = torch.full((2 * n_pairs,), n_pairs)
        cluster = torch.arange(n_pairs)
        while True:
            # Every prompt takes the lowest cluster of its pairs, and every pair the lower one of its two prompts.
            first.scatter_reduce_(0, prompt, cluster.repeat(2), "amin")
            lowest = first[prompt].view(2, n_pairs).amin(0)
            if torch.equal(lowest, cluster):
                return cluster.unique(return_inverse=True)[1]
            cluster = lowest

    def symmetric(self) -> Pairs:
        """These pairs, then the same pairs with the roles of clean and corrupted exchanged: twice as many."""
        swapped = replace(
            self,
            clean=self.corrupted,
            corrupted=self.clean,
            answer=self.wrong,
            wrong=self.answer,
            texts=None if self.texts is None else tuple((corrupted, clean) for clean, corrupted in self.texts),
        )
        return Pairs.concat([self, swapped])

    def by(self, label: str) -> dict[str, Pairs]:
        """The pairs that share a value of a label, for each value in the order of first appearance."""
        if label not in self.labels:
            raise InputError(f"These pairs have no label {label!r}; they have {', '.join(self.labels) or 'none'}.")
        column = self.labels[label]
        return {value: self[[i for i, own in enumerate(column) if own == value]] for value in dict.fromkeys(column)}

    def layouts(self) -> list[Pairs]:
        """The pairs in groups of equal length and equal roles, without padding, in first-seen order."""
        return [self[rows]._trimmed(int(self.last[rows[0]]) + 1) for rows in self.layout_rows()]

    def layout_rows(self) -> list[list[int]]:
        """The rows of each of `layouts`, in the same order."""
        keys = torch.stack([self.last, *self.roles.values()], 1).tolist()
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, key in enumerate(keys):
            groups.setdefault(tuple(key), []).append(row)
        return list(groups.values())

    def position_labels(self) -> list[str]:
        """A label for each position: the role every row has there, else "BOS" for 0, else the index."""
        labels = ["BOS", *map(str, range(1, self.clean.shape[1]))]
        for role, indices in reversed(self.roles.items()):
            if bool((indices == indices[0]).all()) and indices[0] != ABSENT:
                labels[int(indices[0])] = role
        return labels

    def check_vocab(self, vocab_size: int) -> None:
        """Raise InputError unless every token, answer and candidate is below `vocab_size`."""
        # With a readout, answers are numbers of its choices.
        answers = ("answer", "wrong", "candidates") if self.readout is None else ("readout tokens",)
        tensors = dict(self._tensors())
        for name in ("clean", "corrupted", *answers):
            tensor = tensors.get(name)
            if tensor is not None and tensor.max() >= vocab_size:
                raise InputError(
                    f"{name} holds token {int(tensor.max())}, and the model's vocabulary has {vocab_size}; "
                    "make the pairs with the model's own tokenizer."
                )

    @property
    def choices(self) -> Tensor:
        """What accuracy is counted among, Int64[pair, choice]: the candidates, or (answer, wrong) where there are none."""
        return torch.stack([self.answer, self.wrong], 1) if self.candidates is None else self.candidates

    def check_finite(self, what: str, values: Tensor, first: int = 0) -> None:
        """Raise InputError, naming the pair and its prompt, unless all values [..., pair] of `what` are finite.

        first: the number of the first of these pairs among those that the user gave.
        """
        bad = ~torch.isfinite(values).reshape(-1, len(self)).all(0)
        if bad.any():
            row = int(bad.nonzero()[0])
            prompt = self.clean[row].tolist() if self.texts is None else self.texts[row][0]
            raise InputError(
                f"Pair {first + row} gives {what} that are not finite ({str(prompt)[:200]}); look at its prompts and "
                "at the dtype, or leave it out."
            )

    def hash(self) -> str:
        """SHA-256, in hex, of all tensors with their names and shapes; the same on any device."""
        digest = hashlib.sha256()
        for name, tensor in self._tensors():
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.cpu().contiguous().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    @staticmethod
    def concat(parts: Sequence[Pairs]) -> Pairs:
        """All pairs of all parts, in order, padded to the longest; a label stays where every part has it."""
        if not parts:
            raise InputError("There are no pairs to put together; give at least one part.")
        candidates = [part.candidates for part in parts if part.candidates is not None]
        if len(candidates) not in (0, len(parts)):
            raise InputError("Some parts have candidates and some have none; give them to all or to none.")
        width = max(part.clean.shape[1] for part in parts)
        choices = max((each.shape[1] for each in candidates), default=0)
        ragged = any(part.lengths is not None or part.clean.shape[1] != width for part in parts)
        names = [name for name in parts[0].labels if all(name in part.labels for part in parts)]
        roles = dict.fromkeys(role for part in parts for role in part.roles)
        texts = [row for part in parts for row in part.texts or ()]
        return Pairs(
            clean=torch.cat([_widen(part.clean, width, part.clean[:, :1]) for part in parts]),
            corrupted=torch.cat([_widen(part.corrupted, width, part.corrupted[:, :1]) for part in parts]),
            answer=torch.cat([part.answer for part in parts]),
            wrong=torch.cat([part.wrong for part in parts]),
            candidates=torch.cat([_widen(each, choices, ABSENT) for each in candidates]) if candidates else None,
            lengths=torch.cat([part.last + 1 for part in parts]) if ragged else None,
            labels={name: tuple(row for part in parts for row in part.labels[name]) for name in names},
            roles=_by_position(
                {
                    role: torch.cat([part.roles.get(role, torch.full_like(part.answer, ABSENT)) for part in parts])
                    for role in roles
                }
            ),
            texts=tuple(texts) if all(part.texts is not None for part in parts) else None,
            readout=_one_readout(parts),
        )

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in ("clean", "corrupted", "answer", "wrong", "candidates", "lengths"):
            if getattr(self, name) is not None:
                yield name, getattr(self, name)
        for role in sorted(self.roles):
            yield f"role {role!r}", self.roles[role]
        if self.readout is not None:
            yield "readout at", self.readout.at
            yield "readout tokens", self.readout.tokens

    def _trimmed(self, width: int) -> Pairs:
        """These pairs, all `width` tokens long, without the padding and without the roles no row has."""
        return replace(
            self,
            clean=self.clean[:, :width],
            corrupted=self.corrupted[:, :width],
            lengths=None,
            roles={role: indices for role, indices in self.roles.items() if indices[0] != ABSENT},
        )


def _one_readout(parts: Sequence[Pairs]) -> Readout | None:
    """That of pairs put together; their positions stay, since padding is on the right."""
    found = [part.readout for part in parts if part.readout is not None]
    if len(found) not in (0, len(parts)):
        raise InputError("Some parts have a readout and some have none; give it to all or to none.")
    return Readout.concat(found) if found else None


def check_pairs(pairs: Any) -> Pairs:
    """`pairs` if they are `Pairs`; InputError for anything else, such as tokens."""
    if not isinstance(pairs, Pairs):
        raise InputError(
            f"A {type(pairs).__name__} is no Pairs: make them with im.Pairs.from_texts, im.Pairs.from_tokens, im.Pairs.from_jsonl or a task, "
            "such as im.ioi.generate."
        )
    return pairs


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _integers(name: str, value: Any) -> Tensor:
    what = _other_kind(value)
    if what:
        raise InputError(
            f"{name} cannot be read as whole numbers: it is {what}; give token ids, as in tokenizer(texts)['input_ids']."
        )
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{name} cannot be read as whole numbers of 64 bits; give token ids or indices.") from error
    if tensor.numel() == 0:
        raise InputError(f"{name} is empty; give at least one pair.")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise InputError(f"{name} has dtype {tensor.dtype}; give whole numbers: token ids or indices.")
    return tensor.long()


def _other_kind(value: Any) -> str:
    """In words, what stands where token ids should; empty for what may be ids."""
    first = value
    while isinstance(first, (list, tuple)) and first:
        first = first[0]
    if isinstance(first, (str, bytes)):
        return "text"
    if isinstance(first, Mapping):
        return "a dict or an encoding"
    if hasattr(first, "ids") or hasattr(first, "input_ids"):
        return "an encoding"
    rows = value if isinstance(value, (list, tuple)) else ()
    return "True or False" if any(isinstance(v, bool) for row in rows for v in _listed(row)) else ""


def _listed(row: Any) -> Sequence[Any]:
    return row if isinstance(row, (list, tuple)) else (row,)


def _rows(value: Any) -> Any:
    """A list of tensors or arrays as a list of lists; anything else as it is."""
    if not isinstance(value, (list, tuple)):
        return value
    return [row.tolist() if hasattr(row, "tolist") and hasattr(row, "shape") else row for row in value]


def _is_ragged(rows: Any) -> bool:
    nested = isinstance(rows, Sequence) and all(isinstance(row, (list, tuple)) for row in rows)
    return nested and len({len(row) for row in rows}) > 1


def _token_rows(name: str, rows: Any, lengths: Tensor | None) -> Tensor:
    if not _is_ragged(rows):
        return _integers(name, rows)
    if lengths is None:
        raise InputError(f"The rows of {name} are not equally long; give lengths= to have them padded.")
    for number, (row, length) in enumerate(zip(rows, lengths.tolist(), strict=False)):
        if length > len(row) or not row:
            raise InputError(f"Row {number} of {name} has {len(row)} tokens and a length of {length}; make them agree.")
    return _integers(name, _filled(rows))


def _filled(rows: Sequence[Sequence[int]], value: int | None = None) -> list[list[int]]:
    """Rows of equal length, filled up on the right with `value`, or each with its first token, the BOS."""
    width = max(map(len, rows))
    return [[*row, *[row[0] if value is None else value] * (width - len(row))] for row in rows]


def _widen(tensor: Tensor, width: int, value: Tensor | int) -> Tensor:
    filled = torch.as_tensor(value, device=tensor.device).expand(len(tensor), width - tensor.shape[1])
    return torch.cat([tensor, filled], 1)


def _by_position(roles: dict[str, Tensor]) -> dict[str, Tensor]:
    """Roles in the order in which they stand in the longest prompt, which is the order to show them in."""
    return dict(sorted(roles.items(), key=lambda item: int(item[1].max())))
