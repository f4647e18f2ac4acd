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
| "relp" | one pass, at the clean point, with relevance rules (`relevance`) in place of gradients | corrupted - clean output_i | near EAP-IG's scores at the cost of one pass, without attention; of a hybrid they are farther from exact effects |

With another `ablation` the difference is what that kind writes less the output, and the path ends where everything is so
written. A score is near an exact effect only where little is changed: zeros are far from every value, and at the end of
their path the norms divide by nothing, so that "eap-ig" there, above all "detached", says little; "relp" holds better, and
"exact" is exact. `python -m bench.attribution` measures all of it.

With `parts`, conv slices, ssm and skip are scored in the same passes. A conv slice is linear in the conv input, so
its score is the gradient at the conv output times the change of the slice; ssm is the gradient at y times the change
that the corrupted states bring; skip the gradient at the gate branch times its change. In the "paper" variant the
path then interpolates the conv slices as well, as the published notebook does, so edge scores change a little.

With `features`, so are the features and the error of dictionaries: the gradient at the site goes back through the decoder to
the activations. No feature moves along the path by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd
from torch import Tensor

from ioi_mamba.charts.notebook import shown
from ioi_mamba.circuits.features import Features, check_features
from ioi_mamba.circuits.graph import Circuit, Universe, items_of, universe_of
from ioi_mamba.circuits.methods import Kind, Method, MethodName, Options, method_of
from ioi_mamba.circuits.patching import kind_of_patches
from ioi_mamba.circuits.ranking import Ranking, places_of
from ioi_mamba.circuits.scoring import check_one_layout
from ioi_mamba.circuits.variants import Variant, VariantName, variant_of
from ioi_mamba.errors import InputError
from ioi_mamba.passes.ablations import Ablation, AblationName
from ioi_mamba.passes.ranges import usable
from ioi_mamba.passes.sweep import Progress
from ioi_mamba.tasks.base import Pairs, check_pairs


def attribute(
    model,
    pairs: Pairs,
    *,
    method: MethodName | Method = "eap-ig",
    variant: VariantName | Variant = "paper",
    steps: int = 5,
    positions: bool = False,
    parts: bool = False,
    per_pair: bool = False,
    pairs_per_pass: int | None = None,
    features: Iterable[Features] = (),
    ablation: AblationName | Ablation = "resample",
    progress: Progress | None = None,
) -> Attribution:
    """Attribution of every edge (and part); its `table` has columns source, target, position, part, score (and pair).

    method: "eap", the gradient at the clean point; "eap-ig", the mean over `steps` points of the path; or "exact",
    which needs no gradients: each item is patched alone, at many times the cost. variant: see the module's table, or a `Variant`,
    such as `RELP._replace(rules=("norm", "silu", "ssm", "half"))`. positions: one score a position, else summed (position is null). parts: score conv
    slices, ssm and skip too; an edge has a null part. per_pair: one row a pair instead of the mean over pairs, `pair`
    being its number among those given. Pairs without a range (`ranges`) have no score and are in no mean: the table's
    `attrs` says how many were `left_out`.
    pairs_per_pass: default what fits into 1 GiB, on an accelerator 8 GiB. features: what `features_at` makes; their items
    have parts such as "out_proj.12" and "out_proj.error". ablation: what patching writes, by default the corrupted run's
    values: "resample", "mean", "mean-by-role", "zero", "noise", or one of your own (`passes.ablations`).
    Score: normalized logit diff per unit of patching; negative = patching lowers the metric.
    Raises InputError for an unknown method, variant or ablation, steps < 2 with eap-ig, scores that are not finite, pairs of
    which none has a range, and pairs of several layouts where their scores at positions would be averaged.
    """
    chosen = check_features(features)
    options = Options(method, variant, steps, positions, parts, per_pair, pairs_per_pass, chosen, ablation)
    found_by = _checked(options, pairs)
    if positions and not per_pair:
        check_one_layout(pairs)
    found = usable(model, pairs)
    kinds, scores = attributions(model, found.pairs, options, progress)
    table = _to_frame(kinds, scores, positions, found.rows if per_pair else None)
    table.attrs = {"left_out": found.left_out}
    n_positions = pairs.clean.shape[1] if positions else None
    universe = universe_of(model, parts=parts, n_positions=n_positions, features=options.features)
    return Attribution(table, universe, found_by.label, len(found.pairs))


@dataclass(frozen=True, eq=False, repr=False)
class Attribution:
    """What `attribute` found.

    Attributes:
        table: Columns source, target, position, part, score (and pair); `attrs` has `left_out`.
        universe: The graph that was scored.
        label: The method in words.
        n: How many pairs the scores are of.
    """

    table: pd.DataFrame
    universe: Universe
    label: str
    n: int

    def ranking(self, order: str = "signed") -> Ranking:
        """The items in order of their mean score; order: "signed" as the paper, or "absolute"."""
        table = self.table
        if "pair" in table:
            keys = ["source", "target", "position", "part"]
            table = pd.DataFrame(table.groupby(keys, as_index=False, sort=False, dropna=False)["score"].mean())
        return Ranking.of(items_of(table), table["score"].to_numpy(), self.universe, order)

    def circuit(self, k: int, order: str = "signed") -> Circuit:
        """The circuit of the k most important items. Raises InputError for a k that is not 0 to all items."""
        return self.ranking(order).top(k)

    def chart(self) -> Any:
        """The scores: edges as a matrix from source to target, and parts by layer; over positions they are summed."""
        return self.ranking().chart()

    def __repr__(self) -> str:
        return f"<Attribution by {self.label} on {self.n} pairs>\n{self.ranking()!r}"

    def _repr_html_(self) -> str:
        ranking = self.ranking()
        return shown(f"Attribution by {self.label} on {self.n} pairs", ranking.to_frame(), ranking.chart)


def attributions(
    model: Any, pairs: Pairs, options: Options, progress: Progress | None = None
) -> tuple[list[Kind], Tensor]:
    """As `attribute`, of pairs that all have a range: (source, target, part) of every item, Float32[item, pos, pair].

    The axis of positions has length 1 without `positions`, that of pairs without `per_pair`.
    """
    method = _checked(options, pairs)
    n_positions = pairs.clean.shape[1] if options.positions else None
    universe = universe_of(model, parts=options.parts, n_positions=n_positions, features=options.features)
    return universe.kinds(), method.run(model, pairs, universe, options, progress)


def _checked(options: Options, pairs: Pairs) -> Method:
    """The method. Raises InputError for options that mean nothing."""
    kind_of_patches(options.ablation, check_pairs(pairs), options.features)
    method = method_of(options.method)
    variant_of(options.variant)
    if options.pairs_per_pass is not None and options.pairs_per_pass < 1:
        raise InputError(f"pairs_per_pass must be at least 1, not {options.pairs_per_pass}.")
    if options.steps < method.least_steps:
        raise InputError(
            f"{method.name} needs at least {method.least_steps} steps, not {options.steps}; for one gradient at the clean "
            "point use 'eap'."
        )
    return method


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
    """The table in order of importance, with a `rank` column from 1; ranking: "signed" or "absolute" (`ORDERS`)."""
    out = table.iloc[places_of(table["score"], ranking)].reset_index(drop=True)
    out["rank"] = range(1, len(out) + 1)
    return out
