"""The lists of missing names, on a circuit made up for them."""

import pandas as pd
import pytest

from ioi_mamba.analyses import _missing_names as mn

LABELS = ["BOS", "n1", "n2", "out"]
LAYERS = range(5)
BOTTLENECK = 3


def items(kept):
    """All (edge, position) items of five layers, in an order that is not that of positions; `kept` as tuples."""
    nodes = ["embed", *map(str, LAYERS), "output"]
    rows = [
        (source, target, position, label, (source, target, label) in kept)
        for position, label in reversed(list(enumerate(LABELS)))
        for j, target in enumerate(nodes)
        for source in nodes[:j]
    ]
    return pd.DataFrame(rows, columns=["source", "target", "position", "label", "kept"])


EDGES = {
    ("embed", "0", "n1"),
    ("embed", "0", "n2"),
    ("0", "1", "n1"),
    ("embed", "2", "n2"),
    ("1", "2", "n1"),
    ("2", "4", "n1"),
    ("0", "3", "n1"),
    ("1", "3", "n1"),
    ("1", "3", "out"),
    ("3", "4", "n2"),
    ("3", "output", "out"),
}


def test_a_layer_has_a_name_where_an_edge_that_brings_it_is_kept():
    table = mn.missing_names(items(EDGES), BOTTLENECK)
    has = {(t, n, label) for t, n, label, has in table.itertuples(index=False, name=None) if has}
    assert has == {
        (mn.FROM_EMBED, "0", "n1"),
        (mn.FROM_EMBED, "0", "n2"),
        (mn.FROM_EMBED, "2", "n2"),
        (mn.FROM_FIRST, "1", "n1"),
        (mn.FROM_FIRST, "3", "n1"),
        (mn.FROM_EITHER, "0", "n1"),
        (mn.FROM_EITHER, "0", "n2"),
        (mn.FROM_EITHER, "1", "n1"),
        (mn.FROM_EITHER, "2", "n2"),
        (mn.FROM_EITHER, "3", "n1"),
        (mn.into_bottleneck(3), "0", "n1"),
        (mn.into_bottleneck(3), "1", "n1"),
    }


def test_every_layer_and_name_is_asked_once():
    table = mn.missing_names(items(EDGES), BOTTLENECK)
    sizes = table.groupby("table").size().to_dict()
    assert sizes == {mn.FROM_EMBED: 10, mn.FROM_FIRST: 8, mn.FROM_EITHER: 10, mn.into_bottleneck(3): 6}
    assert not table.duplicated(["table", "node", "label"]).any()


def test_the_sentences_are_those_of_the_papers_lists():
    assert mn.sentences(items(EDGES), BOTTLENECK) == [
        "Names that embed does not send: n1: layer 2; every name: layers 1, 3, 4.",
        "Names that layer 0 does not send: n2: layers 1, 3; every name: layers 2, 4.",
        "Names that neither of them sends: n1: layer 2; n2: layers 1, 3; every name: layer 4.",
        "Names that earlier layers do not send to layer 3: n2: layers 0, 1; every name: layer 2.",
        "Of the missing names, layer 2 gets n1 from layer 1 and sends to layer 4; layer 3 gets n2 from no one and sends "
        "to layer 4.",
        "Layer 3 also receives out from layer 1.",
        "Layer 3 sends n2 to layer 4; out to output.",
    ]


def test_prompts_without_names_have_no_lists():
    table = items(EDGES).assign(label="7")
    assert mn.missing_names(table, BOTTLENECK).empty
    assert mn.sentences(table, BOTTLENECK) == []


@pytest.mark.parametrize(
    ("nodes", "text"),
    [(["3"], "layer 3"), (["10", "9"], "layers 9, 10"), (["1", "5", "7", "6", "8"], "layers 1, 5 to 8")],
)
def test_runs_of_three_or_more_layers_are_drawn_together(nodes, text):
    assert mn.layers_text(nodes) == text
