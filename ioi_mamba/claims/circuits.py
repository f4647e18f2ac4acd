"""The numbers of section 5 and appendix D: edges, parts and positions that a circuit keeps."""

from __future__ import annotations

from functools import partial
from itertools import takewhile

import pandas as pd

from ioi_mamba import paper

from .values import NONE, Measure, Value, accuracy, largest_difference, one

LARGE_DROP = 0.045


# D.1, edge-attribution


def _edges(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["part"].isna() & table["rank"].notna()].sort_values("rank")


def _first_row(table: pd.DataFrame, layer: int, column: str) -> Value:
    row = table.iloc[0]
    return accuracy(row) if column == "accuracy" else one(row[column])


def _jaccard(own: pd.DataFrame, published: pd.DataFrame, on: list[str]) -> Value:
    ours, theirs = (set(map(tuple, table[on].values)) for table in (own, published))
    return one(len(ours & theirs) / len(ours | theirs))


def _same_edges(table: pd.DataFrame, layer: int) -> Value:
    return _jaccard(table[table["kept"]], paper.table("edges"), ["source", "target"])


def _rank_to_output(table: pd.DataFrame, layer: int) -> Value:
    edges = _edges(table)
    own = edges[(edges["source"] == str(layer)) & (edges["target"] == "output")]["rank"]
    return one(own.iloc[0]) if len(own) else NONE


def _same_order(table: pd.DataFrame, layer: int) -> Value:
    own, theirs = (list(zip(t["source"], t["target"], strict=True)) for t in (_edges(table), paper.table("edges")))
    pairs = zip(own[:7], theirs[:7], strict=False)
    return one(len(list(takewhile(lambda pair: pair[0] == pair[1], pairs))))


def _order_correlation(table: pd.DataFrame, layer: int) -> Value:
    both = paper.table("edges").merge(_edges(table), on=["source", "target"], suffixes=("_published", ""))
    ranks = both[["rank_published", "rank"]].astype(float).rank()
    return one(ranks["rank_published"].corr(ranks["rank"]))


# D.2, circuit-search


def _n_kept(table: pd.DataFrame, layer: int, part: str | None) -> Value:
    """Items kept: edges (part None), or parts whose name begins so."""
    kept = table.loc[table["kept"], "part"]
    return one(kept.isna().sum() if part is None else kept.dropna().str.startswith(part).sum())


def _part_drop(table: pd.DataFrame, layer: int, part: str) -> Value:
    own = table[(table["source"] == str(layer)) & (table["part"] == part)]
    return one(own["drop"].fillna(0.0).iloc[0]) if len(own) else NONE


def _drops(table: pd.DataFrame, layer: int) -> Value:
    edges, parts = paper.table("edges"), paper.table("circuit-parts").query("kept == 1")
    parts = parts.assign(source=parts["layer"].astype(str), target=parts["layer"].astype(str))
    published = pd.concat([edges.assign(part=""), parts])[["source", "target", "part", "drop"]]
    own = table.assign(part=table["part"].fillna(""), drop=table["drop"].fillna(0.0))
    large = published[published["drop"] >= LARGE_DROP]
    return largest_difference(own, large, ["source", "target", "part"], ("drop_published", "drop"))


# D.3, positional-attribution


def _published_positions(table: pd.DataFrame) -> bool:
    """Whether the prompts are those of the aligned templates: 20 tokens, the names where the paper has them."""
    names = table[table["label"].isin(["n1", "n2", "n3", "n4", "n5"])]["position"].unique()
    return table["position"].max() == 19 and sorted(names) == [3, 5, 7, 13, 15]


def _same_items(table: pd.DataFrame, layer: int) -> Value:
    if not _published_positions(table):
        return NONE
    return _jaccard(table[table["kept"]], paper.table("positional-edges"), ["source", "target", "position"])


def _embedding_readers(table: pd.DataFrame, layer: int) -> Value:
    if not _published_positions(table):
        return NONE
    names, sets = [3, 5, 7, 13, 15], []
    for items in (table[table["kept"]], paper.table("positional-edges")):
        own = items[(items["source"] == "embed") & items["position"].isin(names)]
        sets.append(set(own["target"]) - {"output"})
    return one(len(sets[0] ^ sets[1]))


def _last_targets(table: pd.DataFrame, layer: int) -> Value:
    if not _published_positions(table):
        return NONE
    sets = []
    for items in (table[table["kept"]], paper.table("positional-edges")):
        sets.append(set(items[(items["source"] == str(layer)) & (items["position"] == 19)]["target"]))
    return one(len(sets[0] ^ sets[1]))


MEASURES: dict[str, Measure] = {
    "eap_size": partial(_first_row, column="size"),
    "eap_jaccard": _same_edges,
    "eap_train_accuracy": partial(_first_row, column="train_accuracy"),
    "eap_accuracy": partial(_first_row, column="accuracy"),
    "eap_nld": partial(_first_row, column="normalized_logit_diff"),
    "eap_first": _rank_to_output,
    "eap_top": _same_order,
    "eap_spearman": _order_correlation,
    "acdc_edges": partial(_n_kept, part=None),
    "acdc_conv": partial(_n_kept, part="conv"),
    "acdc_ssm": partial(_n_kept, part="ssm"),
    "acdc_skip": partial(_n_kept, part="skip"),
    "acdc_39_shift": partial(_part_drop, part="conv-1"),
    "acdc_39_now": partial(_part_drop, part="conv0"),
    "acdc_minus3": partial(_n_kept, part="conv-3"),
    "acdc_drops": _drops,
    "acdc_accuracy": partial(_first_row, column="accuracy"),
    "acdc_nld": partial(_first_row, column="normalized_logit_diff"),
    "pos_jaccard": _same_items,
    "pos_embed": _embedding_readers,
    "pos_39_out": _last_targets,
}
