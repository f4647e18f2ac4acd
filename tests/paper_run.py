"""A made-up run of a model of mamba-370m's sizes whose tables hold what the paper published."""

import hashlib
import json

import pandas as pd

from ioi_mamba import paper, versions
from ioi_mamba.analyses import _circuits
from ioi_mamba.analyses.positional_attribution import LAST_ONLY, LOST
from ioi_mamba.circuits.graph import Universe
from ioi_mamba.claims.interventions import NOTEBOOK_PROMPT
from ioi_mamba.tasks.ioi import CORRUPTIONS

NAMES = {3: "n1", 5: "n2", 7: "n3", 13: "n4", 15: "n5"}
LABELS = ["BOS", *map(str, range(1, 19)), "out"]
for _position, _slot in NAMES.items():
    LABELS[_position] = _slot
CHANGED = dict(zip(CORRUPTIONS, (3, 5, 7, 15, 13), strict=True))
SIZES = {"num_hidden_layers": 48, "hidden_size": 1024}
N_PAIRS = {"layer-removal": 20, "cross-talk": 8000}
PROMPTS = {"layer-removal": "layer removal", "cross-talk": "cross-talk"} | dict.fromkeys(
    ("edge-attribution", "circuit-search", "positional-attribution"), "edges"
)
"""How the names of the published prompts begin, by experiment."""


def effects(value, layers=range(48)):
    """Cells of value(corruption, position of the changed name, layer, position), with an interval of 0.02."""
    rows = [
        (corruption, layer, position, label, value(corruption, name, layer, position), 80)
        for corruption, name in CHANGED.items()
        for layer in layers
        for position, label in enumerate(LABELS)
    ]
    table = pd.DataFrame(rows, columns=["corruption", "layer", "position", "label", "effect", "n"])
    return table.assign(low=table["effect"] - 0.01, high=table["effect"] + 0.01, left_out=0)


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


def _items(parts=True):
    items = pd.DataFrame(Universe(48, 4, parts=parts).items()).drop(columns="position")
    return items.astype({"source": "str", "target": "str", "part": "str"})


def _scores(circuit, size, sample, accuracy, nld, n=400, half=0.02):
    """The rows of a circuit, with intervals of 2 half; f and kl, which the paper does not have, are made up."""
    values = {"accuracy": accuracy, "normalized_logit_diff": nld, "f": nld, "kl": 0.1}
    rows = [
        {"measure": measure, "value": value, "low": value - half, "high": value + half}
        for measure, value in values.items()
    ]
    return [{"what": "circuit", "circuit": circuit, "size": size, "sample": sample, "n": n} | row for row in rows]


def _circuit(size, train, held, curve=()):
    """The rows that every circuit experiment has; train, held: (accuracy, normalized logit diff), curve: (size, both)."""
    rows = _scores("kept", size, "train", *train) + _scores("kept", size, "held out", *held)
    rows += _scores("all but kept", size, "held out", 0.25, 0.05)
    rows += [row for _ in range(_circuits.N_RANDOM) for row in _scores("random", size, "held out", 0.3, 0.1, 60)]
    for point in curve:
        rows += _scores("first k", point[0], "held out", *point[1:], 60)
    areas = {"cpr": 0.9, "cmd": 0.1} if curve else {}
    area = {"what": "circuit", "circuit": "first k", "sample": "held out", "n": 60}
    return rows + [area | {"measure": m, "value": v, "low": v - 0.02, "high": v + 0.02} for m, v in areas.items()]


def edge_attribution():
    published = paper.table("edges").set_index(["source", "target"])
    items = _items()
    edges = items[items["part"].isna()].merge(published["rank"].reset_index(), "left", on=["source", "target"])
    missing = edges["rank"].isna()
    edges.loc[missing, "rank"] = range(len(published) + 1, len(edges) + 1)
    table = pd.concat([edges, items[items["part"].notna()]], ignore_index=True)
    drops = published["drop"].fillna(0.0).reindex(pd.MultiIndex.from_frame(table[["source", "target"]])).fillna(0.0)
    table = table.assign(score=-1.0 / table["rank"].fillna(2000), exact=-drops.to_numpy(), kept=table["rank"] <= 188)
    table = table.assign(low=table["score"], high=table["score"], estimate=table["score"], n=400, n_exact=30)
    table = table.assign(position=pd.NA, label=None, ranking="signed", method="eap-ig").sort_values("rank")
    counts = paper.table("edge-counts").sort_values("size")[["size", "accuracy", "normalized_logit_diff"]]
    curve = [(0, 0.2, 0.0), *counts.itertuples(index=False, name=None), (len(edges), 0.95, 1.0)]
    rows = _circuit(188, (0.8524, 0.8433), (0.8786, 0.8359), curve)
    spearman = {"what": "circuit", "circuit": "edges", "size": len(edges), "sample": "train", "measure": "spearman"}
    return _circuits.table_of(table, [*rows, spearman | {"value": 0.9, "n": 30}])


def circuit_search():
    edges, parts = paper.table("edges").query("kept_by_search == 1"), paper.table("circuit-parts").query("kept == 1")
    drops = {(row.source, row.target, ""): row.drop for row in edges.itertuples()}
    drops |= {(str(row.layer), str(row.layer), row.part): row.drop for row in parts.itertuples()}
    table = _items()
    keys = list(zip(table["source"], table["target"], table["part"].fillna(""), strict=True))
    table = table.assign(kept=[key in drops for key in keys], drop=[drops.get(key) for key in keys])
    table = table.astype({"drop": float}).assign(score=-1.0, started=True, method="eap-ig")
    tests = {"what": "circuit", "circuit": "kept", "size": len(drops), "sample": "train", "measure": "tests"}
    rows = [*_circuit(len(drops), (0.85, 0.8454), (0.8825, 0.8399)), tests | {"value": 3000.0, "n": 400}]
    return _circuits.table_of(table, rows, columns=("threshold",))


def positional_attribution():
    kept = set(paper.table("positional-edges").itertuples(index=False, name=None))
    rows = [
        (source, target, position, LABELS[position], (source, target, position) in kept)
        for source, target, _ in _items(parts=False).itertuples(index=False, name=None)
        for position in range(20)
    ]
    table = pd.DataFrame(rows, columns=["source", "target", "position", "label", "kept"])
    table = table.sort_values("kept", ascending=False, kind="stable", ignore_index=True)
    table = table.assign(rank=range(1, len(table) + 1), score=-1.0, low=-1.0, high=-1.0, n=400, bottleneck=39)
    curve = [(0, 0.2, 0.0), (700, 0.852, 0.877), (len(table), 0.95, 1.0)]
    circuits = _circuit(700, (0.852, 0.877), (0.85, 0.877), curve)
    early = sum(source == "39" and position < 19 for source, _, position in kept)
    for sample in ("train", "held out"):
        circuits += _scores(LAST_ONLY, 700 - early, sample, 0.838, 0.873)
        circuits += _scores(LOST, 700 - early, sample, 0.852 - 0.838, 0.877 - 0.873, half=0.01)
    return _circuits.table_of(table.assign(ranking="signed", method="eap-ig"), circuits)


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
        "versions": versions.versions(),
        "n_pairs": N_PAIRS.get(name, 400),
        "prompts_sha256": {
            prompts.part: prompts.sha256
            for prompts in paper.table("prompts").itertuples()
            if prompts.name.startswith(PROMPTS.get(name, "none"))
        },
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
