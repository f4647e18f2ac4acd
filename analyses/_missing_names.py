"""Which names which layer receives, in the form of the paper's lists "Missing n1: layers 1, 5, 8" (D.3.1 to D.3.5).

Read off the kept (edge, position) items of positional attribution, for any model and bottleneck layer. A name is a
position whose label is n1, n2, ...
"""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from ioi_mamba.charts.circuit_axes import mixer_node, node_place

FROM_EMBED, FROM_FIRST, FROM_EITHER = "from embed", "from layer 0", "from embed or layer 0"
"""Tables of what a layer receives (D.3.1, D.3.2, D.3.3); the other two are `into_bottleneck` and what leaves it."""


def into_bottleneck(layer: int) -> str:
    """Name of the table of what earlier layers send to the bottleneck (D.3.4); its nodes are the senders."""
    return f"to layer {layer}"


def names_in(labels: Iterable[str]) -> list[str]:
    """The labels that are names, in order of appearance."""
    return [label for label in dict.fromkeys(labels) if label[:1] == "n" and label[1:].isdigit()]


def missing_names(items: pd.DataFrame, layer: int) -> pd.DataFrame:
    """Columns table, node, label, has: whether an item with that name is kept; one row a layer and name.

    items: rows source, target, label, kept of all (edge, position) items. layer: the bottleneck.
    """
    names = names_in(items.sort_values("position")["label"])
    kept = set(items.loc[items["kept"], ["source", "target", "label"]].itertuples(index=False, name=None))
    layers = sorted(set(items["target"]) - {"output"}, key=node_place)
    bottleneck = mixer_node(layers, layer)
    is_kept = lambda *edge: edge in kept
    tables = {
        FROM_EMBED: (layers, lambda node, name: is_kept("embed", node, name)),
        FROM_FIRST: (layers[1:], lambda node, name: is_kept(layers[0], node, name)),
        FROM_EITHER: (layers, lambda node, name: is_kept("embed", node, name) or is_kept(layers[0], node, name)),
        into_bottleneck(layer): (
            layers[: layers.index(bottleneck)],
            lambda node, name: is_kept(node, bottleneck, name),
        ),
    }
    rows = [
        (table, node, name, has(node, name))
        for table, (nodes, has) in tables.items()
        for name in names
        for node in nodes
    ]
    return pd.DataFrame(rows, columns=["table", "node", "label", "has"])


def listed(table: pd.DataFrame) -> str:
    """ "n1: layers 1, 5; n2: layer 3; all: layers 6 to 7", nodes that miss every name under "all"; "" for none."""
    missing = table[~table["has"]].groupby("node")["label"].agg(list)
    n_names = table["label"].nunique()
    nothing = [node for node, labels in missing.items() if len(labels) == n_names]
    clauses = []
    for name in dict.fromkeys(table["label"]):
        nodes = [node for node, labels in missing.items() if name in labels and node not in nothing]
        if nodes:
            clauses.append(f"{name}: {layers_text(nodes)}")
    if nothing:
        clauses.append(f"every name: {layers_text(nothing)}")
    return "; ".join(clauses)


def layers_text(nodes: Iterable[str]) -> str:
    """ "layer 3", or "layers 1, 5 to 8": runs of three or more are drawn together; sub-blocks one by one."""
    nodes = list(nodes)
    if not all(node.isdigit() for node in nodes):
        return ", ".join(sorted(nodes, key=node_place))
    numbers, runs = sorted(map(int, nodes)), []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ("layer " if len(numbers) == 1 else "layers ") + ", ".join(texts)


def sentences(items: pd.DataFrame, layer: int) -> list[str]:
    """The five lists in words; none for prompts without names."""
    table = missing_names(items, layer)
    if table.empty:
        return []
    out = []
    intro = {
        FROM_EMBED: "Names that embed does not send",
        FROM_FIRST: "Names that layer 0 does not send",
        FROM_EITHER: "Names that neither of them sends",
        into_bottleneck(layer): f"Names that earlier layers do not send to layer {layer}",
    }
    for name, text in intro.items():
        here = table[table["table"] == name]
        if len(here):
            out.append(f"{text}: {listed(here) or 'none is missing'}.")
    kept = items[items["kept"]]
    out += _terms(table, kept, layer)
    names, node = set(names_in(items["label"])), mixer_node(items["target"], layer)
    extra = kept[(kept["target"] == node) & ~kept["label"].isin(names) & ~kept["source"].isin(["embed"])]
    if len(extra):
        out.append(f"Layer {layer} also receives {_by_label(extra, 'source')}.")
    leaving = kept[kept["source"] == node]
    out.append(
        f"Layer {layer} sends {_by_label(leaving, 'target')}." if len(leaving) else f"Layer {layer} sends nothing."
    )
    return out


def _by_label(items: pd.DataFrame, node: str) -> str:
    """ "n1 to/from layers 3, 4; out ..." of kept items, by position."""
    word = "to" if node == "target" else "from"
    clauses = []
    for label in dict.fromkeys(items.sort_values("position")["label"]):
        nodes = items.loc[items["label"] == label, node].tolist()
        clauses.append(f"{label} {word} {_nodes(nodes)}")
    return "; ".join(clauses)


def _terms(table: pd.DataFrame, kept: pd.DataFrame, layer: int) -> list[str]:
    """For layers that miss some names of embed and layer 0: who else sends them, and where they go (D.3.3)."""
    either, bottleneck = table[table["table"] == FROM_EITHER], mixer_node(table["node"], layer)
    some = either.groupby("node")["has"].any()
    out = []
    for row in either[~either["has"] & either["node"].map(some)].itertuples():
        here = kept[kept["label"] == row.label]
        sources = here.loc[here["target"] == row.node, "source"].tolist()
        targets = here.loc[here["source"] == row.node, "target"].tolist()
        if sources or [t for t in targets if t != bottleneck]:
            out.append(f"layer {row.node} gets {row.label} from {_nodes(sources)} and sends to {_nodes(targets)}")
    return [f"Of the missing names, {'; '.join(out)}."] if out else []


def _nodes(nodes: list[str]) -> str:
    layers = [node for node in nodes if node not in ("embed", "output")]
    others = [node for node in nodes if node in ("embed", "output")]
    return " and ".join(([layers_text(layers)] if layers else []) + others) or "no one"
