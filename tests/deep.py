"""Tables of every experiment as a deep model gives them on long prompts, with random numbers."""

import random

import pandas as pd

from ioi_mamba.analyses import _circuits, circuit_stability
from ioi_mamba.analyses.positional_attribution import LAST_ONLY, LOST
from ioi_mamba.analyses.state_similarity import MEASURES
from ioi_mamba.circuits.graph import Universe
from ioi_mamba.passes.ablations import ABLATIONS
from ioi_mamba.tasks.ioi import CORRUPTIONS, TEMPLATES

NAMES = {3: "n1", 5: "n2", 7: "n3", 13: "n4", 15: "n5"}


def labels(n_positions):
    return ["BOS", *(NAMES.get(k, f"n5+{k}") for k in range(1, n_positions - 1)), "out"]


def tables(n_layers, n_positions):
    """By experiment."""
    draw, names = random.Random(3), labels(n_positions)
    layers, at = range(n_layers), list(enumerate(names))

    def effects(corruptions=CORRUPTIONS, of_layers=layers):
        rows = [
            (c, layer, p, name, draw.uniform(-1, 1), 80) for c in corruptions for layer in of_layers for p, name in at
        ]
        table = pd.DataFrame(rows, columns=["corruption", "layer", "position", "label", "effect", "n"])
        return table.assign(low=table["effect"] - 0.1, high=table["effect"] + 0.1, left_out=0)

    def slices():
        one = lambda s: effects(of_layers=[n_layers // 2]).assign(slice=s)
        return pd.concat([one(s) for s in range(-3, 1)], ignore_index=True)

    def removal():
        rows = [("none", 0, None), *(("single", 1, k) for k in layers), *(("greedy", k, k) for k in layers if k)]
        table = pd.DataFrame(rows, columns=["mode", "step", "layer"]).astype({"layer": "Int64"})
        numbers = {name: [draw.random() for _ in rows] for name in ("accuracy", "probability", "valid_accuracy")}
        return table.assign(n=80, **numbers)

    def circuits_of_layers():
        rows = [
            (template.split()[0], corruption, step, layer, draw.random(), draw.random(), 400, True, step < 5, True)
            for template in TEMPLATES
            for corruption in CORRUPTIONS
            for step, layer in enumerate([None, *draw.sample(layers, n_layers)])
        ]
        columns = "template corruption step layer accuracy probability n chosen in_circuit reached".split()  # noqa: SIM905
        table = pd.DataFrame(rows, columns=columns).astype({"layer": "Int64"})
        return table.assign(chosen=table["step"] > 0)

    def similarity():
        rows = [
            (f"prompt {p}", measure, i, j, draw.uniform(-1, 1), names[i], names[j], i in (4, 6, 8), 3)
            for p in range(3)
            for measure in MEASURES
            for i in range(n_positions)
            for j in range(n_positions)
        ]
        columns = "prompt measure row column similarity row_label column_label after_name layer".split()  # noqa: SIM905
        return pd.DataFrame(rows, columns=columns)

    def steering():
        rows = [
            (method, slot, source, draw.random(), 100, 0.0, 1.0, 3, 1)
            for method in ("replace", "subtract-add")
            for slot in range(1, 6)
            for source in range(1, 6)
        ]
        columns = ["method", "slot", "source_slot", "success", "n", "low", "high", "layer", "offset"]
        return pd.DataFrame(rows, columns=columns)

    def scores(circuit, size, sample):
        value = draw.random()
        row = {"what": "circuit", "circuit": circuit, "size": size, "sample": sample, "n": 60}
        return [
            row | {"measure": m, "value": value, "low": value - 0.1, "high": value + 0.1} for m in _circuits.MEASURES
        ]

    def circuits(n_items):
        rows = scores("kept", 20, "train") + scores("kept", 20, "held out") + scores("all but kept", 20, "held out")
        rows += [row for _ in range(5) for row in scores("random", 20, "held out")]
        for size in _circuits.sizes_of_curve(n_items, 20):
            rows += scores("first k", size, "held out")
        area = {"what": "circuit", "circuit": "first k", "sample": "held out", "n": 60, "low": 0.0, "high": 1.0}
        return rows + [area | {"measure": measure, "value": 0.5} for measure in ("cpr", "cmd")]

    def items(parts, positions=False):
        universe = Universe(n_layers, 4, parts, n_positions if positions else None)
        table = pd.DataFrame(universe.items()).astype({"source": "str", "target": "str", "part": "str"})
        table["label"] = [names[p] for p in table["position"]] if positions else None
        return table.assign(score=[draw.uniform(-1, 1) for _ in range(len(table))], n=400)

    def ranked(table):
        table = table.sort_values("score", ignore_index=True)
        return table.assign(rank=range(1, len(table) + 1), kept=table.index < 20, ranking="signed", method="eap-ig")

    def edges():
        whole = items(parts=True)
        whole = whole.assign(exact=whole["score"] * 0.9, estimate=whole["score"], low=-1.0, high=1.0, n_exact=25)
        is_edge = whole["part"].isna()
        rows = [ranked(whole[is_edge]), whole[~is_edge], items(parts=False, positions=True)]
        correlation = {"what": "circuit", "circuit": "edges", "size": 9, "sample": "train", "measure": "spearman"}
        table = pd.concat(rows, ignore_index=True).assign(ranking="signed", method="eap-ig")
        return _circuits.table_of(table, [*circuits(int(is_edge.sum())), correlation | {"value": 0.9, "n": 25}])

    def search():
        table = items(parts=True).drop(columns="position").assign(started=True, method="eap-ig")
        table = table.assign(kept=table["score"] > 0, drop=table["score"].where(table["score"] > 0))
        tests = {"what": "circuit", "circuit": "kept", "size": 20, "sample": "train", "measure": "tests"}
        return _circuits.table_of(table, [*circuits(20), tests | {"value": 3000.0, "n": 400}], columns=("threshold",))

    def positional():
        table = ranked(items(parts=False, positions=True).drop(columns="part")).assign(low=-1.0, high=1.0, bottleneck=3)
        rows = circuits(len(table))
        for sample in ("train", "held out"):
            rows += scores(LAST_ONLY, 19, sample) + scores(LOST, 19, sample)
        return _circuits.table_of(table, rows)

    def kinds():
        nodes = ["embed", *map(str, layers)]
        rows = [
            (kind, side, node, draw.uniform(-1, 1), draw.random(), 80)
            for kind in ABLATIONS
            for side in ("output", "input")
            for node in nodes[side == "input" :]
        ]
        table = pd.DataFrame(rows, columns=["ablation", "side", "node", "effect", "accuracy", "n"])
        return table.assign(low=-1.0, high=1.0, left_out=0)

    def stability():
        tables = []
        for what, table in (("item", items(parts=True)), ("role", items(parts=False, positions=True))):
            table = table.drop(columns="position").sample(min(len(table), 1500), random_state=3)
            for size in circuit_stability.sizes_of(len(table)):
                often = [draw.random() for _ in range(len(table))]
                rows = table.assign(what=what, size=size, frequency=often, overall=often, low=-1.0, high=1.0)
                tables.append(rows.assign(kept=rows["frequency"] > 0.5, core=rows["frequency"] > 0.95))
        names = ("consensus", "core", "first k", "random", "consensus by role", circuit_stability.ADVANTAGE)
        rows = [row for size in (9, 20, 40, 90) for name in names for row in scores(name, size, "held out")]
        area = {"what": "circuit", "sample": "held out", "n": 60, "low": 0.0, "high": 1.0, "value": 0.5}
        grids = (_circuits.MIB_GRID, circuit_stability.RANDOM_GRID)
        rows += [area | {"circuit": name, "measure": measure} for name in grids for measure in ("cpr", "cmd")]
        table = pd.concat([*tables, pd.DataFrame(rows)], ignore_index=True)
        chosen = {name: table[name].eq(True) for name in ("core", "kept")}
        texts = dict.fromkeys(("source", "target", "part", "label", "circuit", "sample", "measure"), "str")
        types = texts | {"size": "Int64", "n": "Int64"}
        return table.assign(**chosen).astype(types).assign(left_out=0, method="eap-ig")

    def flows():
        rows = [
            (layer, source, target, s, t, path, draw.uniform(-1, 1), -1.0, 1.0, 80)
            for layer in layers
            for path in ("conv", "state")
            for t, target in at
            for s, source in at[: t + 1]
        ]
        columns = ["layer", "source", "target", "source_place", "target_place", "path", "score", "low", "high", "n"]
        return pd.DataFrame(rows, columns=columns).assign(left_out=0, method="eap")

    def reading():
        rows = [("direct", None, "out", n_positions, "embed")]
        rows += [("direct", k, "out", n_positions, "mamba") for k in layers]
        rows += [("source", k, name, p, "state") for k in layers for p, name in at]
        rows += [("source", k, "out", n_positions, "D x") for k in layers]
        rows += [("lens", k, "out", n_positions, "stream") for k in layers]
        rows += [("tuned lens", k, "out", n_positions, "stream") for k in layers]
        rows = [(*row, "") for row in rows]
        rows += [("exchanged", k, "out", n_positions, "mamba", way) for k in layers for way in ("identity", "place")]
        ways = ("from bottleneck", "to output")
        rows += [("carried", k, "out", n_positions, "mamba", way) for k in layers[4:] for way in ways]
        columns = ["what", "layer", "position", "place", "part", "way"]
        table = pd.DataFrame(rows, columns=columns).astype({"layer": "Int64"})
        table = table.assign(contribution=[draw.uniform(-1, 1) for _ in rows], low=-1.0, high=1.0, n=80)
        return table.assign(bottleneck=3, left_out=0)

    def of_features():
        rows = []
        for site in ("ssm_input", "out_proj"):
            own = {"site": site, "item": "", "role": "", "word": "", "examples": "", "carries_name": False, "n": 80}
            for way in ("features", "features, error clean", "components", "channels"):
                left = {"what": "left", "way": way, "measure": "normalized logit diff"}
                rows += [own | left | {"size": 2**k, "value": draw.random()} for k in range(14)]
                item = {"what": "feature", "way": way, "word": "Mary", "alike": 0.9, "measure": "score", "offset": 1}
                shown = range(1, 13) if way != "features, error clean" else ()
                rows += [own | item | {"item": str(k), "rank": k, "value": draw.uniform(-1, 0)} for k in shown]
            fit = {"what": "fit", "way": "features", "size": 512, "value": 0.1}
            rows += [own | fit | {"measure": "unexplained, held-out prompts"}]
        table = pd.DataFrame(rows).astype({name: "Int64" for name in ("size", "rank", "offset")})
        table = table.assign(low=table["value"] - 0.1, high=table["value"] + 0.1, layer=3, left_out=0, method="eap")
        return table

    return {
        "layer-ablation": effects(),
        "layer-removal": removal(),
        "cross-talk": circuits_of_layers(),
        "state-similarity": similarity(),
        "conv-shift": slices(),
        "name-steering": steering(),
        "state-ablation": effects(),
        "output-ablation": effects(),
        "edge-attribution": edges(),
        "circuit-search": search(),
        "positional-attribution": positional(),
        "ablation-kinds": kinds(),
        "circuit-stability": stability(),
        "token-flow": flows(),
        "decoding": reading(),
        "features": of_features(),
    }
