"""Which layers can a model do without? Each removed alone, then as many as possible, one after the other.

Nothing in it is particular to Mamba: it works on any causal language model whose blocks add to a residual stream and
stand in one of the lists of BLOCK_LISTS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import altair as alt
import nnsight
import pandas as pd
import torch
from torch import Tensor

from ioi_mamba.charts import drawing
from ioi_mamba.errors import InputError
from ioi_mamba.experiments.experiment import Column, Context, Experiment, share_of
from ioi_mamba.experiments.needs import Need
from ioi_mamba.experiments.options import option
from ioi_mamba.model.families import FAMILIES
from ioi_mamba.model.jobs import conduct, device_of, each_chunk
from ioi_mamba.passes import metrics
from ioi_mamba.passes.intervals import share_ends
from ioi_mamba.passes.metrics import reaches
from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import Pairs

MODES = ("none", "single", "greedy")
COLUMNS = (
    Column("mode", "text", "none: nothing removed; single: one layer; greedy: one more a step"),
    Column("step", "int", "layers removed"),
    Column("layer", "int", "the layer removed at this step; empty for none", nullable=True),
    Column("accuracy", "float", "share of prompts whose answer has the largest logit of the candidates, 0..1"),
    Column("probability", "float", "mean probability of the answer among the candidates, 0..1"),
    Column("n", "int", "prompts"),
    Column("valid_accuracy", "float", "the accuracy on held-out prompts", nullable=True),
    Column("low", "float", "lower end of the 95 % interval of the accuracy, by cluster", later=True),
    Column("high", "float", "upper end of the same interval", later=True),
)

# Where the list of blocks is: of the families that are known, GPT-2, Llama-like (and Jamba, Bamba), GPT-NeoX.
BLOCK_LISTS = (
    *dict.fromkeys(family.tree.blocks for family in FAMILIES.values()),
    "transformer.h",
    "model.layers",
    "gpt_neox.layers",
)

# The published figure's sample is unknown, the published notebook's is 10 pairs; 40 give half its error.
DEFAULT_PAIRS = 40
SPARE = 0.03
"""The accuracy that layers may cost and still count as spare."""


@dataclass(frozen=True)
class Options:
    """Options of layer-removal."""

    steps: int | None = option(None, "greedy steps, at most; none: all layers but one", at_least=1)
    rows: int = option(128, "prompts times candidate layers in one pass", at_least=1)


def default_pairs(tokenizer, n_pairs: int | None, seed: int) -> Pairs:
    """Four templates, five corruptions, both directions: `n_pairs` pairs give twice as many prompts.

    n_pairs None: 40. The paper's notebook has 10.
    """
    return ioi.generate(tokenizer, DEFAULT_PAIRS if n_pairs is None else n_pairs, seed, symmetric=True)


def run(context: Context) -> pd.DataFrame:
    """One row a measurement; without held-out prompts `valid_accuracy` is empty.

    Raises InputError for a model whose list of blocks is not known.
    """
    model, pairs, held_out, options = context.model, context.pairs, context.held_out, context.options
    places = (_block_list(model), _output_head(model))
    n_layers = len(model._module.get_submodule(places[0]))
    steps = min(n_layers - 1, options.steps or n_layers)
    prompts = [None if side is None else side.without_text() for side in (pairs, held_out)]
    measured = conduct(model, _removal, *prompts, places, n_layers, steps, options.rows, progress=context.progress)
    lows, highs = share_ends(measured[:, 3], measured[:, 5], pairs.clusters)
    table = []
    for row, low, high in zip(measured.tolist(), lows.tolist(), highs.tolist(), strict=True):
        mode, step, layer, accuracy, probability, _, valid_accuracy = row
        valid = None if math.isnan(valid_accuracy) else valid_accuracy
        which = None if layer < 0 else int(layer)
        table.append((MODES[int(mode)], int(step), which, accuracy, probability, len(pairs), valid, low, high))
    return pd.DataFrame(table, columns=[column.name for column in COLUMNS]).astype(
        {"layer": "Int64", "valid_accuracy": "Float64"}
    )


def _removal(
    model,
    pairs: Pairs,
    held_out: Pairs | None,
    places: tuple[str, str],
    n_layers: int,
    steps: int,
    rows: int,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Float64[measurement, 7]: index in MODES, step, layer or -1, accuracy, probability, variance, held-out accuracy or NaN.

    variance: of the accuracy, by cluster.
    places: paths of the list of blocks and of the output head, found where the model's modules can be seen.
    """
    total = 1 + n_layers + sum(n_layers - step for step in range(1, steps)) + (steps + 1 if held_out is not None else 0)
    done = 0

    def measure(removed: Sequence[frozenset[int]], prompts: Pairs) -> list[tuple[float, float, float]]:
        nonlocal done
        batches = _batches(removed, max(1, rows // len(prompts)))
        chunks = [(prompts, places, n_layers, batch, rows) for batch in batches]
        found = each_chunk(
            model, _scores, chunks, progress=share_of(progress, done / total, (done + len(removed)) / total)
        )
        done += len(removed)
        return [score for scores in found for score in scores]

    def valid(removed: frozenset[int]) -> float:
        return float("nan") if held_out is None else measure([removed], held_out)[0][0]

    none = frozenset()
    table = [(0, 0, -1, *measure([none], pairs)[0], valid(none))]
    left = list(range(n_layers))
    scores = measure([frozenset([layer]) for layer in left], pairs)
    table += [(1, 1, layer, *score, float("nan")) for layer, score in zip(left, scores, strict=True)]
    removed = none
    for step in range(1, steps + 1):
        if step > 1:
            scores = measure([removed | {layer} for layer in left], pairs)
        # max keeps the first of equals, which is the lowest layer.
        best = max(range(len(left)), key=lambda k, scores=scores: scores[k][:2])
        removed |= {left[best]}
        table.append((2, step, left[best], *scores[best], valid(removed)))
        del left[best]
    return torch.tensor(table, dtype=torch.float64)


def chart(table: pd.DataFrame) -> alt.HConcatChart:
    """Probability without each layer against that of the whole model, beside the greedy curve."""
    none = table.query("mode == 'none'").iloc[0]
    singles = drawing.bars_with_baseline(
        table.query("mode == 'single'"),
        x="layer",
        y="probability",
        baseline=float(none["probability"]),
        baseline_label="no layer removed",
        x_title="layer removed",
        y_title="probability of the answer",
        title="One layer removed",
        tooltip=("layer", "probability", "accuracy", "n"),
        width=drawing.HALF,
    )
    removal = table.query("mode != 'single'")
    curves = removal.melt(
        ["step", "layer", "n"], ["accuracy", "valid_accuracy"], var_name="prompts", value_name="value"
    ).dropna(subset="value")
    curves["prompts"] = curves["prompts"].replace({"accuracy": "train", "valid_accuracy": "held-out"})
    greedy = drawing.line_with_points(
        curves,
        x="step",
        y="value",
        color="prompts",
        x_title="layers removed, greedily",
        y_title="accuracy among the candidates",
        title="As many as possible removed",
        tooltip=("step", "layer", "value", "prompts", "n"),
        width=drawing.HALF,
    )
    return alt.hconcat(singles, greedy, spacing=36).resolve_legend(color="independent", shape="independent")


def findings(table: pd.DataFrame) -> list[str]:
    """What the table says: the layers that matter most, and how many can go."""
    none = table.query("mode == 'none'").iloc[0]
    single = table.query("mode == 'single'").sort_values(["probability", "layer"])
    greedy = table.query("mode == 'greedy'").sort_values("step")
    worst = single.iloc[0]
    # A table of an earlier version has no intervals.
    interval = f"{none['low']:.3f} to {none['high']:.3f}, " if "low" in none else ""
    left = f" ({worst['low']:.2f} to {worst['high']:.2f})" if "low" in none else ""
    found = [
        f"Removing layer {worst['layer']} costs most: accuracy {worst['accuracy']:.2f}{left} in place of {none['accuracy']:.2f}.",
        f"With every layer in place the answer has probability {none['probability']:.2f} and accuracy "
        f"{none['accuracy']:.2f} ({interval}{none['n']} prompts); without layer {worst['layer']} probability "
        f"{worst['probability']:.2f}.",
    ]
    if len(single) > 1:
        second = single.iloc[1]
        found.append(f"Next comes layer {second['layer']}, with probability {second['probability']:.2f}.")
    harmless = sum(reaches(value, none["accuracy"] - SPARE) for value in single["accuracy"])
    found.append(
        f"{harmless} of {len(single)} layers can be removed alone with at most 0.03 of accuracy lost; "
        + _spare(greedy, "accuracy", none["accuracy"], len(single), "train")
    )
    if bool(greedy["valid_accuracy"].notna().any()):
        held = _spare(greedy, "valid_accuracy", none["valid_accuracy"], len(single), "held-out")
        found.append(held[0].upper() + held[1:])
    return found


def _spare(greedy: pd.DataFrame, column: str, whole: float, n_layers: int, prompts: str) -> str:
    """How many greedy steps in a row keep the accuracy within 0.03 of the whole model's."""
    kept = len(list(takewhile(lambda value: reaches(value, whole - SPARE), greedy[column])))
    return f"greedily, {kept} of {n_layers} can go together by the same measure on {prompts} prompts."


def _block_list(model) -> str:
    """Where the model keeps its blocks."""
    for path in BLOCK_LISTS:
        try:
            model._module.get_submodule(path)
        except AttributeError:
            continue
        return path
    raise InputError(
        f"{type(model._module).__name__} keeps its layers at none of {', '.join(BLOCK_LISTS)}: "
        "layer-removal needs a model that does."
    )


def _output_head(model) -> str:
    """Where the module is that makes logits of the last residual stream, whatever the architecture calls it."""
    head = model._module.get_output_embeddings()
    for path, module in model._module.named_modules():
        if module is head:
            return path
    raise InputError(f"{type(model._module).__name__} has no output head: layer-removal needs a language model.")


def _batches(items: Sequence[frozenset[int]], size: int) -> list[Sequence[frozenset[int]]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _scores(
    model,
    pairs: Pairs,
    places: tuple[str, str],
    n_layers: int,
    removed: Sequence[frozenset[int]],
    rows: int,
    *,
    progress=None,
) -> list[tuple[float, float, float]]:
    """(accuracy, probability, variance) of each set of removed layers; sets times prompts are rows of few passes."""
    candidates, clusters = pairs.choices, pairs.clusters
    accuracy, probability = [], []
    for part in torch.arange(len(pairs)).split(rows):
        without = torch.zeros(len(removed), n_layers, dtype=torch.bool)
        for row, layers in enumerate(removed):
            without[row, list(layers)] = True
        tokens = pairs.clean[part].repeat(len(removed), 1)
        logits = _last_logits(
            model, places, tokens, pairs.read_at[part].repeat(len(removed), 1), without.repeat_interleave(len(part), 0)
        )
        logits = pairs[part].scores(logits.unflatten(0, (len(removed), -1))).float().cpu()
        accuracy.append(metrics.accuracy(logits, pairs.answer[part], candidates[part]))
        probability.append(metrics.relative_probability(logits, pairs.answer[part], candidates[part]))
    pairs.check_finite("probabilities", torch.cat(probability, 1))
    right = torch.cat(accuracy, 1)
    columns = right.double().mean(1), torch.cat(probability, 1).double().mean(1)
    variance = metrics.clustered_variance(right, clusters)
    return list(zip(*(column.tolist() for column in (*columns, variance)), strict=True))


def _last_logits(model, places: tuple[str, str], tokens: Tensor, read_at: Tensor, without: Tensor) -> Tensor:
    """Logits [row, k, vocab] at `read_at`, with the layers of `without` [row, layer] passing their input on."""
    blocks, head = (model.get(path) for path in places)
    touched = without.any(0).nonzero().flatten().tolist()
    # A layer that no row keeps need not run at all, unless its block gives more than the stream (Bamba's do).
    needless = set(without.all(0).nonzero().flatten().tolist()) if places[0] == BLOCK_LISTS[0] else set()
    tokens, read_at, without = (tensor.to(device_of(model)) for tensor in (tokens, read_at, without))
    with torch.no_grad(), model.trace(tokens, use_cache=False):
        for layer in touched:
            before = blocks[layer].input
            if layer in needless:
                blocks[layer].skip(before)
            else:
                after = blocks[layer].output
                stream = after[0] if isinstance(after, tuple) else after
                kept = torch.where(without[:, layer, None, None], before, stream)
                blocks[layer].output = (kept, *after[1:]) if isinstance(after, tuple) else kept
        final = head.input
        head.input = final[torch.arange(len(final), device=final.device)[:, None], read_at]
        logits = nnsight.save(head.output)
    return logits


EXPERIMENT = Experiment(
    name="layer-removal",
    title="Layer removal",
    paper="4.1.2, Fig 5",
    question="Which layers can go?",
    look_for=(
        "Bars far below the dashed line are layers the task cannot spare. In the second chart, how long the "
        "curve stays high says how many layers are spare; a gap between train and held-out says that the choice "
        "was fitted to the prompts."
    ),
    method=(
        "A removed layer passes its input on: its out_proj is set to 0 and the residual stream skips it.\n"
        "Probability: softmax over the candidates of the prompt pair alone, at the answer, mean over prompts; "
        "accuracy: the answer has the largest logit of these.\n"
        "Greedy: the layer that leaves the highest train accuracy goes next (ties: the higher probability, then "
        "the lower index); held-out prompts come from the next seed."
    ),
    needs=frozenset({Need.ABLE, Need.HELD_OUT}),
    options=Options,
    columns=COLUMNS,
    draws={ioi.TASK.name: default_pairs},
    most_pairs=DEFAULT_PAIRS,
    run=run,
    chart=chart,
    findings=findings,
)
