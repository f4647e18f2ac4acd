"""The wordings of the training documents of `mini`, and those that no training document has.

A wording is a format string. Words in braces are filled in by `corpus`; "*" stands before an answer, a word that
the text before it determines. `Forms.held_out` are whole wordings that are kept for measuring: their words occur in
training documents, they themselves never do. `Forms.loose` are wordings of which only what matters stands: "[words]"
are one to four pieces of `PIECES`, "[some]" none to three, drawn anew each time, so that no wording can be learnt by
heart.
"""

from __future__ import annotations

from typing import NamedTuple


class Forms(NamedTuple):
    """Wordings of one thing: `known` and `loose`, which are trained on, and `held_out`, which are not."""

    known: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    loose: tuple[str, ...] = ()


# Words -----------------------------------------------------------------------------------------------------------

MORE_PLACES = tuple(
    """
    library park market museum beach theater farm church bank hotel kitchen bakery forest bridge
    """.split()  # noqa: SIM905
)
MORE_OBJECTS = tuple(
    """
    book ball letter gift flower hat phone pen map lamp cup ring key coat cake mirror blanket
    """.split()  # noqa: SIM905
)

# Two-token names and objects: every beginning with every ending.
NAME_BEGINNINGS = tuple(
    """
    Bel Cor Dor Fel Gil Hal Jos Kar Lor Mal Ner Orl Pem Quin Ros Sal Tam Ulr Val Wil Yol Zel Bar Cal Der Fer Gar Hed
    Ing Lud Mon Nor Pom Ran Sib Tor
    """.split()  # noqa: SIM905
)
NAME_ENDINGS = tuple(
    """
    ana inda etta ina ard olf bert mund win ric iel ora isa anne elle ino ius anto ilda iana eus amir andra ias erick
    wyn son gard
    """.split()  # noqa: SIM905
)
OBJECT_BEGINNINGS = tuple("foot snow hand note book rain sun paper tooth milk".split())  # noqa: SIM905
OBJECT_ENDINGS = tuple("ball book bag coat brush pot mark hat box case".split())  # noqa: SIM905
HELD_OUT_OBJECTS = (
    "football", "snowball", "handbag", "notebook", "bookmark", "raincoat", "sunhat", "paperbag", "toothbrush", "bookcase",
)  # fmt: skip
SYLLABLES = ("ba", "de", "fi", "go", "ku", "la", "me", "ni", "po", "ru", "sa", "te", "vi", "zo")

JOBS = tuple("teacher driver doctor baker painter farmer singer nurse pilot captain".split())  # noqa: SIM905

# What loose wordings are filled with. None of them says which word is an answer: no "first", "again" or "they".
PIECES = tuple(
    """
    went|arrived|walked|came|ran|were|was|is|are|has|had|have|worked|waited|lived|live|slept|sat|sat near|stood|waits|works|
    gave|gave a|gave the|gave a {object}|gave the {object}|handed a {object}|sent the {object}|sold a {object}|brought a {object}|
    brought|made|made a {object}|sold|bought a {object}|took the {object}|got a {object}|said|said hello|talked|told|told a story|asked|
    knew|knows|saw|found|found a {object}|likes|called|call|invited|wanted|wrote a letter|sang|left|chose|belongs|owned|was made|
    was given|was found|to|to|to|for|for|with|with|from|from|at|in|near|of|by|about|without|on the table|the {place}|
    at the {place}|at the {place}|in the {place}|near the {place}|to the {place}|from the {place}|of the {place}|the house of|
    in the house|a {object}|the {object}|the {object}|the {job}|a {job}|somebody|nobody|everybody|the guests|guests|friends|
    the names|the road|the music|late|loud|tired|happy|busy|new|sunny|today|home|there|here|only|that|who|it|it was|now|then|not|
    in the evening|in the morning|because|but|so|near|my|we|I|you|one|line|in line|house|lunch|the table|the name
    """.replace("\n", "")
    .replace("    ", "")
    .split("|")
)

# Beginnings and things in between ----------------------------------------------------------------------------------

LEADS = (
    "", "", "", "", "Then, ", "Afterwards, ", "Afterwards ", "Later, ", "Yesterday ", "Today ", "One day ",
    "Last week ", "After lunch, ", "In the evening, ", "At noon, ", "Once ", "On Monday ", "This morning, ", "Again, ",
)  # fmt: skip
CLAUSES = ("When", "While", "After", "Before", "As", "Because", "Once", "Since")

ASIDES = Forms(
    (
        "It was a sunny day.", "It was late.", "The weather was cold.", "Music was playing.", "It rained.",
        "Nobody said a word.", "Everybody was happy.", "The {place} was very busy.", "The {object} was new.",
        "There was a {object} on the table.", "The {place} was closed in the morning.",
        "{names} stayed at home.", "{names} said hello.", "{names} lost a {object}.", "{names} found a {object}.",
        "{names} wanted the {object}.", "It was the day of {names}.", "The {place} is near the house of {names}.",
        "Nobody had seen {names}.", "The {object} was for {names}.", "Everybody likes {names}.",
        "{names} never came to the {place}.", "The letter was from {names}.", "{names} slept.",
        "The music was loud, and {names} sang.", "Near the {place} somebody saw {names}.",
    ),
    (
        "{names} came home late.", "The {object} was near the {place}.", "Somebody said hello to {names}.",
        "Nobody found the {object}.",
    ),
    loose=("[some] {names} [words].", "[words] {names} [some].", "[words].",),
)  # fmt: skip
ENDINGS = (
    ".", ".", ".", ".", " and left.", " again.", " because it was late.", ". They were happy.", ". It was a sunny day.",
    ". Then they went home.", " in the evening.", " and went to the {place}.",
)  # fmt: skip

# Who is left: a group, of whom some are named again, and the answer is whoever is not -----------------------------

MOVES = Forms(
    (
        "went to", "arrived at", "walked to", "drove to", "came to", "ran to", "met at", "were at", "worked at",
        "waited at", "returned to", "had lunch at", "had fun at", "talked at", "slept at", "hurried to", "sat near",
        "stood near", "flew to", "got to", "entered", "visited", "found", "saw", "cleaned", "painted", "left",
    ),
    ("waited near", "played near", "walked from"),
)  # fmt: skip
# {group}: all of them, listed; a wording that ends with a comma is a clause, and what is given follows in the same
# sentence.
OPENINGS = Forms(
    (
        "{lead}{group} {move} the {place}.", "{lead}{group} {move} the {place}.", "{lead}{group} {move} the {place}.",
        "{clause} {group} {move} the {place},", "{clause} {group} {move} the {place},",
        "Friends {group} {move} the {place}.", "{lead}{group} {move} the {place} with a {object}.", "{lead}{group} {move} the {place} and the {place2}.",
        "{lead}there were {group} at the {place}.", "There were {group}.", "These are {group}.", "I know {group}.",
        "{lead}{group} had a {object}.", "{lead}{group} wanted to see the {place}.", "{group} are friends.",
        "{group} were friends and lived near the {place}.", "Nobody at the {place} knew {group}.",
        "The {job} called {group}.", "The {job} of the {place} invited {group}.", "Everybody at the {place} saw {group}.",
        "The {place} was empty but for {group}.", "In the {place} sat {group}.", "Near the {place} waited {group}.",
        "To the {place} came {group}.", "A {object} was found by {group}.", "The {place} is owned by {group}.",
        "A letter from the {place} came for {group}.", "The {object} was for {group}.", "{clause} the {job} met {group},",
        "{clause} {group} were friends,", "Lunch at the {place} was made by {group}.", "We saw {group} near the {place}.",
        "The names of the guests are {group}.", "{group} live in one house.", "My friends {group} {move} the {place}.",
        "{lead}it rained and {group} {move} the {place}.", "{lead}a {job} and a {object} waited for {group}.",
        "The winners were {group}.", "The team of {group} {move} the {place}.", "On the table was a {object} of {group}.",
        "{group} sang.", "{group} stood in line at the {place}.", "{lead}the road to the {place} was long for {group}.",
    ),
    (
        "At the {place} were {group}.", "The {object} belongs to {group}.", "The guests of the {place} were {group}.",
        "{clause} {group} had a {object},", "{lead}{group} lived at the {place}.", "A {job} knew {group}.",
        "In the house near the {place} were {group}.", "I saw {group} at the {place}.",
    ),
    loose=("{lead}[some] {group} [some].", "[words] {group} [some].", "[some] {group} [words].", "{clause} [some] {group} [words],", "{clause} [words] {group},",),
)  # fmt: skip
# {givers}: those named again; "{left}" is where the answer stands, with its "*".
GIFTS = Forms(
    (
        "{givers} gave a {object} to{left}", "{givers} gave a {object} to{left}", "{givers} gave the {object} to{left}",
        "{givers} handed a {object} to{left}", "{givers} passed a {object} to{left}", "{givers} sent a {object} to{left}",
        "{givers} lent a {object} to{left}", "{givers} sold a {object} to{left}", "{givers} brought a {object} to{left}",
        "{givers} offered a {object} to{left}", "{givers} showed the {object} to{left}",
        "{givers} decided to give a {object} to{left}", "{givers} wanted to give the {object} to{left}",
        "{givers} said hello to{left}", "{givers} talked to{left}", "{givers} bought a {object} for{left}",
        "{givers} made a {object} for{left}", "{givers} took a {object} from{left}", "{givers} got a letter from{left}",
        "{givers} borrowed the {object} from{left}", "{givers} shared a {object} with{left}",
        "{givers} waited for{left}", "{givers} played with{left}", "{givers} went home without{left}",
        "{givers} left with a {object}, but not{left}", "{givers} fell asleep, but not{left}",
        "a {object} was given by {givers} to{left}", "the {object} of {givers} was for{left}",
        "a letter from {givers} came to{left}", "from {givers} came a {object} for{left}",
        "{givers} were tired. The only one who sang was{left}", "{givers} left. Only one stayed, it was{left}",
        "everybody but {givers} slept. The one who slept was{left}", "{givers} were happy, and so was{left}",
        "a {object} was lost. It was not lost by {givers}. It was lost by{left}",
        "{givers} sat near the {object}. Near the {place} sat{left}", "{givers} asked the {job} about{left}",
        "not {givers} but somebody else sang. It was{left}", "{givers} came first. Then came{left}",
        "the {job} talked to {givers}, and then to{left}", "the {job} gave {givers} a {object}, and nothing to{left}",
        "{givers} wrote a letter to{left}", "{givers} told a story to{left}", "{givers} stood near{left}",
    ),
    (
        "{givers} brought the {object} for{left}", "{givers} sold the {object} and said hello to{left}",
        "a {object} was made by {givers} for{left}", "{givers} went home. Only one slept at the {place}, it was{left}",
        "the {job} sent {givers} home, and then talked to{left}", "{givers} sat near the {place} without{left}",
    ),
    loose=("{givers} [words]{left}", "{givers} [words]{left}", "[words] {givers} [words]{left}", "{givers} [words]. [words]{left}",),
)  # fmt: skip
# The same with the givers as "They": who they are is said by the number.
PRONOUN_STORIES = Forms(
    (
        "{lead}{givers} {move} the {place} with{left0}. They gave a {object} to{left}",
        "{lead}{givers} saw{left0} at the {place}. They talked to{left}",
        "{givers} are friends. They live near{left0}. They gave a {object} to{left}",
        "{lead}{givers} waited for{left0}. Then they sent a {object} to{left}",
        "{clause} {givers} met{left0}, they said hello to{left}",
        "{left0} was at the {place}. {givers} came to the {place}. They brought a {object} for{left}",
        "The {job} saw {givers} and later{left0}. They lent a {object} to{left}",
    ),
    (
        "{lead}{givers} found{left0} near the {place}. They gave the {object} to{left}",
        "{givers} knew{left0}. Later, they made a {object} for{left}",
    ),
    loose=("[some] {givers} [words]{left0} [some]. They [words]{left}", "[words]{left0} [some]. [some] {givers} [words]. They [words]{left}", "{lead}[some] {givers} [words]{left0}. Then they [words]{left}",),
)  # fmt: skip


# Who has, is, likes or does what: facts, changes, and questions in both directions -----------------------------


class Relation(NamedTuple):
    """Facts {who} - {what}, how one of them changes, and the two ways to ask.

    values: what is drawn for {what}. A change gives {what} of {old} to {who} where `moves` is "value"; where it is
    "person", {who} has {what} from then on; "" where nothing changes.
    """

    values: str
    moves: str
    facts: Forms
    changes: Forms
    who: Forms
    what: Forms


# What {who} and {what} are to each other is that they stand in one clause.
LOOSE_FACTS = {
    "things": (
        "{who} [words] the {what}",
        "{who} [words] a {what}",
        "the {what} [words] {who}",
        "a {what} [words] {who}",
    ),
    "people": ("{who} [words] {what}",),
}
LOOSE_WHO = {
    "things": ("[words] the {what} [some]* {who}", "the {what} [words]* {who}", "[words] a {what} [some]* {who}"),
    "people": ("[words] {what} [words]* {who}",),
}
LOOSE_WHAT = {
    "things": ("[some] {who} [words] the* {what}", "[words] {who} [some] the* {what}"),
    "people": ("[some] {who} [words]* {what}",),
}
RELATIONS = {
    "who has it": Relation(
        "objects",
        "value",
        Forms(
            (
                "{who} has a {what}", "{who} owns a {what}", "{who} bought a {what}", "{who} found a {what}",
                "{who} took the {what}", "{who} got a {what}", "{who} has the {what}", "the {what} is with {who}",
                "the {what} was sold to {who}", "a {what} was found by {who}", "there is a {what} for {who}",
                "a {what} came for {who}", "the {what} belongs to {who}", "{who} made a {what}",
            ),
            ("a {what} was made by {who}", "a {what} is owned by {who}"),
            loose=LOOSE_FACTS["things"],
        ),
        Forms(
            (
                "{old} gave the {what} to {who}", "{who} took the {what} from {old}", "{old} sold the {what} to {who}",
                "{who} got the {what} from {old}", "{old} lost the {what}, and {who} found it",
                "{who} wanted the {what}, and {old} gave it to {who}",
            ),
            ("{who} bought the {what} from {old}",)),
        Forms(
            (
                "The {what} belongs to* {who}", "The owner of the {what} is* {who}", "The {what} is with* {who}",
                "Who has the {what}? It is* {who}", "The one with the {what} is* {who}", "The {what} is owned by* {who}",
                "Now the {what} belongs to* {who}", "The {what} is in the house of* {who}", "Who owns the {what}?* {who}",
            ),
            ("Who is with the {what}? It is* {who}", "Now the {what} is in the house of* {who}"),
            loose=LOOSE_WHO["things"],
        ),
        Forms(
            (
                "{who} has the* {what}", "{who} owns the* {what}", "What has {who}? The* {what}", "With {who} is the* {what}",
                "In the house of {who} is the* {what}", "What does {who} have? The* {what}", "To {who} belongs the* {what}",
            ),
            ("What is with {who}? The* {what}", "Now {who} has the* {what}"),
            loose=LOOSE_WHAT["things"],
        ),
    ),
    "who is where": Relation(
        "places",
        "person",
        Forms(
            (
                "{who} is at the {what}", "{who} went to the {what}", "{who} works at the {what}", "{who} sat in the {what}",
                "at the {what} is {who}", "{who} waits at the {what}", "in the {what} works {who}", "{who} stays near the {what}",
                "{who} walked to the {what}", "the {what} was visited by {who}", "{who} came to the {what}",
            ),
            ("at the {what} waits {who}", "{who} is near the {what}"),
            loose=LOOSE_FACTS["things"],
        ),
        Forms(
            (
                "{who} left for the {what}", "{who} went to the {what}", "{who} drove from the {from} to the {what}",
                "{who} left the {from} and ran to the {what}", "{who} walked to the {what}",
            ),
            ("{who} left the {from} and walked to the {what}",)),
        Forms(
            (
                "Who is at the {what}? It is* {who}", "At the {what} is* {who}", "The one at the {what} is* {who}",
                "Somebody called from the {what}, it was* {who}", "The {what} is where you see* {who}",
                "In the {what} is* {who}", "Near the {what} we saw* {who}",
            ),
            ("Who is in the {what}? It is* {who}", "At the {what} you see* {who}"),
            loose=LOOSE_WHO["things"],
        ),
        Forms(
            (
                "Where is {who}? At the* {what}", "{who} is at the* {what}", "You see {who} at the* {what}",
                "{who} called from the* {what}", "We saw {who} near the* {what}", "Now {who} is in the* {what}",
            ),
            ("Where works {who}? At the* {what}", "We saw {who} at the* {what}"),
            loose=LOOSE_WHAT["things"],
        ),
    ),
    "who does what": Relation(
        "jobs",
        "",
        Forms(
            (
                "{who} is the {what}", "the {what} is {who}", "{who} works as a {what}", "the name of the {what} is {who}",
                "they call the {what} {who}", "{who}, the {what}, sang", "the {what} was {who}",
            ),
            ("we call {who} the {what}",),
            loose=LOOSE_FACTS["things"],
        ),
        Forms(()),
        Forms(
            (
                "The {what} is* {who}", "Ask the {what}, that is* {who}", "Who is the {what}? It is* {who}",
                "The name of the {what} is* {who}", "The {what} is called* {who}", "We need a {what}, so we call* {who}",
            ),
            ("We ask the {what}, that is* {who}", "The {what} here is* {who}"),
            loose=LOOSE_WHO["things"],
        ),
        Forms(
            (
                "{who} is the* {what}", "What is {who}? The* {what}", "{who} works as a* {what}",
                "Ask {who}, who is the* {what}",
            ),
            ("We call {who}, who is the* {what}",),
            loose=LOOSE_WHAT["things"],
        ),
    ),
    "who likes whom": Relation(
        "people",
        "",
        Forms(
            (
                "{who} chose {what}", "{who} likes {what}", "{who} knows {what}", "{who} talked to {what}", "{who} is the friend of {what}",
                "{who} wrote to {what}", "{who} sat near {what}", "{who} waits for {what}",
            ),
            ("{who} talked about {what}",),
            loose=LOOSE_FACTS["people"],
        ),
        Forms(()),
        Forms(("Close to {what} is* {who}", "The one who chose {what} is* {who}", "{what} was chosen by* {who}"),
            loose=LOOSE_WHO["people"],
        ),
        Forms(
            ("{who} chose* {what}", "With {who} is* {what}", "{who} would invite* {what}", "The friend of {who} is* {what}"),
            ("The one who is with {who} is* {what}",),
            loose=LOOSE_WHAT["people"],
        ),
    ),
}  # fmt: skip

# Lists and orders ---------------------------------------------------------------------------------------------------

LISTS = Forms(
    (
        "{lead}{group}.", "The list: {group}.", "{group} stood in line.", "The names are {group}.", "Read {group}.",
        "First came {chain}.", "The line at the {place}: {group}.", "In this order came {group}.",
    ),
    ("In line stood {group}.", "The names in the line: {group}."),
    loose=("{lead}[some] {group} [some].", "[words] {group}.", "[words]: {group}.",),
)  # fmt: skip
AGAIN = Forms(
    ("Again:{again}", "Once more:{again}", "The same list:{again}", "In this order:{again}"),
    ("The same names:{again}",),
    loose=(
        "[some] again [some]:{again}",
        "The same [words]:{again}",
        "[some] once more [some]:{again}",
    ),
)
BACKWARDS = Forms(
    ("Backwards:{again}", "From the end:{again}", "The last first:{again}"),
    ("Once more backwards:{again}",),
    loose=(
        "[some] backwards [some]:{again}",
        "[some] from the end:{again}",
        "The last first [words]:{again}",
    ),
)
ORDER = Forms(
    (
        "After {before} came* {after}", "Before {after} came* {before}", "Next to {before} came* {after}",
        "The last was* {last}", "The first was* {first}", "The first in line is* {first}", "The last in line is* {last}",
        "Who came after {before}? It was* {after}", "Who came before {after}? It was* {before}", "The second was* {second}",
    ),
    ("Who was the first? It was* {first}", "Who was the last? It was* {last}", "After {before} stood* {after}"),
    loose=("After {before} [words]* {after}", "[words] after {before} [some]* {after}", "Before {after} [words]* {before}", "[words] before {after} [some]* {before}", "[some] the first [words]* {first}", "[some] the last [words]* {last}",),
)  # fmt: skip

# Arguments of a function, in the order of its signature ---------------------------------------------------------------

SIGNATURES = Forms(
    (
        "def {name}({args}): param {first}: the {object}.{params}", "def {name}({args}): arg {first} is a {object}.{args_}",
        "function {name} of {args}. param {first}: the {object}.{params}",
    ),
    ("function {name}({args}): arg {first} is a {object}.{args_}",),
)  # fmt: skip
FUNCTIONS = tuple("send open read write call give find move sell".split())  # noqa: SIM905

# Singular and plural -------------------------------------------------------------------------------------------------

NOUNS = tuple("book ball letter gift flower hat phone pen map lamp cup ring key coat".split())  # noqa: SIM905
AGREEMENT = Forms(
    (
        "the {noun} of {names}* {verb} here", "the {noun} near the {attractor}* {verb} here",
        "the {noun} with the {attractor}* {verb} here", "the {noun} that {names} saw* {verb} here",
        "the {noun} from the {place}* {verb} here", "the {noun} for {names} and the {attractor}* {verb} here",
    ),
    ("the {noun} from {names}* {verb} here", "the {noun} at the {place}* {verb} here"),
    loose=("the {noun} [words] the {attractor}* {verb} here", "the {noun} [words] {names}* {verb} here", "the {noun} [words] the {place}* {verb} here", "the {noun} [words]* {verb} here",),
)  # fmt: skip
TENSES = (("Today", "is", "are"), ("Yesterday", "was", "were"), ("Since Monday", "has", "have"))

# Later years --------------------------------------------------------------------------------------------------------

# {early} and {late}: the last two digits. The form of the published task stands three times.
YEARS = Forms(
    (
        "{lasted} to the year {century}*{late}", "{lasted} to the year {century}*{late}",
        "{lasted} to the year {century}*{late}",
        "The {noun} began in the year {century}{early} and ended in {century}*{late}",
        "The {noun} ended in {century}{late}. It began in {century}*{early}",
        "{who} lived from {century}{early} to {century}*{late}",
        "The {noun} of {century}{late} came after the {noun} of {century}*{early}",
        "First, in {century}{early}, there was a {noun}. The next was in {century}*{late}",
        "{who} left in {century}{early} and returned in {century}*{late}",
    ),
    (
        "The {noun} began in {century}{early} and lasted to {century}*{late}",
        "{who} was here from the year {century}{early} to the year {century}*{late}",
    ),
    loose=("[words] {century}{early} [words] {century}*{late}", "{who} [words] {century}{early} [words] {century}*{late}",),
)  # fmt: skip
