"""The numbers of section 5 and appendix D: edges, parts and positions that a circuit keeps, and how it does.

The tables have rows of items and rows of circuits, as `ioi_mamba.analyses._circuits` describes them.
"""

from __future__ import annotations

from functools import partial
from itertools import takewhile

import pandas as pd

from ioi_mamba import paper
from ioi_mamba.analyses import positional_attribution
from ioi_mamba.analyses._circuits import item_rows, of_circuit
from ioi_mamba.claims.values import NAN, NONE, Layer, Measure, Value, largest_difference, one
from ioi_mamba.passes.metrics import reaches

LARGE_DROP, SMALL_DROP = 0.045, 0.02
LEAST_KEPT = 0.5
"""The normalized logit diff below which what was kept is no circuit, so that taking more from it costs nothing."""


def _score(table: pd.DataFrame, layer: Layer, measure: str, sample: str, circuit: str = "kept") -> Value:
    """A measure of one circuit with its interval."""
    rows = of_circuit(table, circuit, measure, sample)
    if rows.empty:
        return NONE
    row = rows.iloc[0]
    return Value(*(float(NAN if pd.isna(row[name]) else row[name]) for name in ("value", "low", "high", "n")))


def _kept(table: pd.DataFrame) -> pd.DataFrame:
    """The items of the circuit."""
    items = item_rows(table)
    return items[items["kept"]]


# D.1, edge-attribution


def _edges(table: pd.DataFrame) -> pd.DataFrame:
    """Edges over all positions by rank."""
    items = item_rows(table)
    return items[items["part"].isna() & items["position"].isna()].sort_values("rank")


def _size(table: pd.DataFrame, layer: Layer) -> Value:
    return one(len(_kept(table)))


def _jaccard(own: pd.DataFrame, published: pd.DataFrame, on: list[str]) -> Value:
    ours, theirs = (set(map(tuple, table[on].values)) for table in (own, published))
    return one(len(ours & theirs) / len(ours | theirs))


def _same_edges(table: pd.DataFrame, layer: Layer) -> Value:
    return _jaccard(_kept(table), paper.table("edges"), ["source", "target"])


def _without_order(edges: pd.DataFrame) -> Value | None:
    """A value that says why, if the edges were ranked by scores that rank nothing."""
    if edges["score"].isna().any() or edges["score"].nunique() < 2:
        return Value(why="the scores of all edges are alike or missing: their order says nothing")
    return None


def _rank_to_output(table: pd.DataFrame, layer: Layer) -> Value:
    edges = _edges(table)
    if nothing := _without_order(edges):
        return nothing
    own = edges[(edges["source"] == str(layer)) & (edges["target"] == "output")]["rank"]
    return one(own.iloc[0]) if len(own) else NONE


def _same_order(table: pd.DataFrame, layer: Layer) -> Value:
    edges = _edges(table)
    if nothing := _without_order(edges):
        return nothing
    own, theirs = (list(zip(t["source"], t["target"], strict=True)) for t in (edges, paper.table("edges")))
    pairs = zip(own[:7], theirs[:7], strict=False)
    return one(len(list(takewhile(lambda pair: pair[0] == pair[1], pairs))))


def _order_correlation(table: pd.DataFrame, layer: Layer) -> Value:
    edges = _edges(table)
    if nothing := _without_order(edges):
        return nothing
    both = paper.table("edges").merge(edges, on=["source", "target"], suffixes=("_published", ""))
    ranks = both[["rank_published", "rank"]].astype(float).rank()
    return one(ranks["rank_published"].corr(ranks["rank"]))


# D.2, circuit-search


def _n_kept(table: pd.DataFrame, layer: Layer, part: str | None) -> Value:
    """Items kept: edges (part None), or parts whose name begins so."""
    kept = _kept(table)["part"]
    return one(kept.isna().sum() if part is None else kept.dropna().str.startswith(part).sum())


def _slices_kept(table: pd.DataFrame, layer: Layer | None = None) -> pd.Series:
    """The conv slices that the search keeps, by name: of one layer, or of all."""
    kept = _kept(table)
    parts = kept["part"] if layer is None else kept[kept["source"] == str(layer)]["part"]
    return parts.dropna().loc[lambda names: names.str.startswith("conv")]


def _oldest_kept(table: pd.DataFrame, layer: Layer) -> Value:
    kept = _slices_kept(table)
    return one((kept == "conv-3").sum()) if len(kept) else Value(why="the search keeps no conv slice at all")


def _needs_now(table: pd.DataFrame, layer: Layer) -> Value:
    """1 if patching slice 0 of the layer costs more than SMALL_DROP, 0 if it does not or only others are kept."""
    if _slices_kept(table, layer).empty:
        return Value(why=f"the search keeps no conv slice of layer {layer}")
    kept = _kept(table)
    own = kept[(kept["source"] == str(layer)) & (kept["part"] == "conv0")]["drop"]
    return NONE if own.isna().any() else one(sum(not reaches(SMALL_DROP, drop) for drop in own))


def _part_drop(table: pd.DataFrame, layer: Layer, part: str) -> Value:
    items = item_rows(table)
    own = items[(items["source"] == str(layer)) & (items["part"] == part)]
    if own.empty:
        return NONE
    if pd.isna(own["drop"].iloc[0]):
        return Value(why=f"{part} of layer {layer} was removed: what it would cost is not known")
    return one(own["drop"].iloc[0])


def _drops(table: pd.DataFrame, layer: Layer) -> Value:
    edges, parts = paper.table("edges"), paper.table("circuit-parts").query("kept == 1")
    parts = parts.assign(source=parts["layer"].astype(str), target=parts["layer"].astype(str))
    published = pd.concat([edges.assign(part=""), parts])[["source", "target", "part", "drop"]]
    own = item_rows(table).fillna({"part": ""})
    large = published[published["drop"].ge(LARGE_DROP)]
    found = largest_difference(own, large, ["source", "target", "part"], ("drop_published", "drop"))
    return found if found is not NONE else Value(why="an item with a large published drop was removed or is not there")


# D.3, positional-attribution


def _published_positions(table: pd.DataFrame) -> bool:
    """Whether the prompts are those of the aligned templates: 20 tokens, the names where the paper has them."""
    names = table[table["label"].isin(["n1", "n2", "n3", "n4", "n5"])]["position"].unique()
    return table["position"].max() == 19 and sorted(names) == [3, 5, 7, 13, 15]


def _same_items(table: pd.DataFrame, layer: Layer) -> Value:
    if not _published_positions(table):
        return NONE
    return _jaccard(_kept(table), paper.table("positional-edges"), ["source", "target", "position"])


def _embedding_readers(table: pd.DataFrame, layer: Layer) -> Value:
    if not _published_positions(table):
        return NONE
    names, sets = [3, 5, 7, 13, 15], []
    for items in (_kept(table), paper.table("positional-edges")):
        own = items[(items["source"] == "embed") & items["position"].isin(names)]
        sets.append(set(own["target"]) - {"output"})
    return one(len(sets[0] ^ sets[1]))


def _last_targets(table: pd.DataFrame, layer: Layer) -> Value:
    if not _published_positions(table):
        return NONE
    sets = []
    for items in (_kept(table), paper.table("positional-edges")):
        sets.append(set(items[(items["source"] == str(layer)) & (items["position"] == 19)]["target"]))
    return one(len(sets[0] ^ sets[1]))


def _lost_without_early_output(table: pd.DataFrame, layer: Layer, measure: str) -> Value:
    """What the circuit loses, on the pairs it was chosen on, without the edges that leave the layer too early.

    NONE where the edges removed were another layer's, or there were none.
    """
    module = positional_attribution
    reduced = of_circuit(table, module.LAST_ONLY, measure, "train")
    is_other = item_rows(table)["bottleneck"].iloc[0] != layer
    if is_other or reduced.empty or reduced["size"].iloc[0] == len(_kept(table)):
        return NONE
    whole = _score(table, layer, "normalized_logit_diff", "train").value
    if not reaches(whole, LEAST_KEPT):
        return Value(why=f"the circuit keeps less than {LEAST_KEPT} of the logit difference: it has little to lose")
    return _score(table, layer, measure, "train", module.LOST)


MEASURES: dict[str, Measure] = {
    "eap_size": _size,
    "eap_jaccard": _same_edges,
    "eap_train_accuracy": partial(_score, measure="accuracy", sample="train"),
    "eap_accuracy": partial(_score, measure="accuracy", sample="held out"),
    "eap_nld": partial(_score, measure="normalized_logit_diff", sample="held out"),
    "eap_first": _rank_to_output,
    "eap_top": _same_order,
    "eap_spearman": _order_correlation,
    "acdc_edges": partial(_n_kept, part=None),
    "acdc_conv": partial(_n_kept, part="conv"),
    "acdc_ssm": partial(_n_kept, part="ssm"),
    "acdc_skip": partial(_n_kept, part="skip"),
    "acdc_39_shift": partial(_part_drop, part="conv-1"),
    "acdc_39_now": _needs_now,
    "acdc_minus3": _oldest_kept,
    "acdc_drops": _drops,
    "acdc_accuracy": partial(_score, measure="accuracy", sample="held out"),
    "acdc_nld": partial(_score, measure="normalized_logit_diff", sample="held out"),
    "pos_jaccard": _same_items,
    "pos_embed": _embedding_readers,
    "pos_39_out": _last_targets,
    "prune_39_nonlast": partial(_lost_without_early_output, measure="accuracy"),
    "prune_39_nonlast_nld": partial(_lost_without_early_output, measure="normalized_logit_diff"),
}
