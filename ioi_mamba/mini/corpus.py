"""The text `mini` is trained on: short documents, about half of them indirect object identification.

A document is a string in which "*" stands before each answer, a word that the text before it determines:
"gave a bone to* John". The IOI half varies what the paper's four templates keep fixed: two, three or four
people, every order, one giver or all of them, two groups of which one gives, other verbs, places and objects,
sentences before and between, about the same people or strangers. The other half uses the same names for
something else: who owns what, who is where, lists said twice, gifts returned, people who leave. A model that
fits both has to find out who is missing, and not merely which name is rare.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Container

from transformers import PreTrainedTokenizerBase

from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import Pairs
from ioi_mamba.tasks.ioi import NAME, NAMES, OBJECT, OBJECTS, PLACE, PLACES, TEMPLATES, TWO_NAME_TEMPLATES

ANSWER = "*"

TRAIN_SEED, HELD_OUT_SEED = 27, 28
"""The seeds of the published data sets. No prompt of either is trained on."""

PEOPLE: tuple[str, ...] = tuple(sorted(set(NAMES)))
MORE_PLACES = ("library", "park", "market", "museum", "beach", "theater", "farm", "church", "bank")
MORE_OBJECTS = ("book", "ball", "letter", "gift", "flower", "hat", "phone", "pen", "map", "lamp", "cup")

SENTENCE_LEADS = (
    "", "", "Then, ", "Afterwards, ", "Friends ", "Later, ", "Yesterday ", "Today ", "One day ", "Last week ",
    "After lunch, ", "In the evening, ", "At noon, ", "Once ",
)  # fmt: skip
CLAUSE_LEADS = ("When ", "While ", "After ", "Before ", "As ", "Because ", "Once ")
MOVES = (
    "went to", "arrived at", "walked to", "drove to", "came to", "ran to", "met at", "were at", "worked at",
    "waited at", "returned to", "had lunch at", "had fun at", "talked at",
)  # fmt: skip
GIFTS = (
    "handed a {object} to", "passed a {object} to", "sent a {object} to", "lent a {object} to",
    "sold a {object} to", "brought a {object} to", "offered a {object} to", "showed a {object} to",
    "decided to give a {object} to", "wanted to give the {object} to", "said hello to", "talked to",
    "bought a {object} for", "made a {object} for", "took a {object} from", "borrowed the {object} from",
    "shared a {object} with", "waited for", "looked at",
)  # fmt: skip
RECIPIENTS = ("teacher", "children", "dog", "driver", "neighbor")

SCENES = (
    "It was a sunny day.", "It was late.", "The weather was cold.", "Music was playing.", "It rained.",
    "Nobody said a word.", "Everybody was happy.", "The {place} was very busy.", "The {object} was new.",
    "There was a {object} on the table.", "The {place} was closed in the morning.",
)  # fmt: skip
ASIDES = (
    "{names} stayed at home.", "{names} said hello.", "{names} lost a {object}.", "{names} found a {object}.",
    "{names} wanted the {object}.", "It was the day of {names}.", "The {place} belongs to {names}.",
    "Nobody had seen {names}.", "The {object} was for {names}.",
)  # fmt: skip
ENDINGS = (
    ".", ".", ".", " and left.", " again.", " because it was late.", ". They were happy.",
    ". It was a sunny day.", ". Then they went home.", ". Later, {answer} went home.",
    ". {answer} was happy.", ". {answer} said thanks to {giver}.", " and went to the {place}.",
)  # fmt: skip

# Names A to D, places p and q, objects o, u and v, and a recipient r; N is a name nobody has. Equal letters
# are equal words and different letters different ones.
OTHER_FRAMES = (
    "{A} has a {o} and {B} has a {u}. The {o} belongs to* {A}.",
    "{A} has a {o} and {B} has a {u}. The {u} belongs to* {B}.",
    "{A} has a {o} and {B} has a {u}. {A} gave the* {o} to* {B} and {B} gave the* {u} to* {A}.",
    "{A} has a {o}, {B} has a {u} and {C} has a {v}. The {v} belongs to* {C}, the {u} belongs to* {B}.",
    "{A} has a {o}, {B} has a {u} and {C} has a {v}. The {o} belongs to* {A} and the {v} belongs to* {C}.",
    "{A} has a {o}, {B} has a {u} and {C} has a {v}. The {u} belongs to* {B} and the {o} belongs to* {A}.",
    "{A} is at the {p} and {B} is at the {q}. Who is at the {p}? It is* {A}. Who is at the {q}? It is* {B}.",
    "{A} is at the {p} and {B} is at the {q}. Where is {B}? At the* {q}. Where is {A}? At the* {p}.",
    "{A} went to the {p}, {B} went to the {q}. {B} bought a {o} at the* {q}. {A} bought a {u} at the* {p}.",
    "{A} gave a {o} to {B}. Later, {B} gave the* {o} back to* {A}.",
    "{A} and {B} gave a {o} to {C}. {C} said thanks to* {A} and* {B}.",
    "Then, {A} and {B} gave a {o} to {C}. Later, {C} gave the* {o} back to* {A} and* {B}.",
    "When {A} gave a {o} to {B}, {C} gave a {u} to {D}. {B} has the* {o} and {D} has the* {u}.",
    "{A} gave a {o} to {B}, and {C} gave a {u} to {D}. The {o} now belongs to* {B} and the {u} to* {D}.",
    "{A} gave a {o} to {B} and {B} gave it to {C}. The {o} now belongs to* {C}.",
    "Friends {A}, {B} and {C} went to the {p}. Then, {A},* {B} and* {C} went home.",
    "Friends {A}, {B} and {C} went to the {p}. {A} and {B} left, but* {C} stayed at the* {p}.",
    "Afterwards {A}, {B} and {C} went to the {p}. {B} and {C} left, but* {A} stayed at the* {p}.",
    "Then, {A}, {B} and {C} went to the {p}. {A} and {C} left, but* {B} stayed at the* {p}.",
    "Then, {A}, {B} and {C} went to the {p}. {B} went to the {q}. Now {A} and* {C} are at the* {p}.",
    "When {A}, {B} and {C} arrived at the {p}, {A} left for the {q}. At the {p} were* {B} and* {C}.",
    "First came {A}, then {B} and then {C}. The last was* {C}, the first was* {A}.",
    "First came {A}, then {B} and then {C}. The first was* {A}, the last was* {C}.",
    "First came {A}, then {B}, then {C} and then {D}. After {A} came* {B}. After {C} came* {D}.",
    "First came {A}, then {B}, then {C} and then {D}. Before {D} came* {C}. Before {B} came* {A}.",
    "{A} went to the {p}. {A} bought a {o} and a {u}. {A} gave the {o} to the {r}. {A} kept the* {u}.",
    "{A} went to the {p} with {B}. {A} was happy, and {B} was happy too. Then {A} and* {B} went home.",
    "{A} said hello to {B}. {B} said hello to* {A}. {C} talked to {A}. {A} talked to* {C}.",
    "{A} likes {B}, but {B} likes {C}. {C} likes {D}. {B} likes* {C}, {A} likes* {B} and {C} likes* {D}.",
    "The {o} was at the {p} and the {u} at the {q}. {A} found the {u} at the* {q} and the {o} at the* {p}.",
    "{A} wanted the {o} and {B} wanted the {u}. {C} gave the {u} to* {B} and the {o} to* {A}.",
    "{A} wanted the {o} and {B} wanted the {u}. {C} gave the {o} to* {A} and the {u} to* {B}.",
    "{A} was tired. {A} went home. {B} and {C} were happy. {B} and* {C} stayed at the {p}.",
    "{N} met {A} at the {p}. {A} gave a {o} to {N}. {N} said thanks to* {A}.",
    "{N} is a new name. {A} said hello to {N}, and {N} said hello to* {A}. {B} never met {N}.",
)
OTHER_LEADS = ("", "Then, ", "Later, ", "Yesterday ", "Today ", "One day ", "It was late. ", "It rained. ")
SYLLABLES = ("ba", "de", "fi", "go", "ku", "la", "me", "ni", "po", "ru", "sa", "te", "vi", "zo")


def _split(template: str) -> tuple[str, str]:
    """The two clauses of a template, as format strings."""
    slots = template.replace(NAME, "{}").replace(PLACE, "{place}").replace(OBJECT, "{object}")
    opening, gift = re.fullmatch(r"(.*[.,]) (.*)", slots, re.DOTALL).groups()  # type: ignore[union-attr]
    return opening, gift


THREE_NAMES = tuple(map(_split, TEMPLATES))
TWO_NAMES = tuple(map(_split, TWO_NAME_TEMPLATES))

Story = tuple[str, str, list[str], list[str]]
"""Opening and gift, as text up to the answer, then the names of the givers and of the receivers."""


def _place(rng: random.Random) -> str:
    return rng.choice(PLACES if rng.random() < 0.6 else MORE_PLACES)


def _object(rng: random.Random) -> str:
    return rng.choice(OBJECTS if rng.random() < 0.6 else MORE_OBJECTS)


def _listed(names: list[str], joint: str = " and ") -> str:
    return joint.join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]


def _paper_ioi(rng: random.Random) -> Story:
    """Opening, gift, givers and receiver in the words of the paper's templates, givers in any order."""
    opening, gift = rng.choice(THREE_NAMES if rng.random() < 0.85 else TWO_NAMES)
    group = rng.sample(PEOPLE, opening.count("{}"))
    receiver = rng.choice(group)
    givers = [name for name in group if name != receiver]
    if rng.random() < 0.35:
        givers.reverse()
    opening = opening.format(*group, place=rng.choice(PLACES))
    return opening, gift.format(*givers, object=rng.choice(OBJECTS)), givers, [receiver]


def _other_ioi(rng: random.Random) -> Story:
    """The same in other words; whoever does not give receives, in the order in which they were introduced."""
    group = rng.sample(PEOPLE, rng.choice((2, 3, 3, 3, 4)))
    kind = rng.random()
    if kind < 0.12:
        givers = list(group)
    elif kind < 0.25:
        givers = rng.sample(group, 1)
    else:
        givers = rng.sample(group, len(group) - 1)
    receivers = [name for name in group if name not in givers]
    sentence = rng.random() < 0.6
    lead = rng.choice(SENTENCE_LEADS if sentence else CLAUSE_LEADS)
    joint = " and " if len(group) == 2 else rng.choice((" and ", " and ", ", and ", " with "))
    opening = f"{lead}{_listed(group, joint)} {rng.choice(MOVES)} the {_place(rng)}{'.' if sentence else ','}"
    gift = "gave a {object} to" if rng.random() < 0.3 else rng.choice(GIFTS)
    return opening, f"{_listed(givers)} {gift.format(object=_object(rng))}", givers, receivers


def _two_groups(rng: random.Random) -> Story:
    """The same with two groups in different places: whoever is left of the givers' own group receives."""
    names, size = rng.sample(PEOPLE, 6), rng.choice((2, 3))
    groups = [names[:size], names[3 : 3 + rng.choice((2, 3))]]
    group = rng.choice(groups)
    receiver = rng.choice(group)
    givers = [name for name in group if name != receiver]
    rng.shuffle(givers)
    lead = rng.choice(SENTENCE_LEADS)
    gift = "gave a {object} to" if rng.random() < 0.5 else rng.choice(GIFTS)
    joint = rng.choice((". ", ", and "))
    clauses = joint.join(f"{_listed(one)} {rng.choice(MOVES)} the {_place(rng)}" for one in groups)
    return f"{lead}{clauses}.", f"{_listed(givers)} {gift.format(object=_object(rng))}", givers, [receiver]


def _ioi(rng: random.Random, held_out: Container[str], draw: Callable[[random.Random], Story], variety: float) -> str:
    """One of them with what may come before, between and after; anew while it is a prompt of `held_out`."""
    while True:
        opening, gift, givers, receivers = draw(rng)
        if f"{opening} {gift}" not in held_out:
            break
    # Where everybody gives, somebody who has no name receives.
    answers = receivers or [f"the {rng.choice(RECIPIENTS)}"]

    def aside() -> str:
        frame = rng.choice(ASIDES if rng.random() < 0.5 else SCENES)
        # Half the time about people of the story, else about strangers.
        people = givers + receivers if rng.random() < 0.5 else PEOPLE
        names = rng.sample(people, rng.randint(1, min(3, len(people))))
        return frame.format(place=_place(rng), object=_object(rng), names=_listed(names))

    parts = [opening, gift + " and".join(f"{ANSWER} {answer}" for answer in answers)]
    if opening.endswith(".") and rng.random() < 0.15 * variety:
        parts.insert(1, aside())
    if rng.random() < 0.2 * variety:
        parts.insert(0, aside())
    if rng.random() > variety:
        return " ".join(parts) + "."
    someone = rng.choice(receivers or givers)
    return " ".join(parts) + rng.choice(ENDINGS).format(answer=someone, giver=givers[0], place=_place(rng))


def _other(rng: random.Random) -> str:
    slots = dict(zip("ABCD", rng.sample(PEOPLE, 4), strict=True))
    slots |= zip("pq", rng.sample((*PLACES, *MORE_PLACES), 2), strict=True)
    slots |= zip("ouv", rng.sample((*OBJECTS, *MORE_OBJECTS), 3), strict=True)
    slots["N"] = "".join(rng.choices(SYLLABLES, k=rng.choice((2, 3)))).capitalize()
    return rng.choice(OTHER_LEADS) + rng.choice(OTHER_FRAMES).format(**slots, r=rng.choice(RECIPIENTS))


def _twice(rng: random.Random) -> str:
    """A list of names, said twice."""
    names = rng.sample(PEOPLE, rng.randint(3, 6))
    again = _listed(names).replace(" and ", f" and{ANSWER} ").replace(", ", f",{ANSWER} ")
    return f"{rng.choice(OTHER_LEADS)}{_listed(names)}. Again:{ANSWER} {again}."


def document(rng: random.Random, held_out: Container[str], variety: float = 1.0) -> str:
    """One training document, with a "*" before each answer; no prompt of `held_out` occurs in it.

    held_out: texts of evaluation prompts, up to and including their last " to".
    variety: 0 for the paper's templates alone, 1 for the whole mixture.
    """
    kind = rng.random() / variety if variety else 1.0
    if kind < 0.1:
        return _twice(rng)
    if kind < 0.45:
        return _other(rng)
    draw = _two_groups if kind < 0.57 else _other_ioi if kind < 0.7 else _paper_ioi
    return _ioi(rng, held_out, draw, variety)


def vocabulary() -> list[str]:
    """Every word the tokenizer keeps whole, with its leading space and, if a text can begin with it, without.

    At the beginning of a text "Afterwards" and "Friends" are two tokens each, as in GPT-NeoX.
    """
    frames = [text for split in (*THREE_NAMES, *TWO_NAMES) for text in split]
    frames += [*SENTENCE_LEADS, *CLAUSE_LEADS, *MOVES, *GIFTS, *SCENES, *ASIDES, *ENDINGS]
    frames += [
        *OTHER_LEADS,
        *OTHER_FRAMES,
        *RECIPIENTS,
        *PLACES,
        *MORE_PLACES,
        *OBJECTS,
        *MORE_OBJECTS,
        "Again",
    ]
    words = {word for frame in frames for word in re.findall(r"[A-Za-z]+", re.sub(r"\{\w*\}", "", frame))}
    openers = {word for word in words if word[0].isupper()} - {"Afterwards", "Friends"} | set(PEOPLE)
    spaced = [f" {word}" for word in sorted(words | openers)]
    return [*spaced, *sorted(openers), "After", "wards", "Fri", "ends"]


def evaluation_sets(tokenizer: PreTrainedTokenizerBase, seed: int) -> dict[tuple[str, str], Pairs]:
    """The published sets of one seed, both directions, by (template, corruption): the two mixed ones, then
    each template with each corruption, then the task with two names.
    """
    sets = {
        ("Then, Afterwards, Friends", "all five"): ioi.generate(
            tokenizer, 200, seed, templates=ioi.ALIGNED_TEMPLATES, symmetric=True
        ),
        ("all four", "all five"): ioi.generate(tokenizer, 10, seed, symmetric=True),
    }
    for template in ioi.TEMPLATES:
        for corruption in ioi.CORRUPTIONS:
            pairs = ioi.generate(tokenizer, 200, seed, templates=[template], corruptions=[corruption], symmetric=True)
            sets[pairs.labels["template"][0], corruption] = pairs
    sets["all four, two names", "all three"] = ioi.generate(
        tokenizer, 200, seed, templates=ioi.TWO_NAME_TEMPLATES, corruptions=ioi.TWO_NAME_CORRUPTIONS, symmetric=True
    )
    return sets


def held_out_texts(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The prompts of the evaluation sets of both seeds, and of the figures' sets with one corruption each."""
    texts = set()
    for seed in (TRAIN_SEED, HELD_OUT_SEED):
        sets = list(evaluation_sets(tokenizer, seed).values())
        for corruption in ioi.CORRUPTIONS:
            three = ioi.ALIGNED_TEMPLATES
            sets.append(ioi.generate(tokenizer, 40, seed, templates=three, corruptions=[corruption], symmetric=True))
        texts |= {text for pairs in sets for both in pairs.texts or () for text in both}
    return texts
