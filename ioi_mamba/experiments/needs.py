"""What experiments need, and what cannot be done with models of a family: one table that docs, `doctor` and pages print."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from enum import StrEnum
from typing import Any, NamedTuple

from ioi_mamba.model.families import family_of
from ioi_mamba.model.family import ATTENTION_WRITER, MAMBA_WRITER, Block, Family
from ioi_mamba.model.jobs import config_of


class Need(StrEnum):
    """What an experiment cannot do without."""

    SITES = "sites"
    """A model whose layers have sites inside, one of a supported family; without it any causal language model serves."""
    NAMES = "names"
    """Prompts with names (roles n1, n2, ...)."""
    ABLE = "able"
    """A model that can do the task: of one that guesses, the figures mean nothing."""
    ONE_TOKEN = "one-token"
    """Answers of one token, read at the last position."""
    HELD_OUT = "held-out"
    """Other pairs, on which what was chosen is judged."""
    GRADIENTS = "gradients"
    """A backward pass, unless it has an option `method` and that is "exact"."""
    NO_ATTENTION = "no-attention"
    """A model whose tokens see each other by convolution and state alone."""
    LAYER = "layer"
    """One layer, its option `layer`: where the user names none, the one that this run's layer-ablation finds."""


class Limit(NamedTuple):
    """Something that cannot be done where some block is of a kind.

    Attributes:
        what: What cannot be done.
        why: The reason, in a clause.
        applies: Whether it holds of a block.
        need: What experiments have it as a need and so cannot be run; None: none has.
    """

    what: str
    why: str
    applies: Callable[[Block], bool]
    need: Need | None = None


def _attends(block: Block) -> bool:
    return block.attends


def _has_attention_node(block: Block) -> bool:
    return ATTENTION_WRITER in block.all_writers()


def _has_plain_node(block: Block) -> bool:
    return any(writer != MAMBA_WRITER for writer in block.all_writers())


LIMITS = (
    Limit(
        "cross-talk",
        "it gives layers back one by one as the ways by which tokens see each other, and attention is another",
        _attends,
        Need.NO_ATTENTION,
    ),
    Limit(
        "passes that begin at a later position",
        "attention's past is no state of constant size, so a pass begins at a layer and runs all positions",
        _attends,
    ),
    Limit(
        "edits of attention's own heads, queries and keys",
        "attention is one node; libraries for transformers take it apart",
        _has_attention_node,
    ),
    Limit(
        "parts of attention and of MLPs",
        "only mixers have parts: conv slices, state and gate",
        _has_plain_node,
    ),
)


def limits_of(family: Family, blocks: Iterable[Block] | None = None) -> list[tuple[str, str]]:
    """(what, why) of all that cannot be done with models of a family; blocks: those of one model, None: all kinds."""
    found = list(family.kinds.values() if blocks is None else blocks)
    general = [(limit.what, limit.why) for limit in LIMITS if any(map(limit.applies, found))]
    return [*general, *family.limits]


def limits_of_model(model: Any) -> list[tuple[str, str]]:
    """(what, why) of all that cannot be done with a model."""
    return limits_of(family_of(model), _blocks(model))


def unavailable(name: str, needs: Set[Need], model: Any) -> str | None:
    """Why an experiment of these needs cannot be done on a model, in a sentence; None where it can be."""
    for limit in LIMITS:
        if limit.need in needs and any(map(limit.applies, _blocks(model))):
            return f"{name} cannot be done on this {family_of(model).label}: {limit.why}."
    return None


def _blocks(model: Any) -> list[Block]:
    family, config = family_of(model), config_of(model)
    return [family.kinds[kind] for kind in dict.fromkeys(family.blocks(config))]
