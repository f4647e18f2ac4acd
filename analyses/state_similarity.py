"""What does the hidden state keep? Cosine similarity of each token's contribution with every state after it.

At one layer a token i adds B_bar_i x_i to the state (equation 5). If that direction is still to be seen in the states
of all later tokens, the state keeps what the token brought: a line in the chart. The paper finds the lines one token
after the names, which is where the convolution has moved them; with names of several tokens, after their first.

Where the paper and its code disagree: the caption of figure 7 puts contributions on x, figure and code put them on y,
as here. The text names B_bar_i x_i against h_j, taken for the figure; the code also makes the three other measures.
Cells left of the diagonal (j < i), states that were there before the contribution, are computed as in the code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import altair as alt
import pandas as pd
import torch
from torch import Tensor

from ioi_mamba.charts import drawing
from ioi_mamba.errors import InputError
from ioi_mamba.experiments.experiment import Column, Context, Experiment
from ioi_mamba.experiments.needs import Need
from ioi_mamba.experiments.options import option
from ioi_mamba.model.families import family_of
from ioi_mamba.model.jobs import each_chunk
from ioi_mamba.passes.forward import forward
from ioi_mamba.steering.bottleneck import find_layer
from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import ABSENT, Pairs
from ioi_mamba.tasks.prompts import find_roles, is_name, read

CONTRIBUTION_STATE = "contribution in state"
DECAYED_STATE = "decayed contribution in state"
CONTRIBUTIONS = "contribution with contribution"
STATES = "state with state"
MEASURES = (CONTRIBUTION_STATE, DECAYED_STATE, CONTRIBUTIONS, STATES)

DEFAULT_PAIRS = 3
COLUMNS = (
    Column("prompt", "text", "the prompt"),
    Column("measure", "text", "which two vectors are compared"),
    Column("row", "int", "token index of the first"),
    Column("column", "int", "token index of the second"),
    Column("similarity", "float", "cosine of the two, flattened, -1..1"),
    Column("row_label", "text", "the token of the first"),
    Column("column_label", "text", "the token of the second"),
    Column("after_name", "bool", "the row is one token after (the first token of) a name"),
    Column("layer", "int", "the layer"),
)


@dataclass(frozen=True)
class Options:
    """Options of state-similarity."""

    layer: int | None = option(None, "the layer; none: the bottleneck, found as layer-ablation does", at_least=0)
    prompt: str | None = option(None, "a prompt in place of those of the pairs")
    names: Sequence[str] = option((), "the names in that prompt, of any number of tokens")


def default_pairs(tokenizer, n_pairs: int | None, seed: int) -> Pairs:
    """The first prompts of the paper's steering set, without swapped copies; its notebook has the first of them.

    n_pairs None: 3, as many as figure 7 shows.
    """
    return ioi.generate(tokenizer, DEFAULT_PAIRS if n_pairs is None else n_pairs, seed, symmetric=False)


def run(context: Context) -> pd.DataFrame:
    """One row for each prompt, measure, row i and column j.

    The prompts are the clean ones of the pairs, or `prompt` alone. Raises InputError for a layer out of range and an
    empty prompt.
    """
    model, pairs, options = context.model, context.pairs, context.options
    layer = find_layer(model, pairs) if options.layer is None else options.layer
    if options.prompt is None:
        prompts = _of_pairs(model.tokenizer, pairs)
    else:
        prompts = [_of_text(model.tokenizer, options.prompt, options.names)]
    similarities = each_chunk(
        model, _similarities, [(tokens, layer) for _, tokens, _ in prompts], progress=context.progress
    )
    tables = []
    for (text, tokens, after), matrices in zip(prompts, similarities, strict=True):
        if not bool(torch.isfinite(matrices).all()):
            raise InputError(
                f"The states of the prompt {text[:200]!r} are not finite: look at the dtype, or leave it out."
            )
        labels = [model.tokenizer.decode([token]) for token in tokens.tolist()]
        for measure, matrix in zip(MEASURES, matrices, strict=True):
            row, column = torch.meshgrid(*[torch.arange(len(tokens))] * 2, indexing="ij")
            tables.append(
                pd.DataFrame(
                    {
                        "prompt": text,
                        "measure": measure,
                        "row": row.flatten().numpy(),
                        "column": column.flatten().numpy(),
                        "similarity": matrix.flatten().double().numpy(),
                        "row_label": [labels[i] for i in row.flatten()],
                        "column_label": [labels[j] for j in column.flatten()],
                        "after_name": [int(i) in after for i in row.flatten()],
                        "layer": layer,
                    }
                )
            )
    return pd.concat(tables, ignore_index=True)


def chart(table: pd.DataFrame) -> alt.ConcatChart:
    """The figure's measure for each of three prompts, as far as 5,000 cells go.

    Of a prompt that has more by itself, the rows with the strongest similarities are drawn.
    """
    return _panels(table, [(prompt, CONTRIBUTION_STATE) for prompt in dict.fromkeys(table["prompt"])][:3])


def more(table: pd.DataFrame) -> dict[str, alt.TopLevelMixin]:
    """The other three measures, for the first prompt."""
    first = table["prompt"].iloc[0]
    return {"Other measures": _panels(table, [(first, measure) for measure in MEASURES[1:]])}


def _panels(table: pd.DataFrame, panels: Sequence[tuple[str, str]]) -> alt.ConcatChart:
    drawn, cells = [], 0
    for prompt, measure in panels:
        part = table[(table["prompt"] == prompt) & (table["measure"] == measure)]
        cells += len(part)
        if cells > drawing.MAX_ROWS and drawn:
            break
        drawn.append(_panel(drawing.strongest(part, "similarity", by="row"), prompt, measure))
    return alt.concat(*drawn, columns=3, spacing=12).resolve_scale(x="independent", y="independent")


def _panel(part: pd.DataFrame, prompt: str, measure: str) -> alt.FacetChart | alt.LayerChart:
    part = part.assign(
        _row=[f"{i} {label.strip() or label!r}" for i, label in zip(part["row"], part["row_label"], strict=True)],
        _column=[
            f"{j} {label.strip() or label!r}" for j, label in zip(part["column"], part["column_label"], strict=True)
        ],
    )
    y, x = {
        CONTRIBUTION_STATE: ("contribution of token", "state after token"),
        DECAYED_STATE: ("contribution of token", "state after token"),
        CONTRIBUTIONS: ("contribution of token", "contribution of token"),
        STATES: ("state after token", "state after token"),
    }[measure]
    heading = alt.Title(f"{measure[0].upper()}{measure[1:]}", subtitle=_wrapped(prompt))
    return drawing.matrix_heatmap(
        part,
        x="_column",
        y="_row",
        color="similarity",
        x_title=x,
        y_title=y,
        color_title="cosine similarity",
        domain=(-1.0, 1.0),
        cell=12,
        tooltip=("row_label", "column_label"),
    ).properties(title=heading)


def _wrapped(text: str, width: int = 48) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines[:3]


def lines(table: pd.DataFrame, measure: str = CONTRIBUTION_STATE) -> pd.DataFrame:
    """The mean similarity of each row with the later columns (j > i): prompt, row, row_label, after_name, mean.

    The strongest come first, prompt by prompt. Rows with fewer than three later columns are left out: there is no
    line to see.
    """
    part = table[(table["measure"] == measure) & (table["column"] > table["row"])]
    means = part.groupby(["prompt", "row", "row_label", "after_name"], sort=False)["similarity"].agg(["mean", "size"])
    means = means[means["size"] >= 3].reset_index().drop(columns="size")
    place = {prompt: k for k, prompt in enumerate(dict.fromkeys(table["prompt"]))}
    order = means.assign(_place=means["prompt"].map(place)).sort_values(
        ["_place", "mean"], ascending=[True, False], kind="stable"
    )
    return order.drop(columns="_place").reset_index(drop=True)


def findings(table: pd.DataFrame) -> list[str]:
    """How many of the strongest rows are one token after a name, over all prompts, and those of the first prompt."""
    found = [f"Layer {table['layer'].iloc[0]}, similarity of a contribution with the later states, mean over these."]
    n_top, n_after, first = 0, 0, ""
    by_prompt = lines(table).groupby("prompt", sort=False)
    for prompt, rows in by_prompt:
        n_names = int(rows["after_name"].sum())
        top = rows.head(max(3, n_names))
        if n_names:
            n_top, n_after = n_top + n_names, n_after + int(top["after_name"].head(n_names).sum())
        if not first:
            named = ", ".join(f"{row.row} {row.row_label!r} ({row.mean:.2f})" for row in top.itertuples())
            first = f'In "{prompt}" the strongest rows are {named}.'
    found.append(first)
    if n_top:
        n = len(by_prompt)
        found.insert(
            0,
            f"Layer {table['layer'].iloc[0]}: {n_after} of the {n_top} strongest rows are one token after a name ({n} prompt{'' if n == 1 else 's'}).",
        )
    return found


def _of_pairs(tokenizer, pairs: Pairs) -> list[tuple[str, Tensor, set[int]]]:
    """(text, tokens, positions one after a name) of each clean prompt."""
    prompts = []
    for row in range(len(pairs)):
        tokens = pairs.clean[row, : int(pairs.last[row]) + 1].cpu()
        text = tokenizer.decode(tokens[1:]) if pairs.texts is None else pairs.texts[row][0]
        at = [int(indices[row]) for role, indices in pairs.roles.items() if is_name(role)]
        prompts.append((text, tokens, {index + 1 for index in at if index != ABSENT}))
    return prompts


def _of_text(tokenizer, text: str, names: Sequence[str]) -> tuple[str, Tensor, set[int]]:
    if not text.strip():
        raise InputError("The prompt is empty; give a text.")
    (prompt,) = read(tokenizer, [text])
    roles = find_roles(prompt, names or ioi.NAMES)
    return prompt.text, torch.tensor(prompt.tokens), {index + 1 for role, index in roles.items() if is_name(role)}


def _similarities(model, tokens: Tensor, layer: int, *, progress=None) -> Tensor:
    """Of one prompt [pos], Float32[measure, pos, pos] in the order of MEASURES."""
    sites = [f"blocks.{layer}.hook_{site}" for site in ("ssm_input", "A_bar", "B_bar", "h")]
    with torch.no_grad():
        read = forward(model, tokens[None], reads=sites, logits_at=tokens[None, :0])
        x, decay, B_bar, h = (read[site][0].float() for site in sites)
        terms = family_of(model).mixer.recurrence_terms(decay, B_bar, x)
        decay, added = (term.expand_as(h).flatten(1) for term in terms)
        h = h.flatten(1)
        faded = cosines(added, h)
        remaining = added.clone()
        for j in range(1, len(tokens)):
            # What is left after token j of every contribution made before it.
            remaining[:j] *= decay[j]
            faded[:j, j] = cosines(remaining[:j], h[j : j + 1])[:, 0]
        return torch.stack((cosines(added, h), faded, cosines(added, added), cosines(h, h))).cpu()


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Float[i, j], the cosine of a[i] and b[j] (Float[row, dim]); a norm of 0 counts as 1."""
    a_norm, b_norm = (torch.where(norm == 0, 1.0, norm) for norm in (a.norm(dim=1), b.norm(dim=1)))
    return (a @ b.T) / a_norm[:, None] / b_norm


EXPERIMENT = Experiment(
    name="state-similarity",
    title="State similarity",
    paper="4.2, Fig 7",
    question="Which tokens stay visible in the state?",
    look_for=(
        "A row that stays coloured from the diagonal to the right edge: what that token contributed is kept. If the "
        "lines are one token after a word, the layer takes that word in there."
    ),
    method=(
        "Contribution of token i: B_bar_i x_i [E, N]; state after token j: h_j [E, N].\n"
        "Cosine of the two, flattened; decayed: B_bar_i x_i times the product of A_bar_t over i < t <= j.\n"
        "A vector of zeros has similarity 0 with everything (its norm is taken as 1)."
    ),
    # What a state holds is so whatever the model answers.
    needs=frozenset({Need.SITES, Need.LAYER}),
    options=Options,
    columns=COLUMNS,
    draws={ioi.TASK.name: default_pairs},
    most_pairs=DEFAULT_PAIRS,
    run=run,
    chart=chart,
    findings=findings,
    more=more,
)
