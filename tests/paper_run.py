"""A made-up run of a model of mamba-370m's sizes whose tables hold what the paper published."""

import hashlib
import json

import pandas as pd

from ioi_mamba import doctor, paper
from ioi_mamba.claims.interventions import NOTEBOOK_PROMPT
from ioi_mamba.graph import Universe
from ioi_mamba.tasks.ioi import CORRUPTIONS

NAMES = {3: "n1", 5: "n2", 7: "n3", 13: "n4", 15: "n5"}
LABELS = ["BOS", *map(str, range(1, 19)), "out"]
for _position, _slot in NAMES.items():
    LABELS[_position] = _slot
CHANGED = dict(zip(CORRUPTIONS, (3, 5, 7, 15, 13), strict=True))
SIZES = {"num_hidden_layers": 48, "hidden_size": 1024}
N_PAIRS = {"layer-removal": 20, "cross-talk": 8000}


def effects(value, layers=range(48)):
    """Cells of value(corruption, position of the changed name, layer, position), with an interval of 0.02."""
    rows = [
        (corruption, layer, position, label, value(corruption, name, layer, position), 80)
        for corruption, name in CHANGED.items()
        for layer in layers
        for position, label in enumerate(LABELS)
    ]
    table = pd.DataFrame(rows, columns=["corruption", "layer", "position", "label", "effect", "n"])
    return table.assign(low=table["effect"] - 0.01, high=table["effect"] + 0.01, vanishing=0)


def layer_ablation():
    """The two layers of the text; figure 4's ratios on the scale of the exact pair."""
    ratio = dict(zip(CORRUPTIONS, (0.757, 0.8, 0.859, 0.7, 0.7), strict=True))
    at_last = 0.066 / 0.43

    def value(corruption, name, layer, position):
        if position == name:
            return 0.925 * {39: 1.0, 0: ratio[corruption]}.get(layer, 0.0)
        return 0.925 * at_last if (layer, position) == (47, 19) else 0.0

    return effects(value)


def layer_removal():
    published = paper.table("layer-removal")
    rows = [("none", 0, None, 0.95, 0.83)]
    rows += [("single", 1, row.layer, row.accuracy, row.probability) for row in published.itertuples()]
    rows += [("greedy", step, 48 - step, 0.95 if step <= 24 else 0.5, 0.8) for step in range(1, 48)]
    table = pd.DataFrame(rows, columns=["mode", "step", "layer", "accuracy", "probability"])
    return table.assign(n=20, valid_accuracy=pd.NA).astype({"layer": "Int64", "valid_accuracy": "Float64"})


def cross_talk():
    """The 20 searches, the first as in the notebook, whose candidates are published."""
    steps, notebook = paper.table("cross-talk-steps"), paper.table("cross-talk-notebook")
    first = (steps["template"] == "Then") & (steps["corruption"] == CORRUPTIONS[0])
    chosen = pd.concat([steps[~first].assign(chosen=True), notebook.assign(template="Then", corruption=CORRUPTIONS[0])])
    start = chosen[["template", "corruption"]].drop_duplicates().assign(step=0, layer=pd.NA, accuracy=0.0, chosen=False)
    table = pd.concat([start, chosen.drop(columns="accuracy_before")], ignore_index=True)
    table = table.astype({"layer": "Int64", "chosen": bool, "accuracy": float}).assign(probability=0.5, n=400)
    members = set(table[table["chosen"]][["template", "corruption", "layer"]].itertuples(index=False, name=None))
    keys = table[["template", "corruption", "layer"]].itertuples(index=False, name=None)
    return table.assign(in_circuit=[key[2] is not pd.NA and key in members for key in keys], reached=True)


def state_similarity():
    table = paper.table("state-similarity")
    labels = {"row_label": table["row"].astype(str), "column_label": table["column"].astype(str)}
    after = table["row"].isin([name + 1 for name in NAMES])
    return table.assign(prompt=NOTEBOOK_PROMPT, after_name=after, layer=39, **labels)


def conv_shift():
    shown = paper.table("conv-shift")
    values = shown.set_index(["corruption", "slice", "position"])["effect_over_peak"] * 0.96
    tables = []
    for s in (-3, -2, -1, 0):
        one = effects(lambda c, name, layer, at, s=s: 0.0 if s == -3 else values[c, s, at], layers=[39])
        one.insert(2, "slice", s)
        tables.append(one)
    return pd.concat(tables, ignore_index=True)


def name_steering():
    table = paper.table("name-steering")
    return table.assign(success=table["successes"] / table["n"], low=0.0, high=1.0, layer=39, offset=1)


def state_ablation():
    return effects(lambda c, name, layer, at: 0.0 if layer != 39 else 0.01 if at <= name else 0.8)


def output_ablation():
    return effects(lambda c, name, layer, at: 0.5 if (layer, at) == (39, 19) else 0.01)


def _items():
    items = pd.DataFrame(Universe(48, 4, parts=True).items()).drop(columns="position")
    return items.astype({"source": "object", "target": "object"})


def edge_attribution():
    ranks = paper.table("edges").set_index(["source", "target"])["rank"]
    items = _items()
    edges = items[items["part"].isna()]
    found = [ranks.get(key) for key in zip(edges["source"], edges["target"], strict=True)]
    rest = iter(range(len(ranks) + 1, len(edges) + 1))
    edges = edges.assign(rank=[next(rest) if rank is None else rank for rank in found])
    table = pd.concat([edges, items[items["part"].notna()].assign(rank=pd.NA)], ignore_index=True)
    table["rank"] = table["rank"].astype("Int64")
    table["score"] = -1.0 / table["rank"].astype(float).fillna(2000.0)
    table["kept"] = (table["rank"] <= 188).fillna(False).astype(bool)
    scores = {"size": 188, "train_accuracy": 0.8524, "accuracy": 0.8786, "normalized_logit_diff": 0.8359, "n": 400}
    return table.sort_values("rank", ignore_index=True).assign(**scores, ranking="signed")


def circuit_search():
    edges, parts = paper.table("edges").query("kept_by_search == 1"), paper.table("circuit-parts").query("kept == 1")
    drops = {(row.source, row.target, ""): row.drop for row in edges.itertuples()}
    drops |= {(str(row.layer), str(row.layer), row.part): row.drop for row in parts.itertuples()}
    table = _items()
    keys = list(zip(table["source"], table["target"], table["part"].fillna(""), strict=True))
    table = table.assign(kept=[key in drops for key in keys], drop=[drops.get(key) for key in keys])
    scores = {"train_accuracy": 0.85, "accuracy": 0.8825, "train_nld": 0.845, "normalized_logit_diff": 0.8399}
    return table.astype({"drop": float}).assign(**scores, tests=3000, n=400)


def positional_attribution():
    kept = set(paper.table("positional-edges").itertuples(index=False, name=None))
    rows = [
        (source, target, position, LABELS[position], (source, target, position) in kept)
        for source, target, part in _items().itertuples(index=False, name=None)
        if part is None or pd.isna(part)
        for position in range(20)
    ]
    table = pd.DataFrame(rows, columns=["source", "target", "position", "label", "kept"])
    table = table.sort_values("kept", ascending=False, kind="stable", ignore_index=True)
    scores = {"size": 700, "train_accuracy": 0.852, "accuracy": 0.85, "normalized_logit_diff": 0.877, "n": 400}
    return table.assign(rank=range(1, len(table) + 1), score=-1.0, **scores, ranking="signed")


def tables():
    """By experiment."""
    makers = (layer_ablation, layer_removal, cross_talk, state_similarity, conv_shift, name_steering)
    makers += (state_ablation, output_ablation, edge_attribution, circuit_search, positional_attribution)
    return {maker.__name__.replace("_", "-"): maker() for maker in makers}


def manifest(name, **entries):
    """What `study` would write beside a table of the published run."""
    model = {"id": "made-up/mamba-370m", "architecture": "mamba", "config": SIZES, "weights_sha256": "0f" * 32}
    return {
        "analysis": name,
        "model": model,
        "seed": 27,
        "pairs_sha256": "ab" * 32,
        "options": {},
        "device": "cpu",
        "dtype": "float32",
        "kernels": [],
        "versions": doctor.versions(),
        "n_pairs": N_PAIRS.get(name, 400),
        "wall_seconds": 1.0,
        "peak_memory_mib": 300.0,
        "created": "2026-01-05T10:00:00+00:00",
    } | entries


def write(directory, results, **entries):
    """Tables with manifests that vouch for them."""
    directory.mkdir(exist_ok=True)
    for name, table in results.items():
        path = directory / f"{name}.parquet"
        table.to_parquet(path, index=False)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        text = json.dumps(manifest(name, table_sha256=digest, **entries))
        (directory / f"{name}.json").write_text(text)
