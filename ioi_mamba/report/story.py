"""The story that a page begins with: an example pair, what was found in a sentence, five short answers, and marks to draw.

It is made from what experiments tell of their tables (`ioi_mamba.experiments.story`), by the kind of a mark and never by the
name of an experiment. A view is one corruption with an example of it; its marks are those that matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pandas as pd

from ioi_mamba.charts.circuit_axes import node_place
from ioi_mamba.experiments.story import Kind, Told

LIT = 0.1
"""Effects below this are not drawn."""
EDGES = 60
"""The most kept edges that are drawn, the strongest."""
ROWS = 16
"""The most layers that are drawn one by one, those with the strongest marks; what lies between is folded."""
PARTS = 8
"""Other marks of a layer that the side panel lists."""
SAID = 0.5
"""Of the strongest effect of its kind: what is smaller is drawn and not said."""


class Token(NamedTuple):
    """One token of an example: as text in both prompts, and its label. BOS is no text."""

    clean: str
    corrupted: str
    label: str

    @property
    def changed(self) -> bool:
        return self.clean != self.corrupted

    @property
    def shown(self) -> str:
        """The clean text without the space before it, or what it is where there is none."""
        return self.clean.strip() or ("↵" if "\n" in self.clean else "␣")


class Found(NamedTuple):
    """What one experiment tells, and the name of its section."""

    section: str
    told: Told


@dataclass(frozen=True)
class Mark:
    """One mark of a view. start, end: places of its tokens; low, high: NaN where there is no interval; section: where it is from."""

    kind: Kind
    source: str
    target: str
    start: int
    end: int
    value: float
    low: float
    high: float
    n: int
    section: str

    @property
    def layer(self) -> float:
        """The layer that it lies in, or that an edge leads to."""
        return node_place(self.target)[0]


@dataclass(frozen=True)
class View:
    """One corruption: an example of it, and its marks. hidden: kept edges that are not among those drawn."""

    corruption: str
    tokens: list[Token]
    answer: str
    wrong: str
    prompts: list[dict[str, Any]]
    marks: list[Mark]
    hidden: int = 0

    @property
    def changed(self) -> list[Token]:
        return [token for token in self.tokens if token.changed]

    def of(self, kind: Kind, layer: float | None = None) -> list[Mark]:
        """The marks of a kind, the strongest first."""
        found = [mark for mark in self.marks if mark.kind == kind and layer in (None, mark.layer)]
        return sorted(found, key=lambda mark: -abs(mark.value))


@dataclass(frozen=True)
class Story:
    """What the first screen shows. views: the strongest first. answers: (question, answer) in a few words each."""

    views: list[View]
    finding: str
    answers: list[tuple[str, str]] = field(default_factory=list)


def tell(found: Sequence[Found], examples: Sequence[Mapping[str, Any]], accuracy: Mapping[str, Any] | None) -> Story:
    """The story of what experiments tell.

    Args:
        found: By experiment, in the order of the page.
        examples: As a manifest has them.
        accuracy: Of the unpatched model: accuracy and n, as a manifest has it.
    """
    views = [_view(found, examples, name) for name in _corruptions(examples)]
    views.sort(
        key=lambda view: (_strength(view), max((abs(mark.value) for mark in view.marks), default=0.0)), reverse=True
    )
    if not views:
        return Story([], "")
    view = views[0]
    return Story(views, _finding(view), _answers(view, views, found, accuracy))


def _corruptions(examples: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(str(example.get("corruption", "")) for example in examples))


def _view(found: Sequence[Found], examples: Sequence[Mapping[str, Any]], corruption: str) -> View:
    own = [dict(example) for example in examples if str(example.get("corruption", "")) == corruption]
    first = own[0]
    triples = zip(first["clean"], first["corrupted"], first["positions"], strict=False)
    tokens = [Token(*map(str, triple)) for triple in triples]
    answer, wrong = (str(first.get(name, "")) for name in ("answer", "wrong"))
    view = View(corruption, tokens, answer, wrong, own, [])
    marks = all_marks(found, view)
    edges = sorted((mark for mark in marks if mark.kind == Kind.EDGE), key=lambda mark: -abs(mark.value))
    effects = [mark for mark in marks if mark.kind != Kind.EDGE and abs(mark.value) >= LIT]
    return replace(view, marks=effects + edges[:EDGES], hidden=max(0, len(edges) - EDGES))


def all_marks(found: Sequence[Found], view: View) -> list[Mark]:
    """Everything that is told of a view, also what is not drawn."""
    place: dict[str, int] = {}
    for k, token in enumerate(view.tokens):
        place.setdefault(token.label, k)
    return [mark for each in found for mark in _marks(each, view.corruption, place)]


def _marks(each: Found, corruption: str, place: Mapping[str, int]) -> list[Mark]:
    table = each.told.marks
    of_all = table["corruption"].isin(("", corruption)) if corruption else [True] * len(table)
    found = []
    for row in table[of_all].itertuples():
        if row.source_label in place and row.label in place and pd.notna(row.value):
            numbers = (float(number) if pd.notna(number) else float("nan") for number in (row.value, row.low, row.high))
            ends = (place[row.source_label], place[row.label])
            n = 0 if pd.isna(row.n) else int(row.n)
            found.append(Mark(Kind(row.kind), str(row.source), str(row.target), *ends, *numbers, n, each.section))
    return found


def _strength(view: View) -> float:
    """How strongly something is read after layer 0, where every layer reads what it must: by that a view comes first."""
    return max((abs(mark.value) for mark in view.of(Kind.READS) if mark.layer > 0), default=0.0)


def main_layer(view: View) -> float | None:
    """The layer after layer 0 whose reading matters most before the last token, else anywhere; None where none does."""
    reads = [mark for mark in view.of(Kind.READS) if mark.layer > 0]
    before = [mark for mark in reads if mark.end < len(view.tokens) - 1]
    chosen = (before or reads or view.of(Kind.READS))[:1]
    return chosen[0].layer if chosen else None


def percent(value: float) -> str:
    """As a whole percentage, never "-0 %"."""
    return f"{value * 100:z.0f}\u00a0%"


def span(mark: Mark) -> str:
    """Its interval in words, "" where it has none."""
    return "" if pd.isna(mark.low) else f"95 % interval {mark.low * 100:z.0f} to {percent(mark.high)}"


def name_of(view: View, place: int) -> str:
    """A token in words: its text, and its label where that says more than the text."""
    token = view.tokens[place]
    return f"“{token.shown}”" + ("" if token.label.isdigit() or token.label == token.shown else f" ({token.label})")


def _read_of(view: View) -> Mark | None:
    layer = main_layer(view)
    return view.of(Kind.READS, layer)[0] if layer is not None else None


def _steps(view: View, layer: float) -> list[str]:
    """What a layer does with what it reads, in clauses: moves, carries, writes."""
    last, steps = len(view.tokens) - 1, []
    moved = [mark for mark in view.of(Kind.MOVES, layer) if mark.start != mark.end]
    if moved and abs(moved[0].value) >= SAID * abs(view.of(Kind.MOVES, layer)[0].value):
        far = moved[0].end - moved[0].start
        steps.append(f"its convolution moves it {far} token{'' if far == 1 else 's'} on")
    if view.of(Kind.CARRIES, layer):
        steps.append("its state carries it to the last token")
    writes = [mark for mark in view.of(Kind.WRITES, layer) if mark.end == last]
    if writes:
        steps.append("there it writes the answer")
    return steps


def _finding(view: View) -> str:
    read = _read_of(view)
    if read is None:
        return ""
    what = "the changed token" if view.tokens[read.end].changed else name_of(view, read.end)
    steps = [f"Layer {read.layer:.0f} reads {what}", *_steps(view, read.layer)]
    interval = f" ({span(read)})" if span(read) else ""
    return f"{_listed(steps)}. Patching what it reads turns {percent(read.value)} of the answer{interval}."


def _answers(
    view: View, views: Sequence[View], found: Sequence[Found], accuracy: Mapping[str, Any] | None
) -> list[tuple[str, str]]:
    read = _read_of(view)
    out = []
    if view.answer and view.wrong:
        changed = ", ".join(f"“{token.shown}” to “{token.corrupted.strip()}”" for token in view.changed[:2])
        out.append(
            (
                "What was asked",
                f"The next word, “{view.answer.strip()}”. Changing {changed} makes it “{view.wrong.strip()}”.",
            )
        )
    if read is None:
        return out
    top, last = abs(view.of(Kind.READS)[0].value), len(view.tokens) - 1
    said = [mark for mark in view.of(Kind.READS) if abs(mark.value) >= SAID * top]
    by_layer = {mark.layer: mark for mark in reversed(said)}
    layers = [f"{layer:.0f} ({percent(by_layer[layer].value)})" for layer in sorted(by_layer)]
    out.append(("Which layers", f"{_listed(layers[:4])}{' and more' if len(layers) > 4 else ''}."))
    read_at = [name_of(view, place) for place in sorted({mark.end for mark in said})[:3]]
    written = [mark for mark in view.of(Kind.WRITES, read.layer) if mark.end == last]
    at_end = f"; written at {name_of(view, last)}" if written and last not in {mark.end for mark in said} else ""
    out.append(("At which tokens", f"Read at {_listed(read_at)}{at_end}."))
    steps = _steps(view, read.layer)
    if steps:
        out.append(("How it gets there", f"In layer {read.layer:.0f} {_listed(steps)}."))
    sure = [f"{span(read)}, {read.n} prompts" if span(read) else f"{read.n} prompts"]
    strengths = [_strength(other) for other in views]
    if len(views) > 1:
        sure.append(f"{percent(min(strengths))} to {percent(max(strengths))} in {len(views)} corruptions")
    if accuracy:
        sure.append(f"unpatched right in {percent(accuracy['accuracy'])}")
    sure += [each.told.sure for each in found if each.told.sure]
    return [*out, ("How sure", "; ".join(sure) + ".")]


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def says(view: View, mark: Mark) -> str:
    """A mark in words, for a reader who points at it."""
    start, end, layer = name_of(view, mark.start), name_of(view, mark.end), f"{mark.layer:.0f}"
    turns = f"patching it turns {percent(mark.value)} of the answer"
    if mark.kind == Kind.READS:
        return f"Layer {layer} reads {end}; {turns}."
    if mark.kind == Kind.MOVES:
        where = f"takes from {start} at {end}" if mark.start != mark.end else f"takes from {end} itself"
        return f"Slice {mark.start - mark.end} of the convolution of layer {layer} {where}; {turns}."
    if mark.kind == Kind.CARRIES:
        return f"The state of layer {layer} after {end} carries it; {turns}."
    if mark.kind == Kind.WRITES:
        return f"Layer {layer} writes at {end}; {turns}."
    return f"Kept edge from {_node(mark.source)} to {_node(mark.target)} at {end}: score {mark.value:z.3f}."


def _node(node: str) -> str:
    return node if node in ("embed", "output") else f"layer {node.replace('.', ' ')}"


def panel_of(view: View, mark: Mark) -> dict[str, Any]:
    """What the side panel says of a mark: in words, its number with the interval, and what else is in its layer."""
    number = f"{'Score' if mark.kind == Kind.EDGE else 'Effect'} {mark.value:z.3f}"
    if not pd.isna(mark.low):
        number += f" (95 % interval {mark.low:z.3f} to {mark.high:z.3f})"
    near = sorted(
        (other for other in view.marks if other.layer == mark.layer and other != mark), key=lambda each: each.kind
    )
    parts = [says(view, other) for other in near if other.kind != Kind.EDGE or other.end == mark.end]
    return {
        "says": says(view, mark),
        "number": f"{number}, {mark.n} prompts.",
        "parts": parts[:PARTS],
        "section": mark.section,
        "label": view.tokens[mark.end].label,
    }
