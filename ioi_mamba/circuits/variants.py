"""The variants of attribution by gradients, one record each."""

from __future__ import annotations

from typing import Literal, NamedTuple

from ioi_mamba.circuits.relevance import DEFAULT_RULES, check_rules
from ioi_mamba.model.portable import portable
from ioi_mamba.registry import named

VariantName = Literal["paper", "detached", "clean-difference", "relp"]


@portable
class Variant(NamedTuple):
    """How a score is made of gradients and differences.

    Attributes:
        name: As on the command line.
        meaning: In words.
        detached: Gradients stop at the outputs that are patched in.
        from_clean: The difference is corrupted less clean output; otherwise less the output of the same pass.
        parts_on_path: The path moves along those parts that say so, too.
        rules: What the backward pass holds fixed (`relevance`). With any, there is one pass, at the clean point.
    """

    name: str
    meaning: str
    detached: bool = False
    from_clean: bool = False
    parts_on_path: bool = False
    rules: tuple[str, ...] = ()


PAPER = Variant(
    "paper", "gradients flow through the sum; differences to the output of the same pass", parts_on_path=True
)
DETACHED = Variant("detached", "as paper, but gradients stop at the outputs in the sum", detached=True)
CLEAN_DIFFERENCE = Variant(
    "clean-difference", "textbook integrated gradients: differences to the clean output", from_clean=True
)
RELP = Variant("relp", "relevance rules in place of gradients, at the clean point", rules=DEFAULT_RULES)
VARIANTS: dict[str, Variant] = {each.name: each for each in (PAPER, DETACHED, CLEAN_DIFFERENCE, RELP)}


def variant_of(variant: str | Variant) -> Variant:
    """The record of a variant. Raises InputError, with the nearest name, for one that is not there, and for unknown rules."""
    found = named("variant", variant, VARIANTS, Variant)
    check_rules(found.rules)
    return found
