"""Measure a model like `mini`: what it knows, and whether it is worth taking apart.

    python -m ioi_mamba.mini.measure [--model DIR] [--documents N]

Prints every number that an embedded model is judged by, beside its bound, and ends with 1 where one is missed. What it
knows: the published prompts, by template and corruption; the answers of documents of every source, with wordings that
no training document has, and with names and objects of two tokens in new combinations; greater-than. What there is to
take apart: the circuit of edges that EAP-IG finds, the greedy cross-talk circuits, and the layers that cannot go.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaForCausalLM, PreTrainedTokenizerFast

from ioi_mamba import metrics
from ioi_mamba.errors import InputError
from ioi_mamba.mini import DIRECTORY, corpus
from ioi_mamba.mini.corpus import FRAMES, HELD_OUT_SEED, SOURCES, TRAIN_SEED, WORDS_OF_TWO
from ioi_mamba.mini.model import logits
from ioi_mamba.tasks import greater_than, ioi
from ioi_mamba.tasks.base import Pairs

AMONG_NAMES, OF_ALL_TOKENS, FRAME_ACCURACY, LONG_NAME_ACCURACY, YEAR_ACCURACY = 0.99, 0.97, 0.95, 0.9, 0.75
"""Lowest accuracies; that of greater-than is half way between guessing and 1, where its experiments begin to mean something."""

EDGES, EDGE_LAYERS, CROSS_TALK_LAYERS, LAYERS_THAT_MATTER, MATTERS = 10, 4, 2.0, 3, 0.03
"""Fewest edges and layers of the EAP-IG circuit at 85 % accuracy, fewest layers of a cross-talk circuit on average,
fewest layers whose removal costs more than MATTERS of accuracy."""

KINDS = {"held-out frames": (FRAMES,), "two-token names": (WORDS_OF_TWO,), "known frames": ()}
DOCUMENTS, ROWS = 400, 256
"""Documents drawn of each source and kind; rows that go through the model at once."""


@dataclass(frozen=True)
class Figure:
    """How often the answer has the largest logit: among the names of its pair, and of all tokens."""

    template: str
    corruption: str
    prompts: int
    among_names: float
    of_all_tokens: float


@dataclass(frozen=True)
class Answered:
    """How many questions of the documents of a source have the right answer, among the words of its kind that the
    document has named.
    """

    source: str
    kind: str
    right: int
    questions: int

    @property
    def accuracy(self) -> float:
        return self.right / self.questions

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, Wilson's."""
        return metrics.wilson_interval(self.right, self.questions)


def published(model: MambaForCausalLM, sets: dict[tuple[str, str], Pairs]) -> list[Figure]:
    """The figures of `model` on each of `sets`."""
    figures = []
    for (template, corruption), pairs in sets.items():
        with torch.no_grad():
            last = logits(model, pairs.clean)[torch.arange(len(pairs)), pairs.last]
        among = metrics.accuracy(last, pairs.answer, pairs.choices)
        of_all = metrics.full_vocabulary_accuracy(last, pairs.answer)
        figures.append(Figure(template, corruption, len(pairs), among.mean().item(), of_all.mean().item()))
    return figures


def years(model: MambaForCausalLM, tokenizer: PreTrainedTokenizerFast, n_pairs: int = 200) -> Answered:
    """How often a later year has the larger logit of two, the other one earlier: what greater-than counts."""
    pairs = greater_than.generate(tokenizer, n_pairs, HELD_OUT_SEED)
    with torch.no_grad():
        last = logits(model, pairs.clean)[torch.arange(len(pairs)), pairs.last]
    right = metrics.accuracy(last, pairs.answer, pairs.choices)
    return Answered("years", "the published form", int(right.sum()), len(pairs))


def _questions(source: str, kind: str, n_documents: int) -> Iterator[tuple[str, str, list[str]]]:
    """Text up to an answer, the answer, and the words it is among, all with the space before them if there is one."""
    rng = random.Random(f"measure/{source}/{kind}")
    for _ in range(n_documents):
        text, choices = corpus.draw_document(rng, source, KINDS[kind])
        before = ""
        for piece, is_answer in corpus.split_answers(text):
            if is_answer:
                word, space = piece.strip(), piece[: len(piece) - len(piece.lstrip())]
                among = next(words for words in choices.values() if word in words)
                yield before, piece, [space + choice for choice in among]
            before += piece


def answered(
    model: MambaForCausalLM, tokenizer: PreTrainedTokenizerFast, source: str, kind: str, n_documents: int
) -> Answered:
    """How often the right answer is the likeliest of its choices, all of its tokens counted.

    kind: one of KINDS.
    """
    rows, owner, is_right = [], [], []
    for number, (before, answer, choices) in enumerate(_questions(source, kind, n_documents)):
        start = [0, *tokenizer(before).input_ids]
        for choice in choices:
            rows.append((start, tokenizer(choice).input_ids))
            owner.append(number)
            is_right.append(choice == answer)
    scores = torch.cat([_log_probabilities(model, rows[k : k + ROWS]) for k in range(0, len(rows), ROWS)])
    owners, rights = torch.tensor(owner), torch.tensor(is_right)
    best = torch.full((owner[-1] + 1,), -torch.inf).scatter_reduce(0, owners, scores, "amax")
    own = torch.zeros_like(best).scatter(0, owners[rights], scores[rights])
    return Answered(source, kind, int((own >= best).sum()), len(best))


def _log_probabilities(model: MambaForCausalLM, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    """log P of the second ids of each row after its first ones."""
    width = max(len(start) + len(end) for start, end in rows)
    tokens = torch.tensor([[*start, *end, *[0] * (width - len(start) - len(end))] for start, end in rows])
    with torch.no_grad():
        each = logits(model, tokens[:, :-1]).log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    at = torch.arange(1, width)
    first, end = (
        torch.tensor(ends)[:, None] for ends in zip(*((len(s), len(s) + len(e)) for s, e in rows), strict=True)
    )
    return torch.where((at >= first) & (at < end), each, 0).sum(1)


def knowledge(model: MambaForCausalLM, tokenizer: PreTrainedTokenizerFast, n_documents: int) -> list[Answered]:
    """Of every source and kind, the sources that have no held-out forms or names left out."""
    found = []
    for kind in KINDS:
        for source in SOURCES:
            nothing_held_out = (source == "published prompts" and kind == "held-out frames") or (
                source in ("agreement", "years") and kind == "two-token names"
            )
            if not nothing_held_out:
                found.append(answered(model, tokenizer, source, kind, n_documents))
    return [*found, years(model, tokenizer)]


@dataclass(frozen=True)
class Structure:
    """What there is to take apart, on published prompts.

    edges: of the EAP-IG circuit at 85 % accuracy, those on a path from embed to output; edge_layers: the layers they
    visit. cross_talk: the layers of the greedy circuit by (template, corruption), in the order they were given back.
    removal: accuracy without each layer alone, and `whole` with all.
    """

    edges: list[tuple[str, str]]
    edge_layers: list[int]
    cross_talk: dict[tuple[str, str], list[int]]
    removal: list[float]
    whole: float

    @property
    def mean_cross_talk(self) -> float:
        return sum(map(len, self.cross_talk.values())) / len(self.cross_talk)

    @property
    def different_corruptions(self) -> bool:
        """Whether some template has circuits of different layers for different corruptions."""
        by_template: dict[str, set[frozenset[int]]] = {}
        for (template, _), layers in self.cross_talk.items():
            by_template.setdefault(template, set()).add(frozenset(layers))
        return any(len(circuits) > 1 for circuits in by_template.values())

    @property
    def layers_that_matter(self) -> list[int]:
        return [layer for layer, accuracy in enumerate(self.removal) if accuracy < self.whole - MATTERS]


def structure(path: Path, n_pairs: int = 100) -> Structure:
    """The three experiments on the training seed of the published prompts. n_pairs: of the circuit of edges."""
    from analyses import cross_talk, layer_removal
    from ioi_mamba.attribution import attribute, ranked
    from ioi_mamba.evaluator import Evaluator
    from ioi_mamba.faithfulness import smallest
    from ioi_mamba.graph import universe_of
    from ioi_mamba.models import open_model

    model = open_model(str(path), device="cpu")
    pairs = ioi.generate(model.tokenizer, n_pairs, TRAIN_SEED, templates=ioi.ALIGNED_TEMPLATES)
    circuit, _ = smallest(Evaluator(model, pairs, universe_of(model)), ranked(attribute(model, pairs)), 0.85)
    edges = sorted((item.source, item.target) for item in circuit.pruned().items)
    layers = sorted({int(node) for edge in edges for node in edge if node not in ("embed", "output")})
    table = cross_talk.run(model, cross_talk.default_pairs(model.tokenizer, n_pairs // 2, TRAIN_SEED))
    groups = {
        key: [int(layer) for layer in rows[rows["chosen"] & rows["in_circuit"]].sort_values("step")["layer"]]
        for key, rows in table.groupby(["template", "corruption"], sort=False)
    }
    removed = layer_removal.run(model, layer_removal.default_pairs(model.tokenizer, None, TRAIN_SEED), steps=1)
    whole = float(removed.query("mode == 'none'")["accuracy"].iloc[0])
    singles = removed.query("mode == 'single'").sort_values("layer")["accuracy"].tolist()
    return Structure(edges, layers, groups, singles, whole)


@dataclass(frozen=True)
class Judged:
    """One number that is asked of a model, and what it is."""

    what: str
    value: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.value >= self.bound


@dataclass(frozen=True)
class Measured:
    """All that is measured of a model."""

    figures: list[Figure]
    answers: list[Answered]
    structure: Structure


def judged(measured: Measured) -> list[Judged]:
    """Every number that is asked of an embedded model."""
    figures, answers, found = measured.figures, measured.answers, measured.structure
    held = [each for each in answers if each.kind == "held-out frames"]
    long = [each for each in answers if each.kind == "two-token names"]
    by_years = next(each for each in answers if each.kind == "the published form")
    return [
        Judged("published prompts, lowest accuracy among names", min(f.among_names for f in figures), AMONG_NAMES),
        Judged(
            "published prompts, lowest accuracy of all tokens", min(f.of_all_tokens for f in figures), OF_ALL_TOKENS
        ),
        Judged("held-out frames, lowest source", min(each.accuracy for each in held), FRAME_ACCURACY),
        Judged("two-token names, lowest source", min(each.accuracy for each in long), LONG_NAME_ACCURACY),
        Judged("greater-than", by_years.accuracy, YEAR_ACCURACY),
        Judged("edges of the EAP-IG circuit at 85 %", len(found.edges), EDGES),
        Judged("layers of that circuit", len(found.edge_layers), EDGE_LAYERS),
        Judged("layers of a cross-talk circuit, mean", found.mean_cross_talk, CROSS_TALK_LAYERS),
        Judged("cross-talk circuits differ between corruptions (1: yes)", found.different_corruptions, 1),
        Judged("layers that cost more than 0.03 when removed", len(found.layers_that_matter), LAYERS_THAT_MATTER),
    ]


def figure_table(figures: list[Figure]) -> str:
    """The figures as a Markdown table."""
    rows = ["| template | corruption | prompts | among names | of all tokens |", "|---|---|---|---|---|"]
    for row in figures:
        rates = f"{row.among_names:.4f} | {row.of_all_tokens:.4f}"
        rows.append(f"| {row.template} | {row.corruption} | {row.prompts} | {rates} |")
    return "\n".join(rows)


def answer_table(answers: list[Answered]) -> str:
    """The accuracies by source as a Markdown table, with 95 % intervals."""
    rows = ["| documents | wordings and names | questions | right | 95 % |", "|---|---|---|---|---|"]
    for each in answers:
        low, high = each.interval
        rows.append(
            f"| {each.source} | {each.kind} | {each.questions} | {each.accuracy:.3f} | {low:.3f} to {high:.3f} |"
        )
    return "\n".join(rows)


def structure_text(found: Structure) -> str:
    """What there is to take apart, in Markdown."""
    edges = ", ".join(f"{source} → {target}" for source, target in found.edges)
    removal = ", ".join(f"{layer}: {accuracy:.2f}" for layer, accuracy in enumerate(found.removal))
    rows = ["| template | corruption | layers, in order |", "|---|---|---|"]
    rows += [f"| {t} | {c} | {', '.join(map(str, layers))} |" for (t, c), layers in found.cross_talk.items()]
    return (
        f"The EAP-IG circuit at 85 % accuracy has {len(found.edges)} edges on a path from embed to output: {edges}.\n\n"
        f"Accuracy without one layer (with all {found.whole:.2f}): {removal}.\n\n"
        "Greedy cross-talk circuits:\n\n" + "\n".join(rows)
    )


def judgement_table(rows: list[Judged]) -> str:
    """What is asked and what is found, as a Markdown table."""
    lines = ["| what | found | asked | |", "|---|---|---|---|"]
    lines += [f"| {r.what} | {r.value:.3f} | {r.bound:g} | {'holds' if r.holds else 'MISSED'} |" for r in rows]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line. 0: every bound holds; 1: one is missed; 2: bad input."""
    parser = argparse.ArgumentParser(prog="python -m ioi_mamba.mini.measure", description="Measure the embedded model.")
    parser.add_argument("--model", type=Path, default=DIRECTORY, help="directory of a checkpoint (the embedded one)")
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="of each source and kind (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.documents < 1:
            raise InputError(f"--documents is {options.documents}; give at least 1.")
        if not (options.model / "config.json").is_file():
            raise InputError(f"--model {options.model} has no config.json; give the directory of a checkpoint.")
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model).eval()
        figures = published(model, corpus.evaluation_sets(tokenizer, HELD_OUT_SEED))
        print(figure_table(figures), end="\n\n", flush=True)
        answers = knowledge(model, tokenizer, options.documents)
        print(answer_table(answers), end="\n\n", flush=True)
        found = structure(options.model)
        print(structure_text(found), end="\n\n")
        rows = judged(Measured(figures, answers, found))
        print(judgement_table(rows))
        return 0 if all(row.holds for row in rows) else 1
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
