"""The model card of `mini`: what it is, how it was made, and what was measured."""

from __future__ import annotations

from ioi_mamba.mini import measure, wordings
from ioi_mamba.mini.corpus import HELD_OUT_NAMES, HELD_OUT_OBJECTS, HELD_OUT_SEED, SOURCES, TRAIN_SEED, vocabulary
from ioi_mamba.mini.model import Recipe, Trained
from ioi_mamba.mini.wordings import Forms

CARD = """---
license: mit
library_name: transformers
tags: [mamba, interpretability, indirect-object-identification]
---
# mini

A small trained Mamba on which the analyses of this package run in minutes. It exists to be taken apart: it
does indirect object identification with three names, on the very prompts of the mamba-370m IOI paper (arXiv
2407.14008), among other tasks about the same names, and is built of the same parts as that model.

**What it is not.** It is not a language model: it has read nothing but short made-up documents of {words}
words, and how it continues other text means nothing. No figure of it is one of mamba-370m, and its circuits
say nothing about those of a model that was trained on natural text.

## Size
{layers} layers, hidden size {hidden}, {inner} channels with {state} state columns each, convolutions of
{conv} tokens, {vocab} vocabulary entries (embedding and unembedding tied), {parameters:,} parameters in
float32, {megabytes:.1f} MB. `AutoModelForCausalLM` and `AutoTokenizer` of `transformers` load the directory
as it is.

The tokenizer keeps the words of the training documents whole, with all 203 names of the paper. Other names of the
documents are two tokens each, a year is its century and the two digits after it, and other text falls into bytes. The
paper's prompts have the token boundaries they have in GPT-NeoX (`After|wards`, `Fri|ends`). No BOS is added: prepend
id 0.

## Training
`python -m ioi_mamba.mini.train --seed {seed} --steps {steps}` made it in {minutes:.0f} minutes: {steps} steps of
{batch} documents, AdamW, learning rate {rate:g}, weight decay {decay:g}, answers weighted {weight:g} to 1. While
training, a layer does nothing for a document with probability {drop:g}.

Two runs on one machine give the same bytes, with any number of `--workers`. On another processor the weights differ in
the last digits after the first step and end as another model of the same recipe: its accuracies are to be expected
again, its edges and layers need not be.

The mixture of documents is the same from the first step to the last:

{shares}

Prompts of the published data sets of the seeds {train_seed} and {held_out_seed}, and the clean prompts of
greater-than, occur in no training document (those of the steering set were not looked for).

{curve}

## What it knows
Prompts of seed {held_out_seed}, both of each pair. Among names: the answer has the largest logit of the three
or four names of its pair (two or three in the last row). Of all tokens: the largest of all {vocab}.

{figures}

Documents drawn anew. Right: the answer is likelier than every other word of its kind that the document has named.
Held-out frames are whole wordings that no training document has; two-token names, and objects with them, are
combinations that none has. Greater-than in the published form: a later year is likelier than an earlier one.

{answers}

## What there is to take apart
{structure}

## What is asked of it
`python -m ioi_mamba.mini.measure` prints these again.

{judgement}

## Held out
Wordings, as format strings:

{forms}

Names: {names}.

Objects: {objects}.
"""


def share_table() -> str:
    """What share of the documents each source is, as a Markdown table."""
    return "\n".join(["| documents | share |", "|---|---|", *(f"| {n} | {s.share:.0%} |" for n, s in SOURCES.items())])


def curve_table(trained: Trained, points: int = 10) -> str:
    """Loss and share of right answers along the training, means over the steps since the point before."""
    rows = ["| until step | loss | answers right, in training |", "|---|---|---|"]
    size = max(1, len(trained.losses) // points)
    for end in range(size, len(trained.losses) + 1, size):
        loss, right = (sum(values[end - size : end]) / size for values in (trained.losses, trained.right))
        rows.append(f"| {end} | {loss:.3f} | {right:.3f} |")
    return "\n".join(rows)


def held_out_forms() -> list[str]:
    """Every held-out wording."""
    named = [value for name, value in vars(wordings).items() if name.isupper()]
    forms = [value for value in named if isinstance(value, Forms)]
    forms += [value for relation in wordings.RELATIONS.values() for value in relation if isinstance(value, Forms)]
    return [form for each in forms for form in each.held_out]


def card(recipe: Recipe, trained: Trained, measured: measure.Measured) -> str:
    """The card as Markdown."""
    config = trained.model.config
    parameters = trained.model.num_parameters()
    return CARD.format(
        words=len({entry.strip() for entry in vocabulary()}),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        state=config.state_size,
        conv=config.conv_kernel,
        vocab=config.vocab_size,
        parameters=parameters,
        megabytes=4 * parameters / 1e6,
        seed=recipe.seed,
        steps=recipe.steps,
        minutes=trained.seconds / 60,
        batch=recipe.batch,
        rate=recipe.learning_rate,
        decay=recipe.weight_decay,
        weight=recipe.answer_weight,
        drop=recipe.layer_drop,
        shares=share_table(),
        train_seed=TRAIN_SEED,
        held_out_seed=HELD_OUT_SEED,
        curve=curve_table(trained),
        figures=measure.figure_table(measured.figures),
        answers=measure.answer_table(measured.answers),
        structure=measure.structure_text(measured.structure),
        judgement=measure.judgement_table(measure.judged(measured)),
        forms="\n".join(f"* `{form}`" for form in held_out_forms()),
        names=", ".join(HELD_OUT_NAMES),
        objects=", ".join(HELD_OUT_OBJECTS),
    )
