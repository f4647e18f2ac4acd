"""What do sparse features of the bottleneck's values carry, and how few of them does the answer need?

The paper's third open question (section 6). A dictionary splits a value at every token into a few active features and an
error (`ioi_mamba.circuits.features`); channels and principal components split it without error. Each feature is an item that is
patched from the corrupted run, so that all are ranked and judged alike:

feature: of each way to split, the items that the answer needs most, by gradient times change; the role of the tokens where
that score comes from; what drives an item, by the prompts in which it is strongest: the word that most of them have in
common, and few prompts at all: at the place where it is strongest, so many tokens before, or as their answer.
left: the normalized logit diff on held-out prompts with the first k items clean and all else of the site corrupted.
fit: what the dictionary leaves unexplained, how many features are active, and how scores agree with exact patching.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import altair as alt
import pandas as pd
import torch
from torch import Tensor

from ioi_mamba.analyses import _circuits
from ioi_mamba.analyses._roles import OTHER, by_role, means
from ioi_mamba.charts.drawing import check_size
from ioi_mamba.charts.theme import PLOT_WIDTH
from ioi_mamba.circuits.attribution import attributions
from ioi_mamba.circuits.dictionaries import (
    Dictionary,
    activations,
    channels,
    load_dictionary,
    principal_components,
    trained,
    unexplained,
    values_of,
)
from ioi_mamba.circuits.faithfulness import estimates, rank_correlation
from ioi_mamba.circuits.features import ERROR, Features, features_at
from ioi_mamba.circuits.graph import Item, universe_of
from ioi_mamba.circuits.methods import Options as Scoring
from ioi_mamba.circuits.scoring import Evaluator
from ioi_mamba.errors import InputError
from ioi_mamba.experiments.experiment import Column, Context, Experiment
from ioi_mamba.experiments.needs import Need
from ioi_mamba.experiments.options import option
from ioi_mamba.model.families import hooks_of, mixer_layer, sizes_of
from ioi_mamba.passes.intervals import percentile_interval, resampled_means
from ioi_mamba.passes.ranges import left_out_sentence
from ioi_mamba.passes.sweep import Progress
from ioi_mamba.steering.bottleneck import find_layer
from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import Pairs
from ioi_mamba.tasks.prompts import is_name

FEATURE, LEFT, FIT = "feature", "left", "fit"
FEATURES, COMPONENTS, CHANNELS = "features", "components", "channels"
WITH_ERROR = "features, error clean"
SHOWN = 12  # items of each way to split that are described,
DRIVING = 10  # by so many prompts, in each of which they are strongest at one token
ALIKE = 0.5  # of which so many have a word in common, where an item is said to carry it
ANSWER = "answer"
METHODS = {
    "eap": "gradient at the clean point times change, all items from one backward pass",
    "exact": "each item is patched alone",
}


@dataclass(frozen=True)
class Options:
    """Options of features."""

    layer: int | None = option(None, "the layer; none: the bottleneck", at_least=0)
    sites: tuple[str, ...] = option(("ssm_input", "out_proj"), "the sites that are split")
    reads: str | None = option(None, "the site that is encoded, for transcoders; none: the same")
    dictionary: str | None = option(None, "a directory of SAELens or sparsify, for one site; none: trained here")
    size: int = option(512, "features of a dictionary that is trained", at_least=1)
    active: int = option(16, "how many of them are active at a token", at_least=1)
    training_steps: int = option(300, "steps of training", at_least=1)
    method: str = option("eap", "of scores; exact needs no gradients", choices=METHODS)
    exact_prompts: int = option(12, "prompts on which scores are held against exact patching", at_least=1)


Values = list[dict[str, dict[str, Tensor]]]
"""By layout, side and hook, as `values_of` reads them."""


class Split(NamedTuple):
    """One way to split a site: its features, and the site that is encoded."""

    site: str
    way: str
    features: Features


def default_pairs(tokenizer, n_pairs: int | None, seed: int) -> Pairs:
    """100 pairs of all five corruptions and all templates (200 evaluated prompts)."""
    return ioi.generate(tokenizer, n_pairs or 100, seed, symmetric=True)


def run(context: Context) -> pd.DataFrame:
    """Rows of the three kinds for every site.

    Raises InputError for a layer without a mixer, a site that cannot be split, and a dictionary of a file with several sites.
    """
    model, options = context.model, context.options
    pairs, held_out, left_out = _circuits.with_range(model, context.pairs, context.held_out)
    layer = find_layer(model, pairs) if options.layer is None else mixer_layer(model, options.layer)
    sites = list(dict.fromkeys(options.sites))
    if options.dictionary is not None and len(sites) != 1:
        raise InputError(
            f"The dictionary of a file is of one site: give --option sites=SITE, not {len(sites)} of them."
        )
    splits, others, rows = _splits(context, pairs, held_out, layer, sites)
    scores, by_label, labels = _scores(context, pairs, splits)
    orders = [each.double().mean(1).argsort(stable=True).tolist() for each in scores]  # the most negative first
    held = _circuits.some_of(held_out, _circuits.CURVE_PROMPTS)
    rows += _left_rows(model, held, splits, orders, context.stage(0.6, 0.8))
    for k, (split, order) in enumerate(zip(splits, orders, strict=True)):
        drivers = _drivers(model, held_out, others, split.features, [i for i in order[:SHOWN] if i < split.features.n])
        named = any(map(is_name, held_out.roles))  # then answers are names too
        rows += _feature_rows(split, order[:SHOWN], scores[k], pairs.clusters, by_label[k], labels, drivers, named)
    rows += _agreement(context, pairs, splits, scores)
    table = pd.DataFrame(rows, columns=_NAMES).assign(layer=layer, left_out=left_out, method=options.method)
    return table.astype({name: "Int64" for name in ("rank", "offset", "size", "n")})


_NAMES = [
    *("what", "site", "way", "item", "rank", "role", "word", "offset", "alike", "carries_name", "examples"),
    *("size", "measure", "value", "low", "high", "n"),
]


def _row(what: str, split: Split | str, way: str = "", **values: Any) -> dict[str, Any]:
    site = split if isinstance(split, str) else split.site
    empty = {"item": "", "role": "", "word": "", "examples": "", "measure": "", "carries_name": False}
    return (
        empty | {"what": what, "site": site, "way": way or (FEATURES if isinstance(split, str) else split.way)} | values
    )


# -- the ways to split ------------------------------------------------------------------------------------------------


def _splits(
    context: Context, pairs: Pairs, held_out: Pairs, layer: int, sites: list[str]
) -> tuple[list[Split], Values, list[dict[str, Any]]]:
    """The ways to split each site, the held-out values, and the rows that say how well the dictionaries fit."""
    model, options = context.model, context.options
    hook = lambda site: f"blocks.{layer}.hook_{site}"
    asked = list(dict.fromkeys([*sites, *([options.reads] if options.reads else [])]))
    for name in asked:  # refused before anything is computed
        hooks_of(model, 1).address(hook(name))
    read_, others = (values_of(model, part, list(map(hook, asked))) for part in (pairs, held_out))
    values, held = ({site: activations(each, hook(site)) for site in asked} for each in (read_, others))
    splits, rows = [], []
    for k, site in enumerate(sites):
        inputs, target = values[options.reads or site], values[site]
        if options.dictionary is not None:
            coder = load_dictionary(options.dictionary)
        else:
            stage = context.stage(0.1 + 0.3 * k / len(sites), 0.1 + 0.3 * (k + 1) / len(sites))
            size = {"size": options.size, "k": min(options.active, options.size), "steps": options.training_steps}
            coder = trained(inputs, target, **size, seed=context.seed, progress=stage)
        ways: dict[str, Dictionary] = {
            FEATURES: coder,
            COMPONENTS: principal_components(target),
            CHANNELS: channels(target.shape[1]),
        }
        for way, each in ways.items():
            reads = options.reads if way == FEATURES else None
            found = features_at(model, layer, each, site=site, reads=reads, name=f"{site} {way}")
            splits.append(Split(site, way, found))
        seen = held[options.reads or site]
        with torch.no_grad():
            active = coder.encode(seen) > 0
        for measure, value, n in (
            ("unexplained, training prompts", unexplained(coder, inputs, target), len(pairs)),
            ("unexplained, held-out prompts", unexplained(coder, seen, held[site]), len(held_out)),
            ("active features a token", float(active.double().sum(1).mean()), len(held_out)),
            ("share of features never active", float((~active.any(0)).double().mean()), len(held_out)),
        ):
            rows.append(_row(FIT, site, measure=measure, value=value, n=n, size=coder.W_enc.shape[1]))
    return splits, others, rows


# -- scores -----------------------------------------------------------------------------------------------------------


def _scores(context: Context, pairs: Pairs, splits: list[Split]) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Of each split its items' scores [item, pair], and the same by the label of their tokens [label, item, pair]; labels."""
    model, exact = context.model, context.options.method == "exact"
    features = tuple(split.features for split in splits)
    labels, layouts = by_role(pairs)
    n_items = sum(each.n + 1 for each in features)
    total = torch.zeros(n_items, len(pairs))
    of_labels = torch.zeros(len(labels), n_items, len(pairs))
    for k, (part, rows, at) in enumerate(layouts):
        stage = context.stage(0.4 + 0.2 * k / len(layouts), 0.4 + 0.2 * (k + 1) / len(layouts))
        if exact:
            universe = universe_of(model, features=features)
            items = [Item(node, node, None, name) for node, name in universe.of_features()]
            total[:, rows] = Evaluator(model, part, universe).exact_effects(items, stage).float()
            continue
        _, found = attributions(model, part, Scoring("eap", positions=True, features=features), stage)
        own = found[-n_items:].float()
        total[:, rows] = own.sum(1)
        of_labels[:, :, rows] = torch.einsum("as,isp->aip", at, own)
    ends = torch.tensor([each.n + 1 for each in features]).tolist()
    return list(total.split(ends)), list(of_labels.split(ends, 1)), [] if exact else labels


def _agreement(context: Context, pairs: Pairs, splits: list[Split], scores: list[Tensor]) -> Iterator[dict[str, Any]]:
    """How scores of features agree with exact patching of each item alone, on a few of the same prompts."""
    some = _circuits.every(len(pairs), context.options.exact_prompts)
    few, clusters = pairs[some], pairs[some].clusters
    chosen = [k for k, split in enumerate(splits) if split.way == FEATURES]
    # What is never active has a score and an effect of nothing, which would count as agreement.
    active = [(scores[k][:, some].abs().amax(1) > 0).nonzero()[:, 0].tolist() for k in chosen]
    named = [(splits[k].features, own) for k, own in zip(chosen, active, strict=True)]
    items = [Item(each.node, each.node, None, each.parts[i]) for each, own in named for i in own]
    universe = universe_of(context.model, features=[each for each, _ in named])
    found = Evaluator(context.model, few, universe).exact_effects(items, context.stage(0.8, 1)).float()
    for k, own, exact in zip(chosen, active, found.split(list(map(len, active))), strict=True):
        if len(own) < 3:
            continue
        mine = scores[k][own][:, some]
        drawn = [resampled_means(each, clusters) for each in (mine, exact)]
        whole = [each.double().mean(1) for each in (mine, exact)]
        for measure, correlation in (("r", _correlation), ("rank correlation", rank_correlation)):
            low, high = percentile_interval(correlation(*drawn)[:, None], int(clusters.max()) + 1)
            numbers = {"value": float(correlation(*whole)), "low": float(low[0]), "high": float(high[0])}
            measure = f"{measure} of scores and exact effects"
            yield _row(FIT, splits[k], measure=measure, **numbers, n=len(few), size=len(own))


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation along the last axis."""
    x, y = (each - each.mean(-1, keepdim=True) for each in (first, second))
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))


# -- what is left with the first k ------------------------------------------------------------------------------------


def _left_rows(
    model: Any, held: Pairs, splits: list[Split], orders: list[list[int]], progress: Progress | None
) -> Iterator[dict[str, Any]]:
    rows, sets = [], []
    for split, order in zip(splits, orders, strict=True):
        features = split.features
        items = [Item(features.node, features.node, None, name) for name in features.parts]
        ranked, error = [items[k] for k in order if k < features.n], items[-1:]
        sizes = [0]
        while sizes[-1] < features.n:
            sizes.append(min(features.n, 2 * sizes[-1] or 1))
        for way, more in {split.way: error, **({WITH_ERROR: []} if split.way == FEATURES else {})}.items():
            rows += [(split, way, size) for size in sizes]
            sets += [[*ranked[size:], *more] for size in sizes]
    universe = universe_of(model, features=[split.features for split in splits])
    found = estimates(Evaluator(model, held, universe), sets, progress=progress)["normalized_logit_diff"]
    for (split, way, size), value, low, high in zip(rows, found.value, *found.interval, strict=True):
        numbers = {"value": float(value), "low": float(low), "high": float(high)}
        yield _row(LEFT, split, way, size=size, measure="normalized logit diff", **numbers, n=len(held))


# -- what items carry -------------------------------------------------------------------------------------------------


def _feature_rows(
    split: Split,
    shown: list[int],
    scores: Tensor,
    clusters: Tensor,
    of_labels: Tensor,
    labels: list[str],
    drivers: dict[int, Drivers],
    named: bool,
) -> Iterator[dict[str, Any]]:
    """The first items of a split's order: score, from which tokens, and what drives them. named: answers are names."""
    for rank, (k, mean) in enumerate(zip(shown, means(scores[shown], clusters), strict=True), 1):
        assert mean is not None
        role = labels[int(of_labels[:, k].double().mean(1).abs().argmax())] if labels else ""
        found = drivers.get(k, Drivers())
        yield _row(
            FEATURE,
            split,
            item=ERROR if k == split.features.n else str(k),
            rank=rank,
            role=role,
            word=found.word,
            offset=found.offset,
            alike=found.alike,
            carries_name=found.alike >= ALIKE and (is_name(found.role) or (found.role == ANSWER and named)),
            examples=found.examples,
            measure="score",
            value=mean.value,
            low=mean.low,
            high=mean.high,
            n=mean.n,
        )


class Drivers(NamedTuple):
    """What the prompts in which an item is strongest have in common.

    Attributes:
        word: The word that most of them have at the place where it is strongest, or `offset` tokens before, or as their
            answer, and few prompts have.
        offset: How many tokens before; None: it is the answer.
        alike: The share of them that have it.
        role: The role of most of these words, or ANSWER.
        examples: The ends of a few of them, up to that place.
    """

    word: str = ""
    offset: int | None = None
    alike: float = 0.0
    role: str = ""
    examples: str = ""


def _drivers(model: Any, pairs: Pairs, values: Values, features: Features, items: list[int]) -> dict[int, Drivers]:
    """What drives each of these items, on the clean prompts; none for an item that is active in none of them."""
    reach, name = sizes_of(model).conv_width, f"blocks.{features.layer}.hook_{features.reads}"
    strongest, places, prompts = [], [], []
    for part, sides in zip(pairs.layouts(), values, strict=True):
        with torch.no_grad():
            size, place = features.encoded(sides["clean"][name])[..., items].abs().max(1)
        strongest.append(size)
        places.append(place)
        own = [label if label == "BOS" or label in part.roles else OTHER for label in part.position_labels()]
        # Answers of several tokens are no word of the vocabulary.
        answers = part.answer.tolist() if part.readout is None else [None] * len(part)
        prompts += [(tokens, own, answer) for tokens, answer in zip(part.clean.tolist(), answers, strict=True)]
    sizes, at = torch.cat(strongest), torch.cat(places)
    # How many prompts have a word at all, and how many as their answer.
    anywhere = Counter(token for tokens, *_ in prompts for token in set(tokens))
    as_answer = Counter(answer for *_, answer in prompts)
    found = {}
    for k, item in enumerate(items):
        first = [
            row for row in sizes[:, k].argsort(descending=True, stable=True)[:DRIVING].tolist() if sizes[row, k] > 0
        ]
        seen: Counter[tuple[int | None, int]] = Counter()  # by (offset, word)
        roles: dict[tuple[int | None, int], list[str]] = {}
        for row in first:
            (tokens, labels, answer), place = prompts[row], int(at[row, k])
            here = {(offset, tokens[place - offset]): labels[place - offset] for offset in range(min(reach, place + 1))}
            for key, role in (here | ({} if answer is None else {(None, answer): ANSWER})).items():
                seen[key] += 1
                roles.setdefault(key, []).append(role)
        if not first:
            continue

        # What many of them have and few of all prompts: "and" says little.
        def told(key: tuple[int | None, int]) -> float:
            among = as_answer if key[0] is None else anywhere
            return seen[key] * (1 - among[key[1]] / len(prompts))  # noqa: B023

        best = max(seen, key=told)
        ends = [_text(model, prompts[row][0][max(0, int(at[row, k]) - 4) : int(at[row, k]) + 1]) for row in first[:3]]
        role = Counter(roles[best]).most_common(1)[0][0]
        found[item] = Drivers(_text(model, [best[1]]), best[0], seen[best] / len(first), role, " | ".join(ends))
    return found


def _text(model: Any, tokens: list[int]) -> str:
    tokenizer = getattr(model, "tokenizer", None)
    return " ".join(map(str, tokens)) if tokenizer is None else tokenizer.decode(tokens).strip()


# -- what a page shows ------------------------------------------------------------------------------------------------


def chart(table: pd.DataFrame) -> alt.HConcatChart:
    """What is left with the first k items of each way to split, and the features that matter most, at the first site."""
    return _of_site(table, table["site"].iloc[0])


def more(table: pd.DataFrame) -> dict[str, alt.HConcatChart]:
    """The same at the other sites."""
    return {site: _of_site(table, site) for site in table["site"].unique()[1:]}


def _of_site(table: pd.DataFrame, site: str) -> alt.HConcatChart:
    own = table[table["site"] == site]
    pair = alt.hconcat(_left_chart(own, site), _feature_chart(own), spacing=40)
    return pair.resolve_scale(color="independent")


def _left_chart(table: pd.DataFrame, site: str) -> alt.LayerChart:
    left = table[table["what"] == LEFT].astype({"size": int})[["way", "size", "value", "low", "high", "n"]]
    order = [FEATURES, WITH_ERROR, COMPONENTS, CHANNELS]
    scale = alt.Scale(type="symlog", constant=1)
    ticks = sorted({0, *(size for size in left["size"].unique() if size & (size - 1) == 0)})
    x = alt.X(
        "size:Q", scale=scale, title="items kept clean", axis=alt.Axis(format="d", values=ticks, labelOverlap=True)
    )
    color = alt.Color("way:N", sort=order, title=None, legend=alt.Legend(orient="top", columns=2, symbolOpacity=1))
    numbers = [alt.Tooltip(f"{name}:Q", format=".3f") for name in ("value", "low", "high")]
    base = alt.Chart(check_size(left)).encode(x=x, color=color, tooltip=["way:N", "size:Q", *numbers, "n:Q"])
    y = alt.Y("value:Q", title="normalized logit diff")
    title = alt.Title(
        f"{site}: what is left with the first k", subtitle="all else of the site patched; held-out prompts"
    )
    layers = [
        base.mark_area(opacity=0.15).encode(y=alt.Y("low:Q", title="normalized logit diff"), y2="high:Q"),
        base.mark_line(strokeWidth=2).encode(y=y, strokeDash=alt.StrokeDash("way:N", sort=order, legend=None)),
        base.mark_point(filled=True, size=40, opacity=1).encode(y=y),
    ]
    return alt.LayerChart(layer=layers).properties(width=PLOT_WIDTH // 2, height=240, title=title)


def _feature_chart(table: pd.DataFrame) -> alt.LayerChart:
    own = table[(table["what"] == FEATURE) & (table["way"] == FEATURES)]
    what = own["word"].where(own["word"] != "", "inactive").where(own["item"] != ERROR, "")
    own = own.assign(named=own["item"] + "  " + what, carries=own["carries_name"].map({True: "a name", False: "other"}))
    columns = ["named", "role", "word", "offset", "alike", "carries", "examples", "value", "low", "high", "rank"]
    numbers = [alt.Tooltip(f"{name}:Q", format=".4f") for name in ("value", "low", "high")]
    base = alt.Chart(check_size(own[columns])).encode(
        y=alt.Y("named:N", sort=alt.SortField("rank"), title=None),
        color=alt.Color(
            "carries:N", sort=["a name", "other"], title="carries", legend=alt.Legend(orient="top", symbolOpacity=1)
        ),
        tooltip=[
            "named:N",
            "role:N",
            "word:N",
            "offset:Q",
            alt.Tooltip("alike:Q", format=".0%"),
            "examples:N",
            *numbers,
        ],
    )
    layers = [
        base.mark_rule(strokeWidth=2).encode(
            x=alt.X("low:Q", title="score: negative, the answer needs it"), x2="high:Q"
        ),
        base.mark_point(filled=True, size=60, opacity=1).encode(x=alt.X("value:Q")),
    ]
    title = alt.Title("The features the answer needs most", subtitle="by number, with the word that drives them")
    return alt.LayerChart(layer=layers).properties(width=PLOT_WIDTH // 3, height=240, title=title)


def findings(table: pd.DataFrame) -> list[str]:
    """Of each site: how few features are enough, against components and channels; which carry a name; how scores agree."""
    layer, out = table["layer"].iloc[0], []
    for site in table["site"].unique():
        own = table[table["site"] == site]
        left = own[own["what"] == LEFT].set_index(["way", "size"])
        sizes = [size for size in left.loc[FEATURES].index if 0 < size <= 16]
        size = sizes[-1]
        texts = [
            f"{value:z.2f} ({low:z.2f} to {high:z.2f}) of {way}"
            for way in (FEATURES, COMPONENTS, CHANNELS)
            if (way, size) in left.index
            for value, low, high in [left.loc[(way, size), ["value", "low", "high"]]]
        ]
        clean = left.loc[(WITH_ERROR, size), "value"]
        out.append(
            f"Layer {layer}, {site}: the {size} strongest items keep a normalized logit diff of {', '.join(texts)}."
        )
        out.append(f"With the dictionary's error clean too, its features keep {clean:z.2f}.")
        out.append(_carried(own))
        fit = own[own["what"] == FIT].set_index("measure")
        unexplained_ = fit.loc["unexplained, held-out prompts", "value"]
        sentence = f"The dictionary leaves {unexplained_:.1%} of the variance unexplained on held-out prompts"
        rows = [fit.loc[name] for name in fit.index if name.endswith("exact effects")]
        if rows:
            agree = [
                f"{row.name.split(' of ')[0]} {row['value']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
                for row in rows
            ]
            sentence += (
                f"; its features' scores agree with exact patching by {' and '.join(agree)}, {rows[0]['size']} items"
            )
        out.append(f"{sentence}.")
    return out + left_out_sentence(table)


def _carried(table: pd.DataFrame) -> str:
    shown = table[table["what"] == FEATURE]
    named = shown[(shown["way"] == FEATURES) & shown["carries_name"]]
    counts = {way: int(shown[shown["way"] == way]["carries_name"].sum()) for way in (FEATURES, COMPONENTS, CHANNELS)}
    of = {way: int((shown["way"] == way).sum()) for way in counts}
    sentence = f"Of the {of[FEATURES]} features that matter most {counts[FEATURES]} carry a name"
    if len(named):
        where = lambda offset: " as the answer" if pd.isna(offset) else f" {offset} before" if offset else ""
        listed = [f"{row.item}: {row.word}{where(row.offset)}" for row in named[:5].itertuples()]
        sentence += f" ({'; '.join(listed)}{'; and others' if len(named) > 5 else ''})"
    return f"{sentence}, of as many components {counts[COMPONENTS]} and of as many channels {counts[CHANNELS]}."


EXPERIMENT = Experiment(
    name="features",
    title="Features that carry the answer",
    question="Which sparse features of the bottleneck carry a name, and how few of them are enough?",
    look_for=(
        "A line that rises early: few items carry the answer. Features above components and channels: the dictionary found "
        "what the model uses. A gap to the dotted line is the dictionary's error."
    ),
    method=(
        "A dictionary (TopK autoencoder, trained on the tokens of these prompts, or read from a file) splits a site's value "
        "into features and an error; each is patched from the corrupted run like any part of a layer.\n"
        "Score: gradient at the clean point times change; left: the first k clean, all else of the site patched, on held-out "
        "prompts.\n"
        f"An item carries a name if {ALIKE:.0%} of the {DRIVING} held-out prompts in which it is strongest have the same name "
        "at that place, within the convolution's reach before it, or as their answer."
    ),
    paper="6",
    needs=frozenset({Need.SITES, Need.ABLE, Need.LAYER, Need.HELD_OUT, Need.GRADIENTS}),
    options=Options,
    columns=(
        Column("what", "text", "feature, left or fit"),
        Column("site", "text", "the site that is split"),
        Column("way", "text", "features of a dictionary (or with its error clean), components or channels"),
        Column("item", "text", "of feature: its number, or error"),
        Column("rank", "int", "of feature: its place, the item that the answer needs most first", nullable=True),
        Column("role", "text", "of feature: the role of the tokens where most of its score comes from"),
        Column("word", "text", "of feature: the word that most prompts in which it is strongest have in common there"),
        Column("offset", "int", "how many tokens before that place; empty: as the answer", "tokens", nullable=True),
        Column("alike", "float", "the share of these prompts that have the word", nullable=True),
        Column("carries_name", "bool", "whether that share is large and the word a name of the prompt"),
        Column("examples", "text", "the ends of three of these prompts, up to that place"),
        Column("size", "int", "of left: how many items are clean; of fit: features, or items compared", nullable=True),
        Column("measure", "text", "what value is"),
        Column("value", "float", "the number"),
        Column("low", "float", "lower end of its 95 % interval, by cluster", nullable=True),
        Column("high", "float", "upper end of the same interval", nullable=True),
        Column("n", "int", "prompts"),
        Column("layer", "int", "the layer"),
        Column("left_out", "int", "prompts without a range"),
        Column("method", "text", "of scores"),
    ),
    draws={ioi.TASK.name: default_pairs},
    run=run,
    chart=chart,
    more=more,
    findings=findings,
)
