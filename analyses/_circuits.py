"""What the circuit experiments share: their pairs, attributions with intervals, and the rows that score circuits.

Their tables have two kinds of row, told apart by `what`: "item" (an edge or part, at one position or at all) and
"circuit", a number `value` with a 95 % interval (`low`, `high`; by cluster, `ioi_mamba.passes.intervals`) for the `measure` of
a `circuit` of `size` items on `n` prompts of a `sample`, "train" or "held out". Circuits: "kept" (the rest patched:
sufficiency), "all but kept" (kept patched: necessity), "first k" of the ranking, "random" (as many items of each kind),
MIB_GRID (the benchmark's sizes: CPR in the order of signed scores, CMD in that of their size, "first k" being our own
finer curve), and what an experiment adds. Prompts without a range are in none of it (`left_out`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import Tensor

from ioi_mamba.circuits import faithfulness
from ioi_mamba.circuits.attribution import attributions
from ioi_mamba.circuits.faithfulness import estimates, random_circuits
from ioi_mamba.circuits.graph import Circuit, items_of, universe_of
from ioi_mamba.circuits.methods import METHODS, Options
from ioi_mamba.circuits.ranking import ORDERS, Ranking
from ioi_mamba.circuits.scoring import Evaluator, chosen_sizes
from ioi_mamba.circuits.variants import VARIANTS
from ioi_mamba.experiments.experiment import Column, Context
from ioi_mamba.experiments.needs import Need
from ioi_mamba.experiments.options import ablation_option, option
from ioi_mamba.passes.intervals import Estimate, Resampled, mean_interval
from ioi_mamba.passes.ranges import left_out_sentence, usable_of
from ioi_mamba.passes.sweep import Progress
from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import Pairs

NEEDS = frozenset({Need.SITES, Need.ABLE, Need.HELD_OUT, Need.GRADIENTS})
SOURCE = Column("source", "text", "where the edge begins: embed or a layer; of a part its layer", nullable=True)
TARGET = Column("target", "text", "where it ends: a layer or output; of a part its layer", nullable=True)
PART = Column("part", "text", "conv slice, ssm or skip inside a layer; empty for an edge", nullable=True)
POSITION = Column("position", "int", "token index; empty for all positions together", nullable=True)
LABEL = Column("label", "text", "the word at that position", nullable=True)
SCORE = Column("score", "float", "mean attribution: negative, patching the item lowers the metric", nullable=True)
RANK = Column("rank", "int", "place in the ranking, from 1", nullable=True)
KEPT = Column("kept", "bool", "the item is in the circuit")
CIRCUIT_ROWS = (
    Column("what", "text", "item, or circuit: which kind of row", later=True),
    Column("circuit", "text", "which circuit a row of circuits is about", nullable=True, later=True),
    Column("size", "int", "items of the circuit", nullable=True, later=True),
    Column("sample", "text", "train or held out", nullable=True, later=True),
    Column("measure", "text", "what `value` measures", nullable=True, later=True),
    Column("value", "float", "the number", nullable=True, later=True),
    Column("low", "float", "lower end of its 95 % interval, by cluster", nullable=True, later=True),
    Column("high", "float", "upper end of the same interval", nullable=True, later=True),
    Column("n", "int", "prompts", nullable=True, later=True),
    Column("left_out", "int", "prompts without a range", later=True),
)
METHOD = "of attribution; exact needs no gradients: each item is patched alone"
MEASURES = ("accuracy", "normalized_logit_diff", "f", "kl")
CURVE_PROMPTS = 60  # curves and random circuits are many evaluations: they use this many of the held-out prompts
CURVE_SIZES = 12
PART_PROMPTS = 100  # attribution down to parts takes twice the time of one of edges alone
N_RANDOM = 5
N_SPLITS = 3  # into halves that each choose a circuit anew: two searches a split,
SPLIT_PROMPTS = 200  # on this many of the training prompts
MIB_GRID = "MIB grid"


@dataclass(frozen=True)
class AttributionOptions:
    """Options of the experiments that rank items by attribution and keep the first ones."""

    target: float = option(0.85, "the accuracy on training prompts that the circuit must exceed", at_least=0, at_most=1)
    steps: int = option(5, "points on the path from clean to corrupted, of eap-ig", at_least=1)
    variant: str = option(
        "paper", "of the scores: `ioi_mamba.circuits.attribution` says which to use", choices=tuple(VARIANTS)
    )
    method: str = option("eap-ig", METHOD, choices=METHODS)
    ranking: str = option("signed", "most negative scores first, or largest sizes first", choices=ORDERS)
    ablation: str = ablation_option()


def default_pairs(tokenizer, n_pairs: int | None, seed: int) -> Pairs:
    """200 pairs of all five corruptions and the three aligned templates (400 evaluated prompts)."""
    return ioi.generate(tokenizer, n_pairs or 200, seed, templates=ioi.ALIGNED_TEMPLATES, symmetric=True)


def with_range(model, pairs: Pairs, held_out: Pairs | None) -> tuple[Pairs, Pairs, int]:
    """The pairs and the held-out ones (None: the same) that have a range, and how many of both have none."""
    sets = usable_of(model, [pairs] if held_out is None else [pairs, held_out])
    return sets[0].pairs, sets[-1].pairs, sum(each.left_out for each in sets)


def chosen_circuit(train: Evaluator, ranking: Ranking, target: float) -> Circuit:
    """The smallest circuit of first items of a ranking with a train accuracy above `target`, as `smallest` finds it."""
    (size,) = chosen_sizes(train, [train.rows_kept], [ranking.items], target)
    return ranking.top(size)


def some_of(pairs: Pairs, n: int) -> Pairs:
    """At most n of the pairs, evenly spaced."""
    return pairs[every(len(pairs), n)]


def every(n_pairs: int, n: int) -> slice:
    """At most n of so many pairs, evenly spaced."""
    return slice(None, None, -(-n_pairs // n))


def attributed(
    context: Context, pairs: Pairs, options: Options, progress: Progress | None = None
) -> tuple[pd.DataFrame, Tensor]:
    """All items (source, target, part) and their attributions Float32[item, pos or 1, pair]; computed once in a run."""
    key = (pairs.hash(), options)
    if key not in context.attributions:
        context.attributions[key] = attributions(context.model, pairs, options, progress)
    kinds, scores = context.attributions[key]
    return pd.DataFrame(kinds, columns=["source", "target", "part"]), scores


def scored(context: Context, pairs: Pairs, *, method: str, parts: bool, progress: Progress | None = None) -> Ranking:
    """All items by their score over all positions, the mean over pairs; the passes are those of `attributed`."""
    positions, ablation = METHODS[method].by_position, context.options.ablation
    options = Options(method, positions=positions, parts=parts, ablation=ablation)
    items, per_pair = attributed(context, pairs, options, progress)
    return Ranking.of(items_of(items), per_pair.sum(1).mean(-1), universe_of(context.model, parts=parts))


def how_scored(table: pd.DataFrame) -> list[str]:
    """A sentence where the scores are no attributions."""
    if (table["method"] == "exact").any():
        return ["No gradients here: a score is the effect of patching that item alone, not an attribution."]
    return []


def with_scores(items: pd.DataFrame, per_pair: Tensor, clusters: Tensor) -> pd.DataFrame:
    """The items with `score`, the mean of per_pair [item, pair], its interval (low, high) and n, the prompts."""
    low, high = mean_interval(per_pair, clusters)
    scores = {"score": per_pair.mean(-1), "low": low, "high": high}
    return items.assign(**{name: value.numpy() for name, value in scores.items()}, n=per_pair.shape[-1])


def circuit_rows(
    circuit: str,
    sizes: int | Sequence[int] | None,
    sample: str,
    estimates: Mapping[str, Estimate],
    n: int | None,
    measures: Sequence[str] = MEASURES,
) -> list[dict]:
    """Rows of the kind "circuit" from estimates of one or several circuits, for each of the measures."""
    rows = []
    for measure in measures:
        value, (low, high) = estimates[measure].value, estimates[measure].interval
        for k in range(len(value)):
            row = {"what": "circuit", "circuit": circuit, "size": sizes[k] if isinstance(sizes, Sequence) else sizes}
            numbers = {"value": float(value[k]), "low": float(low[k]), "high": float(high[k])}
            rows.append(row | {"sample": sample, "measure": measure} | numbers | {"n": n})
    return rows


def sizes_of_curve(n_items: int, chosen: int) -> list[int]:
    """About CURVE_SIZES sizes from 0 to all items, dense where circuits are small, and the chosen one."""
    spread = np.geomspace(1, n_items, CURVE_SIZES).round().astype(int).tolist()
    return sorted({0, chosen, n_items, *spread})


def faithfulness_rows(
    train: Evaluator,
    held: Evaluator,
    circuit: Circuit,
    ranking: Ranking | None = None,
    progress: Progress | None = None,
) -> list[dict]:
    """How the circuit does: itself, its complement, random ones, and with a ranking the curves of the first k items."""
    rows = circuit_rows("kept", len(circuit), "train", estimates(train, [circuit.patched()]), len(train.rows_kept))
    drawn = [c.patched() for c in random_circuits(circuit, N_RANDOM)]
    found = estimates(held, [circuit.patched(), list(circuit.items), *drawn])
    for name, which in (("kept", [0]), ("all but kept", [1]), ("random", slice(2, None))):
        one = {measure: estimate[which] for measure, estimate in found.items()}
        rows += circuit_rows(name, len(circuit), "held out", one, len(held.rows_kept))
    if ranking is None:
        return rows
    few = Evaluator(held.model, some_of(held.pairs, CURVE_PROMPTS), circuit.universe, ablation=held.ablation)
    n_items = len(ranking)
    sizes, on_grid = sizes_of_curve(n_items, len(circuit)), faithfulness.mib_sizes(n_items)
    # The grid has sizes in common, with itself where items are few; each circuit is evaluated once.
    orders = [Ranking.of(ranking.items, ranking.scores, ranking.universe, order) for order in AREAS.values()]
    sets = ranking.cut(sizes) + [items for order in orders for items in order.cut(sorted(set(on_grid)))]
    curves = estimates(few, sets, progress=progress)
    fine = {measure: estimate[: len(sizes)] for measure, estimate in curves.items()}
    rows += circuit_rows("first k", sizes, "held out", fine, len(few.rows_kept))
    fractions, f = [k / n_items for k in sizes], fine["f"]
    for measure in AREAS:
        rows += area_rows("first k", measure, fractions, f, len(few.rows_kept))
    for number, measure in enumerate(AREAS):
        begin, known = len(sizes) + number * len(set(on_grid)), sorted(set(on_grid))
        f = curves["f"][[begin + known.index(k) for k in on_grid]]
        rows += area_rows(MIB_GRID, measure, faithfulness.MIB_FRACTIONS, f, len(few.rows_kept))
    return rows


AREAS = {"cpr": "signed", "cmd": "absolute"}
"""The two areas, and by which ranking the MIB benchmark measures each."""


def area_rows(circuit: str, measure: str, fractions: Sequence[float], f: Estimate, n: int) -> list[dict]:
    """One row, an area under f [size] at these fractions of all items."""
    assert isinstance(f, Resampled)
    of_value, of_draws = (faithfulness.areas(fractions, each)[measure] for each in (f.value, f.resampled))
    area = Resampled(of_value[None], of_draws[:, None], f.n_clusters)
    return circuit_rows(circuit, None, "held out", {measure: area}, n, (measure,))


def with_target(items: pd.DataFrame, rows: Sequence[dict], target: float, circuit: str = "kept") -> pd.DataFrame:
    """The items with `target_accuracy`, and `reached`, whether `circuit` is above it on the training prompts."""
    wanted = (circuit, "accuracy", "train")
    reached = any(r["value"] > target for r in rows if (r["circuit"], r["measure"], r["sample"]) == wanted)
    return items.assign(target_accuracy=target, reached=reached)


def jaccard_rows(train: Evaluator, items: pd.DataFrame, per_pair: Tensor, target: float, ranking: str) -> list[dict]:
    """How alike the circuits are that two halves of the training prompts choose anew: the mean over N_SPLITS splits.

    low, high: the least and the most alike of the splits, which is no interval: splits of one set are not independent.
    n: the prompts of one half, of about SPLIT_PROMPTS in all. No row for prompts that cannot be split.
    """
    some = every(len(train.pairs), SPLIT_PROMPTS)
    few = Evaluator(train.model, train.pairs[some], train.universe, ablation=train.ablation)
    if int(few.pairs.clusters.max()) == 0:
        return []
    options = {"ranking": ranking, "n_splits": N_SPLITS}
    found = faithfulness.split_jaccards(few, items_of(items), per_pair[:, some], target, **options)
    row = {"what": "circuit", "circuit": "kept", "sample": "train", "measure": "jaccard", "n": len(few.pairs) // 2}
    return [row | {"value": float(found.mean()), "low": float(found.min()), "high": float(found.max())}]


def table_of(items: pd.DataFrame, rows: list[dict], columns: Sequence[str] = ()) -> pd.DataFrame:
    """The two kinds of rows as one table; columns: those of circuits that are there even when no row has them.

    Items carry the scores of the circuit that is kept, the same in every row: size, train_accuracy, and on held-out
    pairs accuracy and normalized_logit_diff.
    """
    circuits = pd.DataFrame(rows)
    circuits = circuits.reindex(columns=[*circuits.columns, *(c for c in columns if c not in circuits)])
    kept = of_circuit(circuits, "kept", "accuracy", "train").iloc[0]
    items = items.assign(size=kept["size"], train_accuracy=kept["value"])
    for measure in ("accuracy", "normalized_logit_diff"):
        items[measure] = of_circuit(circuits, "kept", measure)["value"].iloc[0]
    table = pd.concat([items.assign(what="item"), circuits], ignore_index=True)
    for name in {"kept", "started", "reached"} & set(table):
        table[name] = table[name].eq(True)
    counts = [name for name in ("position", "rank", "size", "n", "n_exact") if name in table]
    texts = ("source", "target", "part", "label", "circuit", "sample", "measure")
    types = dict.fromkeys(counts, "Int64") | dict.fromkeys((name for name in texts if name in table), "str")
    first = ["what", "circuit", "size", "sample", "measure", "value"]
    return table.astype(types)[[*(c for c in table if c not in first), *first]]


def item_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of items alone."""
    return table[table["what"] == "item"]


def of_circuit(table: pd.DataFrame, circuit: str, measure: str, sample: str = "held out") -> pd.DataFrame:
    """The rows of one circuit and measure."""
    return table[(table["circuit"] == circuit) & (table["measure"] == measure) & (table["sample"] == sample)]


def interval_text(row: pd.Series, form: str = "z.3f") -> str:
    """A value with its interval: "0.912 (0.901 to 0.920)"."""
    return f"{row['value']:{form}} ({row['low']:{form}} to {row['high']:{form}})"


def lead(table: pd.DataFrame, n_items: int, items: str) -> str:
    """How few items are kept, and what they keep on held-out prompts."""
    accuracy, f = (of_circuit(table, "kept", measure).iloc[0] for measure in ("accuracy", "f"))
    return (
        f"{accuracy['size']} of {n_items} {items} are kept: held-out accuracy {interval_text(accuracy, '.0%')}, f "
        f"{interval_text(f, 'z.2f')}, {accuracy['n']} prompts."
    )


def how_it_does(table: pd.DataFrame, n_items: int, items: str, ranked_items: str = "") -> list[str]:
    """Sentences about sufficiency, necessity, random circuits, the curve, the choice of items and what is left out.

    ranked_items: what the target was looked for among, where that is not `items`.
    """
    one = lambda circuit, measure, sample="held out": of_circuit(table, circuit, measure, sample).iloc[0]
    train, accuracy, nld = (
        one("kept", "accuracy", "train"),
        one("kept", "accuracy"),
        one("kept", "normalized_logit_diff"),
    )
    rest, f = one("all but kept", "normalized_logit_diff"), one("kept", "f")
    random = of_circuit(table, "random", "normalized_logit_diff")
    out = [
        f"{train['size']} of {n_items} {items} are kept: accuracy {train['value']:.1%} on the {train['n']} prompts they "
        f"were chosen on and {interval_text(accuracy, '.1%')} on {accuracy['n']} others, where the normalized logit diff "
        f"is {interval_text(nld)} and f is {interval_text(f)}.",
        *unreached(table, ranked_items or items),
        f"They are needed too: with them patched and the rest kept the normalized logit diff is {interval_text(rest)}."
        if rest["high"] < 0.5
        else f"With them patched and the rest kept the normalized logit diff is still {interval_text(rest)}.",
        f"Of {len(random)} random circuits with as many items of each kind the best has a normalized logit diff of "
        f"{random['value'].max():z.3f} on the same prompts.",
    ]
    curve = of_circuit(table, "first k", "accuracy").sort_values("size")
    if len(curve):
        falls = curve.loc[curve["value"] < curve["value"].cummax(), "size"].tolist()
        cpr, cmd = (one("first k", measure) for measure in AREAS)
        shape = f"falls at {', '.join(map(str, falls))} {items}" if falls else "never falls as items are added"
        on_grid = [of_circuit(table, MIB_GRID, measure) for measure in AREAS]
        of_mib = (
            f", at the sizes of the MIB benchmark (whole items at its fractions; CPR by signed, CMD by absolute score) "
            f"{' and '.join(interval_text(rows.iloc[0]) for rows in on_grid)}"
            if all(map(len, on_grid))
            else ""
        )
        out.append(
            f"Over all sizes CPR is {interval_text(cpr)} and CMD {interval_text(cmd)}{of_mib}; the curve of accuracy "
            f"{shape} ({len(curve)} sizes, {cpr['n']} prompts)."
        )
    jaccard = of_circuit(table, "kept", "jaccard", "train")
    if len(jaccard):
        row = jaccard.iloc[0]
        out.append(
            f"Two halves of the training prompts ({row['n']} each, no prompt in common) choose circuits anew, with a "
            f"Jaccard of {row['value']:.2f} ({row['low']:.2f} to {row['high']:.2f} in {N_SPLITS} splits)."
        )
    return out + left_out_sentence(table)


def unreached(table: pd.DataFrame, items: str) -> list[str]:
    """A sentence where the circuit that was chosen has no accuracy above the target."""
    first = item_rows(table).iloc[0]
    # A table of an earlier version does not say.
    if first.get("reached", True):
        return []
    return [
        f"The target is not reached: no circuit of first {items} has an accuracy above {first['target_accuracy']:.1%} on the "
        "training prompts, so that all but the last were taken and their number says little."
    ]
