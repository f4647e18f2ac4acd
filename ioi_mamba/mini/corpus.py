"""The text `mini` is trained on: short made-up documents about people, of many wordings and several tasks.

A document is a string in which "*" stands before each answer, a word that the text before it determines:
"gave a bone to* John". One in seven is a prompt of the paper's four templates, as it stands there. The others say
the same in other words, or ask something else about the same names: who has, is, likes or does what, in both
directions and after changes; lists said again and backwards; the order in which people came; the arguments of a
function; whether a noun is one or several; which of two years is later. What each needs is shared with some others
and not with all: a model that fits them has to find out who is missing, and not merely which name is rare.

Three things are kept from training, to be measured on: whole wordings (`wordings.Forms.held_out`), names of two tokens
in combinations that do not occur, and objects of two tokens likewise. Prompts of the published data sets are kept too.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Container, Iterator
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ioi_mamba.mini import wordings
from ioi_mamba.mini.wordings import Forms, Relation
from ioi_mamba.tasks import greater_than, ioi
from ioi_mamba.tasks.base import Pairs
from ioi_mamba.tasks.ioi import NAME, NAMES, OBJECT, OBJECTS, PLACE, PLACES, TEMPLATES, TWO_NAME_TEMPLATES

ANSWER = "*"

TRAIN_SEED, HELD_OUT_SEED = 27, 28
"""The seeds of the published data sets. No prompt of either is trained on."""

PEOPLE: tuple[str, ...] = tuple(sorted(set(NAMES)))


def _products(beginnings: tuple[str, ...], endings: tuple[str, ...]) -> list[str]:
    return [beginning + ending for beginning in beginnings for ending in endings]


_LONG_NAMES = _products(wordings.NAME_BEGINNINGS, wordings.NAME_ENDINGS)
HELD_OUT_NAMES = tuple(name for number, name in enumerate(_LONG_NAMES) if number % 10 == number // 28 % 10)
LONG_NAMES = tuple(name for name in _LONG_NAMES if name not in set(HELD_OUT_NAMES))
"""Names of two tokens; every beginning and every ending of the held-out ones is in some other."""
HELD_OUT_OBJECTS = wordings.HELD_OUT_OBJECTS
LONG_OBJECTS = tuple(
    word
    for word in _products(wordings.OBJECT_BEGINNINGS, wordings.OBJECT_ENDINGS)
    if word not in (*HELD_OUT_OBJECTS, *wordings.MORE_OBJECTS)
)

LOOSE = 0.35
"""Share of the wordings of training documents that are loose ones."""

FRAMES, WORDS_OF_TWO = "frames", "names and objects"
"""What a document can have of the held-out things."""


class Draw:
    """The random choices of one document, and between which words its answers are.

    held_out: FRAMES, so that every wording that has held-out forms takes one of them; WORDS_OF_TWO, so that every name
    and object is a held-out one of two tokens. choices: the words of each kind that the document has named.
    """

    def __init__(self, rng: random.Random, held_out: Container[str] = ()):
        self.rng, self.held_out = rng, held_out
        self.choices: dict[str, list[str]] = {}

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def form(self, forms: Forms) -> str:
        """A wording."""
        if FRAMES in self.held_out and forms.held_out:
            return self.rng.choice(forms.held_out)
        if not (forms.loose and self.chance(LOOSE)):
            return self.rng.choice(forms.known)
        pieces = re.sub(r"\[(words|some)\]", self._pieces, self.rng.choice(forms.loose))
        return re.sub(r" +([ .,:*])", r"\1", pieces).strip()

    def _pieces(self, found: re.Match[str]) -> str:
        least, most = (1, 3) if found[1] == "words" else (0, 2)
        return " ".join(self.rng.choices(wordings.PIECES, k=self.rng.randint(least, most)))

    def add(self, kind: str, n: int) -> list[str]:
        """n words of a kind that the document does not have yet."""
        named = self.choices.setdefault(kind, [])
        new: list[str] = []
        while len(new) < n:
            word = getattr(self, f"_{kind}")()
            if word not in named and word != "Same":  # made of two syllables, and a word of the lists
                new.append(word)
                named.append(word)
        return new

    def _people(self) -> str:
        kind = self.rng.random()
        if WORDS_OF_TWO in self.held_out:
            return self.rng.choice(HELD_OUT_NAMES)
        if kind < 0.78:
            return self.rng.choice(PEOPLE)
        if kind < 0.96:
            return self.rng.choice(LONG_NAMES)
        return "".join(self.rng.choices(wordings.SYLLABLES, k=self.rng.choice((2, 3)))).capitalize()

    def _objects(self) -> str:
        kind = self.rng.random()
        if WORDS_OF_TWO in self.held_out:
            return self.rng.choice(HELD_OUT_OBJECTS)
        return self.rng.choice(OBJECTS if kind < 0.5 else wordings.MORE_OBJECTS if kind < 0.8 else LONG_OBJECTS)

    def _places(self) -> str:
        return self.rng.choice(PLACES if self.chance(0.5) else wordings.MORE_PLACES)

    def _jobs(self) -> str:
        return self.rng.choice(wordings.JOBS)

    def some_people(self, n: int) -> list[str]:
        """n people, of the document or strangers, for a sentence that is beside the point."""
        known = self.choices.get("people", [])
        return self.rng.sample(known, min(n, len(known))) if known and self.chance(0.5) else self.add("people", n)

    def fill(self, form: str, **slots: str) -> str:
        """The wording with its words; places, objects and a job are drawn for slots that are not given."""
        for slot, kind in (("place", "places"), ("place2", "places"), ("object", "objects"), ("job", "jobs")):
            if slot not in slots and f"{{{slot}}}" in form:
                slots[slot] = self.add(kind, 1)[0]
        if "{move}" in form:
            slots["move"] = self.form(wordings.MOVES)
        lead, clause = self.rng.choice(wordings.LEADS), self.rng.choice(wordings.CLAUSES)
        return form.format(**slots, lead=lead, clause=clause)

    def aside(self) -> str:
        """A sentence that is beside the point."""
        form = self.form(wordings.ASIDES)
        names = _listed(self.some_people(self.rng.randint(1, 3))) if "{names}" in form else ""
        return self.fill(form, names=names)

    def listed(self, names: list[str]) -> str:
        """The names as a list, with one of several joints."""
        joints = (" and ",) * 6 + (", and ", " with ", ", with ")
        return _listed(names, self.rng.choice(joints))


def _sentences(text: str) -> str:
    """The text with a capital letter at the beginning of each sentence."""
    return re.sub(r"(^|[.?!] )([a-z])", lambda found: found[1] + found[2].upper(), text.strip())


def _listed(names: list[str], joint: str = " and ") -> str:
    return joint.join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]


def _answers(names: list[str]) -> str:
    """The names as answers: "* Ana and* Ivan"."""
    return " and".join(f"{ANSWER} {name}" for name in names)


# Who is left -------------------------------------------------------------------------------------------------------


def _split(template: str) -> tuple[str, str]:
    """The two clauses of a published template, as format strings."""
    slots = template.replace(NAME, "{}").replace(PLACE, "{place}").replace(OBJECT, "{object}")
    opening, gift = re.fullmatch(r"(.*[.,]) (.*)", slots, re.DOTALL).groups()  # type: ignore[union-attr]
    return opening, gift


THREE_NAMES = tuple(map(_split, TEMPLATES))
TWO_NAMES = tuple(map(_split, TWO_NAME_TEMPLATES))


def _published(draw: Draw) -> str:
    """A prompt in the words of the paper's templates, givers in any order, and its answer."""
    rng = draw.rng
    opening, gift = rng.choice(THREE_NAMES if draw.chance(0.85) else TWO_NAMES)
    group = draw.add("people", opening.count("{}"))
    receiver = rng.choice(group)
    givers = [name for name in group if name != receiver]
    if draw.chance(0.35):
        givers.reverse()
    thing = draw.add("objects", 1)[0]
    parts = [
        opening.format(*group, place=rng.choice(PLACES)),
        gift.format(*givers, object=thing) + _answers([receiver]),
    ]
    if opening.endswith(".") and draw.chance(0.1):
        parts.insert(1, draw.aside())
    if draw.chance(0.15):
        parts.insert(0, draw.aside())
    return " ".join(parts)


def _groups(draw: Draw) -> str:
    """The same in other words: one group or two, and whoever is left of the givers' own."""
    rng = draw.rng
    n_groups = 2 if draw.chance(0.08) else 1
    openings, groups = [], []
    for _ in range(n_groups):
        opening = draw.form(wordings.OPENINGS)
        while n_groups > 1 and opening.endswith(","):
            opening = draw.form(wordings.OPENINGS)
        groups.append(draw.add("people", rng.choice((2, 3, 3, 3, 4) if n_groups == 1 else (2, 2, 3))))
        openings.append(draw.fill(opening, group=draw.listed(groups[-1])))
    group = rng.choice(groups)
    n_givers = len(group) - 1 if draw.chance(0.92) else rng.randint(1, len(group) - 1)
    givers = rng.sample(group, n_givers)
    left = [name for name in group if name not in givers]
    if not openings[-1].endswith(","):
        openings += [draw.aside() for _ in range(2) if draw.chance(0.08)]
    if draw.chance(0.1):
        openings.insert(0, draw.aside())
    return " ".join([*openings, draw.fill(draw.form(wordings.GIFTS), givers=_listed(givers), left=_answers(left))])


def _pronouns(draw: Draw) -> str:
    """Givers who are named once and then are "They"."""
    n_givers = draw.rng.choice((2, 2, 3))
    givers, (other,) = draw.add("people", n_givers), draw.add("people", 1)
    form = draw.form(wordings.PRONOUN_STORIES)
    return draw.fill(form, givers=draw.listed(givers), left0=f" {other}", left=_answers([other]))


# Who has, is, likes or does what -----------------------------------------------------------------------------------


def _facts(draw: Draw) -> str:
    """Facts about two or three people, perhaps of two kinds, perhaps a change, and questions about them.

    Half of the documents are plain: two people, one wording, no change. Without those, recall is not learnt.
    """
    rng = draw.rng
    plain = draw.chance(0.5)
    names = [name for name in wordings.RELATIONS]
    kinds = [wordings.RELATIONS[name] for name in rng.sample(names, 2 if draw.chance(0.05) and not plain else 1)]
    people = draw.add("people", 2 if plain or len(kinds) > 1 else rng.choice((2, 3)))
    said: list[str] = []
    questions: list[str] = []
    for relation in kinds:
        holder = dict(zip(draw.add(relation.values, len(people)), rng.sample(people, len(people)), strict=True))
        said.append(_stated(draw, relation, holder, plain))
        if relation.moves and not plain and draw.chance(0.35):
            said.append(_change(draw, relation, holder, people))
        questions += _questions(draw, relation, holder)
        if not plain and draw.chance(0.15):
            said.append(draw.aside())
    return " ".join([*said, ". ".join(rng.sample(questions, rng.randint(2, min(4, len(questions)))))])


def _stated(draw: Draw, relation: Relation, holder: dict[str, str], plain: bool) -> str:
    """A fact for each value and the person it goes with, in one sentence or in several."""
    one_form = draw.form(relation.facts) if plain or draw.chance(0.5) else None
    facts = [draw.fill(one_form or draw.form(relation.facts), who=who, what=what) for what, who in holder.items()]
    return draw.rng.choice((". ".join(facts), _listed(facts), _listed(facts, ", and "))) + "."


def _change(draw: Draw, relation: Relation, holder: dict[str, str], people: list[str]) -> str:
    """A sentence after which one value goes with another person; `holder` is changed."""
    what = draw.rng.choice(list(holder))
    old = holder.pop(what)
    if relation.moves == "value":
        who = draw.rng.choice([name for name in people if name != old])
        slots = {"old": old, "what": what}
        holder[what] = who
    else:
        who, new = old, draw.add(relation.values, 1)[0]
        slots = {"from": what, "what": new}
        holder[new] = who
    lead = draw.rng.choice(("Later, ", "Then ", "After lunch, ", ""))
    return lead + draw.fill(draw.form(relation.changes), who=who, **slots) + "."


def _questions(draw: Draw, relation: Relation, holder: dict[str, str]) -> list[str]:
    """Every question that has one answer, by value or by person, each with its answer."""
    holders = list(holder.values())
    asked = []
    for what, who in holder.items():
        for forms in (relation.who, relation.what) if holders.count(who) == 1 else (relation.who,):
            asked.append(draw.fill(draw.form(forms), who=who, what=what))
    return asked


# Lists, orders and arguments ---------------------------------------------------------------------------------------


def _lists(draw: Draw) -> str:
    """A list of names, said again or backwards, or asked about."""
    rng = draw.rng
    names = draw.add("people", rng.choice((3, 3, 4, 4, 5)))
    told = draw.fill(draw.form(wordings.LISTS), group=_listed(names), chain=", then ".join(names))
    kind = rng.random()
    if kind < 0.5:
        form, again = (wordings.AGAIN, names) if kind < 0.25 else (wordings.BACKWARDS, names[::-1])
        return f"{told} {draw.fill(draw.form(form), again=f'{ANSWER} ' + f',{ANSWER} '.join(again))}"
    asked = []
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(names) - 1)
        form = draw.form(wordings.ORDER)
        slots = {"before": names[at], "after": names[at + 1], "first": names[0], "second": names[1], "last": names[-1]}
        asked.append(draw.fill(form, **slots))
    return f"{told} {'. '.join(asked)}"


def _arguments(draw: Draw) -> str:
    """The arguments of a function, described in the order of its signature."""
    names = draw.add("people", draw.rng.randint(3, 5))
    objects = draw.add("objects", len(names))
    later = list(zip(names, objects, strict=True))[1:]
    return draw.fill(
        draw.form(wordings.SIGNATURES),
        name=draw.rng.choice(wordings.FUNCTIONS),
        args=", ".join(names),
        first=names[0],
        object=objects[0],
        params="".join(f" param{ANSWER} {name}: the {thing}." for name, thing in later),
        args_="".join(f" arg{ANSWER} {name} is a {thing}." for name, thing in later),
    )


# Words and numbers that agree --------------------------------------------------------------------------------------


def _agreement(draw: Draw) -> str:
    """A noun, another between it and its verb, and the verb in the number of the first."""
    sentences = []
    for _ in range(draw.rng.randint(1, 2)):
        when, *verbs = draw.rng.choice(wordings.TENSES)
        (noun, attractor), plural = draw.rng.sample(wordings.NOUNS, 2), draw.chance(0.5)
        draw.choices["/".join(verbs)] = verbs
        form = draw.form(wordings.AGREEMENT)
        sentence = draw.fill(
            form,
            noun=f"{noun}s" if plural else noun,
            attractor=f"{attractor}s" if draw.chance(0.5) else attractor,
            names=_listed(draw.some_people(draw.rng.randint(1, 2))) if "{names}" in form else "",
            verb=verbs[plural],
        )
        sentences.append(f"{when} {sentence}")
    return ". ".join(sentences)


def _years(draw: Draw) -> str:
    """Two years of a century, the answer after the other or before it."""
    early, late = sorted(draw.rng.sample(range(100), 2))
    form = draw.form(wordings.YEARS)
    shown, answer = (late, early) if form.endswith("{early}") else (early, late)
    others = [year for year in range(100) if (year < shown) != (answer < shown) and year != shown]
    draw.choices["years"] = [f"{answer:02d}", f"{draw.rng.choice(others or [shown]):02d}"]
    noun, century = draw.rng.choice(greater_than.NOUNS), draw.rng.choice(greater_than.CENTURIES)
    lasted = greater_than.START.format(noun=noun, century=century) + f"{early:02d}"
    who = draw.some_people(1)[0] if "{who}" in form else ""
    years = {"early": f"{early:02d}", "late": f"{late:02d}"}
    return draw.fill(form, noun=noun, century=century, lasted=lasted, who=who, **years)


class Source(NamedTuple):
    """One kind of document: its share of them, and how one is drawn."""

    share: float
    draw: Callable[[Draw], str]


SOURCES = {
    "published prompts": Source(0.12, _published),
    "who is left": Source(0.25, _groups),
    "pronouns": Source(0.05, _pronouns),
    "facts": Source(0.32, _facts),
    "lists": Source(0.14, _lists),
    "arguments": Source(0.03, _arguments),
    "agreement": Source(0.03, _agreement),
    "years": Source(0.06, _years),
}
"""What the documents are, and how large a share of them each kind is."""


def draw_document(rng: random.Random, source: str, held_out: Container[str] = ()) -> tuple[str, dict[str, list[str]]]:
    """One document of a source with "*" before each answer, and by kind the words that answers are among.

    held_out: FRAMES or WORDS_OF_TWO or both, what it takes from the things that no training document has.
    """
    draw = Draw(rng, held_out)
    text = SOURCES[source].draw(draw)
    if source != "arguments":
        text = _sentences(text) + draw.fill(rng.choice(wordings.ENDINGS))
    return text, draw.choices


def document(rng: random.Random, kept: Container[str], shares: dict[str, float] | None = None) -> str:
    """One training document, with a "*" before each answer.

    kept: texts of evaluation prompts; a document with an answer right after one of them is drawn anew. shares: of the
    sources, in place of their own.
    """
    shares = shares or {name: source.share for name, source in SOURCES.items()}
    (source,) = rng.choices(list(shares), list(shares.values()))
    while True:
        text, _ = draw_document(rng, source)
        if not any(prompt in kept for prompt in _prompts(text)):
            return text


def _prompts(text: str) -> Iterator[str]:
    """What a document has before each of its answers, in its last one, two and three sentences."""
    pieces = text.split(ANSWER)
    for number in range(1, len(pieces)):
        before = "".join(pieces[:number])
        starts = [0, *(found.end() for found in re.finditer(r"[.?!] ", before))]
        for start in starts[-3:]:
            yield before[start:]


def split_answers(text: str) -> Iterator[tuple[str, bool]]:
    """The pieces of a document without the "*", and of each whether it is an answer; tokens never cross pieces."""
    before, *rest = text.split(ANSWER)
    yield before, False
    for piece in rest:
        answer = re.match(r" ?\w+", piece)
        assert answer is not None
        yield answer[0], True
        yield piece[answer.end() :], False


def vocabulary() -> list[str]:
    """Every entry of the tokenizer: words with their leading space and, if a text can begin with one, without.

    At the beginning of a text "Afterwards" and "Friends" are two tokens each, as in GPT-NeoX. Years are the two
    digits of the century and those of the year; long names and objects are a beginning and an ending.
    """
    endings = (*wordings.NAME_ENDINGS, *wordings.OBJECT_ENDINGS)
    pieces = (wordings.NAME_ENDINGS, wordings.OBJECT_ENDINGS, wordings.SYLLABLES, wordings.HELD_OUT_OBJECTS)
    said = [value for name, value in vars(wordings).items() if name.isupper() and value not in pieces]
    said += [THREE_NAMES, TWO_NAMES, greater_than.START, greater_than.MIDDLE, greater_than.NOUNS]
    said += [PEOPLE, PLACES, OBJECTS, [f"{noun}s" for noun in wordings.NOUNS]]
    words: set[str] = set()
    for text in _texts(said):
        plain = re.sub(r"\{\w*\}|\[\w+\]", " ", text).strip()
        begun = _sentences(plain) if " " in plain else plain
        words |= {word for version in (plain, begun) for word in re.findall(r"[A-Za-z]+", version)}
    openers = sorted({word for word in words if word[0].isupper()} - {"Afterwards", "Friends"})
    years = [f"{year:02d}" for year in range(100)]
    centuries = [f" {century}" for century in greater_than.CENTURIES]
    spaced = [f" {word}" for word in sorted(words)]
    return [*spaced, *openers, "After", "wards", "Fri", "ends", "def", "function", *endings, *centuries, *years]


def _texts(value: Any) -> Iterator[str]:
    """All strings in nested tuples, lists and dictionaries."""
    if isinstance(value, str):
        yield value
    else:
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def evaluation_sets(tokenizer: PreTrainedTokenizerBase, seed: int) -> dict[tuple[str, str], Pairs]:
    """The published sets of one seed, both directions, by (template, corruption): the two mixed ones, then
    each template with each corruption, then the task with two names.
    """
    sets = {
        ("Then, Afterwards, Friends", "all five"): ioi.generate(tokenizer, 200, seed, templates=ioi.ALIGNED_TEMPLATES),
        ("all four", "all five"): ioi.generate(tokenizer, 10, seed),
    }
    for template in ioi.TEMPLATES:
        for corruption in ioi.CORRUPTIONS:
            pairs = ioi.generate(tokenizer, 200, seed, templates=[template], corruptions=[corruption])
            sets[pairs.labels["template"][0], corruption] = pairs
    sets["all four, two names", "all three"] = ioi.generate(
        tokenizer, 200, seed, templates=ioi.TWO_NAME_TEMPLATES, corruptions=ioi.TWO_NAME_CORRUPTIONS
    )
    return sets


def held_out_texts(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The prompts of the evaluation sets of both seeds, of the figures' sets with one corruption each, and the clean
    ones of greater-than.
    """
    texts = set()
    for seed in (TRAIN_SEED, HELD_OUT_SEED):
        sets = list(evaluation_sets(tokenizer, seed).values())
        for corruption in ioi.CORRUPTIONS:
            three = ioi.ALIGNED_TEMPLATES
            sets.append(ioi.generate(tokenizer, 40, seed, templates=three, corruptions=[corruption]))
        texts |= {text for pairs in sets for both in pairs.texts or () for text in both}
        years = greater_than.generate(tokenizer, 200, seed)
        texts |= {clean for clean, _ in years.texts or ()}
    return texts
