"""Indirect object identification with three names, drawn exactly as the paper drew it (appendix A), or two.

"When Ana, Ivan and Leah arrived at the office, Ana and Ivan gave a bone to": the answer is the name that is
mentioned once. A corruption changes one name so that the answer changes. It is written with letters, one a
name: in "ABC AB C -> ABC AC B" the clean prompt names A, B and C, then A and B, and its answer is C; the
corrupted prompt has C as its fifth name and the answer B. Two seeds give the prompts of the published runs:
27 the training sets, 28 the held-out ones.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ioi_mamba.errors import InputError
from ioi_mamba.tasks.base import Pairs
from ioi_mamba.tasks.prompts import PromptPair, check_drawn, single_token_ids
from ioi_mamba.tasks.task import Task

NAME, PLACE, OBJECT = "[NAME]", "[PLACE]", "[OBJECT]"

TEMPLATES = (
    "Then, [NAME], [NAME] and [NAME] went to the [PLACE]. [NAME] and [NAME] gave a [OBJECT] to",
    "Afterwards [NAME], [NAME] and [NAME] went to the [PLACE]. [NAME] and [NAME] gave a [OBJECT] to",
    "When [NAME], [NAME] and [NAME] arrived at the [PLACE], [NAME] and [NAME] gave a [OBJECT] to",
    "Friends [NAME], [NAME] and [NAME] went to the [PLACE]. [NAME] and [NAME] gave a [OBJECT] to",
)
"""The four templates of appendix A: Then, Afterwards, When, Friends."""

ALIGNED_TEMPLATES = (TEMPLATES[0], TEMPLATES[1], TEMPLATES[3])
"""Those with the names at tokens 3, 5, 7, 13 and 15; the paper's positional figures use only these."""

CORRUPTIONS = (
    "CAB AB C -> DAB AB D",
    "ACB AB C -> ADB AB D",
    "ABC AB C -> ABD AB D",
    "ABC AB C -> ABC AC B",
    "ABC AC B -> ABC BC A",
)
"""The five of appendix A: the answer's name is replaced at each of its three places, or one giver is."""

TWO_NAME_TEMPLATES = (
    "Then, [NAME] and [NAME] went to the [PLACE]. [NAME] gave a [OBJECT] to",
    "Afterwards [NAME] and [NAME] went to the [PLACE]. [NAME] gave a [OBJECT] to",
    "When [NAME] and [NAME] arrived at the [PLACE], [NAME] gave a [OBJECT] to",
    "Friends [NAME] and [NAME] went to the [PLACE]. [NAME] gave a [OBJECT] to",
)
"""The same four with two names, of which one gives: the task in its usual form. Not in the paper."""

TWO_NAME_CORRUPTIONS = ("BA A B -> CA A C", "AB A B -> AC A C", "AB A B -> AB B A")
"""What the five become with two names: the answer's name is replaced at either place, or the giver is."""

PLACES = ("garden", "hospital", "house", "office", "restaurant", "school", "station", "store")
OBJECTS = ("apple", "basketball", "bone", "computer", "drink", "kiss", "necklace", "snack")

# Jordan and Riley stand in the paper's list twice, so they are drawn twice as often and, rarely, together.
NAMES = tuple(
    """
    Aaron Abraham Adam Adrian Alan Alexander Alexandria Allison Amanda Amber Amy Ana Andrea Andrew
    Angela Anna Anthony Antonio Ashley Austin Bailey Benjamin Blake Bradley Brady Brandon Brian Bryan
    Cameron Carlos Caroline Carson Carter Catherine Charles Charlotte Chase Chelsea Chloe Christian
    Christina Christopher Claire Cody Cole Colin Connor Cooper Dakota Dalton Daniel David Derek Devon
    Diana Donovan Dylan Edgar Edward Edwin Elizabeth Emily Emmanuel Eric Erik Erin Ethan Evan Faith
    Fernando Gabriel Garrett Gavin Genesis George Giovanni Grace Grant Gregory Hannah Henry Hunter Ian
    Isaac Isabel Isaiah Ivan Jackson Jacob Jake James Jared Jason Jeffrey Jennifer Jeremy Jesse Jessica
    Jesus Joel John Jonathan Jordan Jordan Jorge Joseph Joshua Juan Julian Justin Karen Kate Katherine
    Katie Kelly Kennedy Kenneth Kevin Kyle Laura Lauren Leah Leslie Liam Lilly Lily Lindsey Logan Lucas
    Lucy Luis Luke Madison Manuel Marco Marcus Margaret Maria Mario Mark Martin Mary Mason Matthew
    Maxwell Maya Megan Melissa Michael Michelle Miguel Miranda Molly Morgan Natalie Nathan Nicholas
    Nicolas Nicole Noah Nolan Oliver Olivia Omar Oscar Owen Parker Patrick Paul Peter Preston Rachel
    Raymond Reagan Rebecca Richard Riley Riley Robert Ryan Samuel Sarah Sean Sebastian Seth Shane Shawn
    Shelby Sierra Sophie Spencer Stephanie Stephen Steven Taylor Thomas Timothy Travis Trevor Tyler
    Victoria Vincent Wesley William Xavier
    """.split()  # noqa: SIM905
)
"""The paper's 205 entries (203 names): those of its list that are one token for GPT-NeoX."""


def usable_names(tokenizer: Any, names: Sequence[str] = NAMES) -> list[str]:
    """The names to draw from, sorted, as the paper chose them: one token, not the beginning of another."""
    single = single_token_ids(tokenizer, sorted(set(names)))
    kept = sorted(name for name in names if name in single)
    # In sorted order, whatever begins with a name comes right after it.
    beginnings = {name for name, following in pairwise(sorted(single)) if following.startswith(name)}
    return [name for name in kept if name not in beginnings]


def generate(
    tokenizer: Any,
    n_pairs: int,
    seed: int = 27,
    *,
    templates: Sequence[str] = TEMPLATES,
    corruptions: Sequence[str] = CORRUPTIONS,
    symmetric: bool = False,
) -> Pairs:
    """`n_pairs` pairs as the paper draws them, and after them, if `symmetric`, their swapped copies: twice as many rows.

    tokenizer: any Hugging Face tokenizer that reports character offsets. Names that are not one token are
        left out, which changes what a seed gives; GPT-NeoX and `mini` keep all.
    templates: texts with [NAME], [PLACE] and [OBJECT]; one [NAME] for each letter before the answer.
    corruptions: such as "ABC AB C -> ABC AC B".

        >>> from ioi_mamba import open_model
        >>> pairs = generate(open_model("mini", device="cpu").tokenizer, 1)
        >>> pairs.texts[0][0]
        'Friends Donovan, Isabel and Leah went to the office. Donovan and Isabel gave a necklace to'

    The global random state is neither read nor changed. Labels are "template" (its first words) and
    "corruption". Raises InputError for templates and corruptions that do not fit each other.
    """
    n_pairs, seed = check_drawn(n_pairs, seed)
    formats = {corruption: _letters(corruption) for corruption in _several("corruptions", corruptions)}
    templates = _several("templates", templates)
    for template in templates:
        for corruption, (clean, _) in formats.items():
            if template.count(NAME) != len(clean) - 1:
                raise InputError(
                    f"The template {template!r} has {template.count(NAME)} times {NAME} and the corruption "
                    f"{corruption!r} {len(clean) - 1} names; give templates and corruptions that agree."
                )
    names = usable_names(tokenizer)
    n_letters = max(len(set(clean + corrupted)) for clean, corrupted in formats.values())
    if len(names) < n_letters:
        raise InputError(f"This tokenizer has {len(names)} names as one token; use one that has at least {n_letters}.")
    rng = random.Random(seed)
    prompts = []
    for number in range(n_pairs):
        # The order of these five draws, and that the shuffles accumulate, is what makes the paper's prompts.
        template = rng.choice(templates)
        corruption = rng.choice(list(formats))
        rng.shuffle(names)
        clean, corrupted = formats[corruption]
        name_of = dict(zip(sorted(set(clean + corrupted)), names, strict=False))
        place, thing = rng.choice(PLACES), rng.choice(OBJECTS)
        prompts.append(
            PromptPair(
                clean=_fill(template, [name_of[letter] for letter in clean[:-1]], place, thing),
                corrupted=_fill(template, [name_of[letter] for letter in corrupted[:-1]], place, thing),
                answer=name_of[clean[-1]],
                wrong=name_of[corrupted[-1]],
                names=tuple(sorted(set(name_of.values()))),
                corruption=corruption,
                source=f"pair {number}",
            )
        )
    pairs = Pairs.from_prompts(prompts, tokenizer)
    return pairs.symmetric() if symmetric else pairs


def _several(name: str, values: Sequence[str]) -> tuple[str, ...]:
    if isinstance(values, str) or not values or not all(isinstance(value, str) for value in values):
        raise InputError(f"{name} is {values!r}; give a list of texts with at least one in it.")
    return tuple(values)


def _letters(corruption: str) -> tuple[str, str]:
    """The letters of the clean and of the corrupted prompt, the answer last: "ABCABC", "ABCACB"."""
    found = re.fullmatch(r"([A-Z]+ [A-Z]+ [A-Z]) -> ([A-Z]+ [A-Z]+ [A-Z])", corruption)
    clean, corrupted = (side.replace(" ", "") for side in found.groups()) if found else ("", "")
    if not found or len(clean) != len(corrupted):
        raise InputError(f'The corruption {corruption!r} cannot be read; write it as "{CORRUPTIONS[0]}".')
    return clean, corrupted


def _fill(template: str, names: Sequence[str], place: str, thing: str) -> str:
    text = template.replace(PLACE, place).replace(OBJECT, thing)
    for name in names:
        text = text.replace(NAME, name, 1)
    return text


TASK = Task(
    name="ioi",
    title="How the model works out who is given something",
    varies="a name",
    generate=generate,
    roles={
        "n1, n2, ...": "the names in order of mention",
        "place, object": "the two other words that vary",
        "out": "the last token, where the answer is read",
    },
)
