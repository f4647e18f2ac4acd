"""Prompts in whatever form they come, as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ioi_mamba.errors import InputError
from ioi_mamba.model.jobs import config_of

HOW = "give whole numbers of shape [batch, pos], a text, texts, what the tokenizer makes of them, or Pairs"


def bos_id(tokenizer: Any) -> int:
    """The token to put before every prompt: the tokenizer's BOS, or where it has none its EOS."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise InputError("This tokenizer has neither a BOS nor an EOS token; set tokenizer.bos_token to start prompts.")


def prompts_of(model, prompts: Any) -> Any:
    """What a user gives as prompts, as something `check_tokens` takes.

    A text, or texts that are equally long in tokens, get BOS in front, as every prompt of this package. A tokenizer's
    encoding is taken as it is. Of `Pairs` these are the clean prompts. Raises InputError for prompts of unequal length
    and for an encoding with padding: rows are run without a mask.
    """
    if hasattr(prompts, "clean"):  # `Pairs`, which are made of what is here
        if prompts.lengths is not None:
            raise InputError("These pairs have prompts of unequal length: take one of pairs.layouts().")
        return prompts.clean
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, Sequence) and prompts and all(isinstance(text, str) for text in prompts):
        bos = bos_id(model.tokenizer)
        rows = model.tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
        return _equally_long([row if row[:1] == [bos] else [bos, *row] for row in rows])
    if isinstance(prompts, Mapping) or hasattr(prompts, "input_ids"):
        encoding: Any = prompts
        mask = torch.as_tensor(_rows(encoding["attention_mask"])) if "attention_mask" in encoding else None
        if mask is not None and not bool(mask.bool().all()):
            raise InputError("The encoding has padding, and rows are run without a mask: encode prompts of one length.")
        return _rows(encoding["input_ids"]) if "input_ids" in encoding else encoding
    return _rows(prompts) if isinstance(prompts, Sequence) else prompts


def _rows(ids: Any) -> Any:
    """Token ids of one prompt, or of several, as rows."""
    if isinstance(ids, Tensor):
        return ids[None] if ids.ndim == 1 else ids
    if not isinstance(ids, Sequence) or isinstance(ids, str):
        return ids
    rows = list(ids)
    if rows and all(isinstance(row, Sequence) and not isinstance(row, str) for row in rows):
        return _equally_long(rows)
    return [rows]


def _equally_long(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise InputError(
            f"The prompts have {', '.join(map(str, lengths))} tokens, and rows are run without a mask: give prompts "
            "of one length at a time."
        )
    return [list(row) for row in rows]


def check_tokens(model, tokens: Any) -> Tensor:
    """`tokens` as Long[batch, pos], where they are. Raises InputError if they do not fit the vocabulary."""
    try:
        tokens = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise InputError(f"{type(tokens).__name__} cannot be read as prompts: {HOW}.") from None
    vocab = config_of(model).vocab_size
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise InputError(
            f"tokens must be whole numbers of shape [batch, pos], not {tokens.dtype} of shape {tuple(tokens.shape)}."
        )
    if 0 in tokens.shape:
        raise InputError(f"tokens of shape {tuple(tokens.shape)} hold no prompt: {HOW}.")
    # Unsigned and narrow integers lack operations, and an embedding takes no others.
    tokens = tokens.to(torch.int64)
    if not (int(tokens.min()) >= 0 and int(tokens.max()) < vocab):
        raise InputError(
            f"tokens must be 0 to {vocab - 1} for this vocabulary; found {int(tokens.min())} to {int(tokens.max())}."
        )
    return tokens
