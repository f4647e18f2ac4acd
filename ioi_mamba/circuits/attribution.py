"""Edge attribution patching: how much each edge or part matters, for all of them from a few backward passes.

For an edge i -> j, equation 12 multiplies the gradient of the metric at input_j with the change that patching would
bring, corrupted output_i - output_i, summed over D. EAP takes the gradient at the clean point; EAP-IG averages it
over `steps` points of the path on which every edge is patched by alpha = k / (steps - 1) (equation 13). The metric
is the normalized logit diff (appendix B, with abs), so a negative score means: patching the edge lowers the metric,
the edge matters. Scores are means over pairs of per-pair products; they do not depend on the batch size (the
published code scales them by one over the batch size).

Which variant to use:

| variant | the sum on the path | the difference | use it |
|---|---|---|---|
| "paper" | output_i of the same pass, gradients flow through it | corrupted - output_i of the same pass | to compare with the paper; best rank correlation with exact single-edge effects (0.94 on the oracle model) |
| "detached" | same, but gradients stop at output_i | as paper | when the scores themselves are read: no (1 - alpha) attenuation upstream |
| "clean-difference" | as paper | corrupted - clean output_i | textbook integrated gradients; ranks worst (0.71) |

With `parts`, conv slices, ssm and skip are scored in the same passes. A conv slice is linear in the conv input, so
its score is the gradient at the conv output times the change of the slice; ssm is the gradient at y times the change
that the corrupted states bring; skip the gradient at the gate branch times its change. In the "paper" variant the
path then interpolates the conv slices as well, as the published notebook does, so edge scores change a little.
"""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from ioi_mamba.circuits import gradients
from ioi_mamba.circuits.graph import Item, Universe, conv_parts, universe_of
from ioi_mamba.circuits.scoring import Evaluator, check_one_layout
from ioi_mamba.errors import InputError
from ioi_mamba.model.jobs import call
from ioi_mamba.model.memory import rows_per_pass
from ioi_mamba.passes.ranges import usable
from ioi_mamba.passes.sweep import Progress, pair_named
from ioi_mamba.tasks.base import Pairs

METHODS = ("eap", "eap-ig", "exact")
VARIANTS = ("paper", "detached", "clean-difference")

_Attributions = tuple[list[tuple[str, str, str | None]], Tensor]


def attribute(
    model,
    pairs: Pairs,
    *,
    method: str = "eap-ig",
    variant: str = "paper",
    steps: int = 5,
    positions: bool = False,
    parts: bool = False,
    per_pair: bool = False,
    pairs_per_pass: int | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Attribution of every edge (and part): columns source, target, position, part, score (and pair).

    method: "eap", the gradient at the clean point; "eap-ig", the mean over `steps` points of the path; or "exact",
    which needs no gradients: each item is patched alone, at many times the cost. variant: see the module's table. positions: one score a position, else summed (position is null). parts: score conv
    slices, ssm and skip too; an edge has a null part. per_pair: one row a pair instead of the mean over pairs, `pair`
    being its number among those given. Pairs without a range (`ranges`) have no score and are in no mean: the table's
    `attrs` says how many were `left_out`.
    pairs_per_pass: default what fits into 1 GiB, on an accelerator 8 GiB.
    Score: normalized logit diff per unit of patching; negative = patching lowers the metric.
    Raises InputError for an unknown method or variant, steps < 2 with eap-ig, scores that are not finite, pairs of
    which none has a range, and pairs of several layouts where their scores at positions would be averaged.
    """
    options = Options(method, variant, steps, positions, parts, per_pair, pairs_per_pass)
    _check(options)
    if positions and not per_pair:
        check_one_layout(pairs)
    found = usable(model, pairs)
    kinds, scores = attributions(model, found.pairs, options, progress)
    table = _to_frame(kinds, scores, positions, found.rows if per_pair else None)
    table.attrs = {"left_out": found.left_out}
    return table


class Options(NamedTuple):
    """How `attribute` is to score; fields as its arguments."""

    method: str = "eap-ig"
    variant: str = "paper"
    steps: int = 5
    positions: bool = False
    parts: bool = False
    per_pair: bool = True
    pairs_per_pass: int | None = None


def attributions(model, pairs: Pairs, options: Options, progress: Progress | None = None) -> _Attributions:
    """As `attribute`, of pairs that all have a range: (source, target, part) of every item, Float32[item, pos, pair].

    The axis of positions has length 1 without `positions`, that of pairs without `per_pair`.
    """
    method, variant, steps, positions, parts, per_pair, pairs_per_pass = options
    _check(options)
    if pairs_per_pass is None:
        kind = "part gradients" if parts else "gradients"
        pairs_per_pass = min(64, rows_per_pass(model, pairs.clean.shape[1], kind))
    universe = universe_of(model, parts=parts, n_positions=pairs.clean.shape[1] if positions else None)
    kinds = _kinds(universe)
    if method == "exact":
        places = range(pairs.clean.shape[1]) if positions else [None]
        items = [Item(source, target, p, part) for source, target, part in kinds for p in places]
        scores = Evaluator(model, pairs, universe).exact_effects(items, progress)
        scores = scores.view(len(kinds), len(places), -1)
        return kinds, scores if per_pair else scores.mean(-1, keepdim=True)
    if method == "eap":
        alphas, steps = [0.0], 1
    else:
        alphas = [k / (steps - 1) for k in range(steps)]
        # At alpha = 1 every sink sees the corrupted run and, undetached, only the output has a gradient. What is left
        # to add there is embed->output, which is zero where the last token is the same: then the step is not run.
        rows = torch.arange(len(pairs))
        same_last = bool((pairs.clean[rows, pairs.last] == pairs.corrupted[rows, pairs.last]).all())
        alphas = alphas[:-1] if variant == "paper" and same_last else alphas
    passes = (alphas, steps, variant, parts, positions, per_pair, pairs_per_pass)
    with pair_named(model, pairs):
        scores = call(model, gradients.scores, pairs.without_text(), *passes, progress=progress)
    return kinds, _stacked(scores, universe)


def _check(options: Options) -> None:
    """Raise InputError for options that mean nothing."""
    if options.method not in METHODS or options.variant not in VARIANTS:
        raise InputError(
            f"method {options.method!r} with variant {options.variant!r} is unknown: methods are {', '.join(METHODS)}, "
            f"variants {', '.join(VARIANTS)}."
        )
    if options.pairs_per_pass is not None and options.pairs_per_pass < 1:
        raise InputError(f"pairs_per_pass must be at least 1, not {options.pairs_per_pass}.")
    if options.method == "eap-ig" and options.steps < 2:
        raise InputError(
            f"eap-ig needs at least 2 steps, not {options.steps}; for one gradient at the clean point use 'eap'."
        )


def _kinds(universe: Universe) -> list[tuple[str, str, str | None]]:
    """(source, target, part) of the items, in the order of the tables."""
    nodes = universe.nodes
    kinds: list[tuple[str, str, str | None]] = [
        (nodes[i], nodes[j + 1], None) for j in range(universe.n_layers + 1) for i in range(j + 1)
    ]
    for i in range(universe.n_layers if universe.parts else 0):
        kinds += [(str(i), str(i), part) for part in (*conv_parts(universe.conv_width), "ssm", "skip")]
    return kinds


def _stacked(scores: dict[str, Tensor], universe: Universe) -> Tensor:
    """Scores by kind, as `gradients.scores` gives them, in the order of `_kinds`: [item, pos or 1, pair or 1]."""
    columns = [scores["edges"][:, i, j] for j in range(universe.n_layers + 1) for i in range(j + 1)]
    for i in range(universe.n_layers if universe.parts else 0):
        columns += [scores["conv"][:, i, k] for k in range(universe.conv_width)]
        columns += [scores[part][:, i] for part in ("ssm", "skip")]
    return torch.stack(columns).movedim(1, -1)


def _to_frame(kinds, scores: Tensor, positions: bool, pairs: Tensor | None) -> pd.DataFrame:
    """One row a score; pairs: Int64[pair], the numbers of the pairs where there is one row a pair."""
    index = pd.MultiIndex.from_product([range(n) for n in scores.shape]).to_frame(index=False)
    table = pd.DataFrame([kinds[k] for k in index[0]], columns=["source", "target", "part"])
    table.insert(2, "position", (index[1] if positions else pd.Series(pd.NA, index=index.index)).astype("Int64"))
    table["score"] = scores.flatten().numpy()
    if pairs is not None:
        table["pair"] = pairs.numpy()[index[2].to_numpy()]
    return table


def ranked(table: pd.DataFrame, ranking: str = "signed") -> pd.DataFrame:
    """The table in order of importance, with a `rank` column from 1.

    ranking: "signed", most negative first, as the paper does; or "absolute", largest |score| first. Ties keep the
    order of the table. Raises InputError for another ranking.
    """
    if ranking not in ("signed", "absolute"):
        raise InputError(f"ranking {ranking!r} is unknown: use 'signed' (as the paper) or 'absolute'.")
    key = table["score"] if ranking == "signed" else -table["score"].abs()
    out = table.iloc[key.argsort(kind="stable")].reset_index(drop=True)
    out["rank"] = range(1, len(out) + 1)
    return out
