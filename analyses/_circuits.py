"""What the circuit experiments share: their pairs, attributions with intervals, and the rows that score circuits.

Their tables have two kinds of row, told apart by `what`: "item" (an edge or part, at one position or at all) and
"circuit", a number `value` with a 95 % interval (`low`, `high`) for the `measure` of a `circuit` of `size` items on
`n` prompts of a `sample`, "train" or "held out". Circuits: "kept" (the rest patched: sufficiency), "all but kept" (kept
patched: necessity), "first k" of the ranking, "random" (as many items of each kind), and what an experiment adds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from ioi_mamba import faithfulness
from ioi_mamba.attribution import Options, attributions
from ioi_mamba.evaluator import Estimate, Evaluator, resampled_means
from ioi_mamba.faithfulness import random_circuits
from ioi_mamba.graph import Circuit, items_of
from ioi_mamba.sweep import Progress
from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import Pairs

MEASURES = ("accuracy", "normalized_logit_diff", "f", "kl")
CURVE_PROMPTS = 60  # curves and random circuits are many evaluations: they use this many of the held-out prompts
CURVE_SIZES = 12
PART_PROMPTS = 100  # attribution down to parts takes twice the time of one of edges alone
N_RANDOM = 5


def default_pairs(tokenizer, n_pairs: int | None, seed: int) -> Pairs:
    """200 pairs of all five corruptions and the three aligned templates (400 evaluated prompts)."""
    return ioi.generate(tokenizer, n_pairs or 200, seed, templates=ioi.ALIGNED_TEMPLATES)


def some_of(pairs: Pairs, n: int) -> Pairs:
    """At most n of the pairs, evenly spaced."""
    return pairs[every(len(pairs), n)]


def every(n_pairs: int, n: int) -> slice:
    """At most n of so many pairs, evenly spaced."""
    return slice(None, None, -(-n_pairs // n))


def share_of(progress: Progress | None, begin: float, end: float) -> Progress | None:
    """A progress of its own for one stage of a run, from `begin` to `end` of the whole (0..1)."""
    if progress is None:
        return None
    return lambda done, total: progress(round(1000 * (begin + (end - begin) * done / total)), 1000)


def attributed(model, pairs: Pairs, options: Options, progress: Progress | None = None) -> tuple[pd.DataFrame, Tensor]:
    """All items (source, target, part) and their attributions Float32[item, pos or 1, pair]."""
    kinds, scores = attributions(model, pairs, options, progress)
    return pd.DataFrame(kinds, columns=["source", "target", "part"]), scores


def scored(model, pairs: Pairs, *, method: str, parts: bool, progress: Progress | None = None) -> pd.DataFrame:
    """All items and their `score` over all positions, the mean over pairs; the passes are those of `attributed`."""
    options = Options(method, positions=method != "exact", parts=parts)
    items, per_pair = attributed(model, pairs, options, progress)
    return items.assign(score=per_pair.sum(1).mean(-1).numpy())


def how_scored(table: pd.DataFrame) -> list[str]:
    """A sentence where the scores are no attributions."""
    if (table["method"] == "exact").any():
        return ["No gradients here: a score is the effect of patching that item alone, not an attribution."]
    return []


def with_scores(items: pd.DataFrame, per_pair: Tensor) -> pd.DataFrame:
    """The items with `score`, the mean of per_pair [item, pair], its interval (low, high) and n, the prompts."""
    low, high = Estimate(per_pair.mean(-1), resampled_means(per_pair)).interval
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
    ranking: pd.DataFrame | None = None,
    progress: Progress | None = None,
) -> list[dict]:
    """How the circuit does: itself, its complement, random ones, and with a ranking the curve of the first k items."""
    rows = circuit_rows("kept", len(circuit), "train", train.estimates([circuit.patched()]), len(train.pairs))
    found = held.estimates([circuit.patched(), list(circuit.items)])
    for k, name in enumerate(("kept", "all but kept")):
        one = {measure: estimate[[k]] for measure, estimate in found.items()}
        rows += circuit_rows(name, len(circuit), "held out", one, len(held.pairs))
    few = Evaluator(held.model, some_of(held.pairs, CURVE_PROMPTS), circuit.universe)
    drawn = few.estimates([c.patched() for c in random_circuits(circuit, N_RANDOM)])
    rows += circuit_rows("random", len(circuit), "held out", drawn, len(few.pairs))
    if ranking is None:
        return rows
    order, sizes = items_of(ranking), sizes_of_curve(len(ranking), len(circuit))
    curve = few.estimates([order[k:] for k in sizes], progress=progress)
    rows += circuit_rows("first k", sizes, "held out", curve, len(few.pairs))
    fractions = [k / len(order) for k in sizes]
    both = [faithfulness.areas(fractions, f.double()) for f in curve["f"]]
    whole = {name: Estimate(both[0][name][None], both[1][name][:, None]) for name in both[0]}
    return rows + circuit_rows("first k", None, "held out", whole, len(few.pairs), ("cpr", "cmd"))


def jaccard_rows(per_pair: Tensor, k: int, ranking: str) -> list[dict]:
    """How much of the circuit of the first k items other draws of the training pairs would choose again."""
    found = faithfulness.bootstrap_jaccard(per_pair, k, ranking=ranking).double()[:, None]
    estimate = Estimate(found.mean(0), found)
    return circuit_rows("kept", k, "train", {"jaccard": estimate}, per_pair.shape[-1], ("jaccard",))


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
    for name in {"kept", "started"} & set(table):
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


def how_it_does(table: pd.DataFrame, n_items: int, items: str) -> list[str]:
    """Sentences about sufficiency, necessity, random circuits, the curve and the choice of items."""
    one = lambda circuit, measure, sample="held out": of_circuit(table, circuit, measure, sample).iloc[0]
    train, accuracy, nld = (
        one("kept", "accuracy", "train"),
        one("kept", "accuracy"),
        one("kept", "normalized_logit_diff"),
    )
    rest, f = one("all but kept", "normalized_logit_diff"), one("kept", "f")
    random = of_circuit(table, "random", "normalized_logit_diff")["value"]
    out = [
        f"{train['size']} of {n_items} {items} are kept: accuracy {train['value']:.1%} on the {train['n']} prompts they "
        f"were chosen on and {interval_text(accuracy, '.1%')} on {accuracy['n']} others, where the normalized logit diff "
        f"is {interval_text(nld)} and f is {interval_text(f)}.",
        f"They are needed too: with them patched and the rest kept the normalized logit diff is {interval_text(rest)}."
        if rest["high"] < 0.5
        else f"With them patched and the rest kept the normalized logit diff is still {interval_text(rest)}.",
        f"Of {len(random)} random circuits of as many items the best has a normalized logit diff of {random.max():.3f}.",
    ]
    curve = of_circuit(table, "first k", "accuracy").sort_values("size")
    if len(curve):
        falls = curve.loc[curve["value"] < curve["value"].cummax(), "size"].tolist()
        cpr, cmd = one("first k", "cpr"), one("first k", "cmd")
        shape = f"falls at {', '.join(map(str, falls))} {items}" if falls else "never falls as items are added"
        out.append(
            f"Over all sizes CPR is {interval_text(cpr)} and CMD {interval_text(cmd)}; the curve of accuracy {shape} "
            f"({len(curve)} sizes, {cpr['n']} prompts)."
        )
    jaccard = of_circuit(table, "kept", "jaccard", "train")
    if len(jaccard):
        out.append(
            f"Other draws of the pairs choose circuits with a Jaccard of {interval_text(jaccard.iloc[0], '.2f')}."
        )
    return out
