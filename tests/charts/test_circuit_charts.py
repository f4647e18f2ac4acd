"""Charts of circuits: of a size that a page carries for models of any depth, and linked as they say."""

import json
import random
import re

import altair as alt
import pandas as pd
import pytest

from ioi_mamba.analyses import _missing_names
from ioi_mamba.charts import circuit_axes
from ioi_mamba.charts import circuit_charts as cc
from ioi_mamba.charts import position_charts as pc
from ioi_mamba.circuits.graph import Universe
from ioi_mamba.report.pages import chart_spec

LABELS = ["BOS", "x", "n1", ",", "n2", ",", "out"]


def tables(n_layers, n_kept=40, n_positions=None):
    """(rows of `edge-attribution`, items of `positional-attribution`) with random numbers."""
    draw = random.Random(1)
    labels = [*LABELS, *(f"p{k}" for k in range(len(LABELS), n_positions or 0))]
    number = lambda: draw.choice((-1, -1, 1)) * 10 ** draw.uniform(-6, 0)
    items = Universe(n_layers, 4, True).items()
    totals = pd.DataFrame(
        [(i.source, i.target, i.part, number(), number(), number(), k < 20) for k, i in enumerate(items)],
        columns=["source", "target", "part", "score", "exact", "estimate", "kept"],
    )
    totals["rank"] = totals.index + 1
    at = [
        (i.source, i.target, i.part, p, label, number()) for i in items if not i.part for p, label in enumerate(labels)
    ]
    at = pd.DataFrame(at, columns=["source", "target", "part", "position", "label", "score"])
    positional = at.drop(columns="part").sort_values("score").reset_index(drop=True)
    positional["rank"] = positional.index + 1
    positional = positional.assign(kept=positional["rank"] <= n_kept, low=-1.0, high=1.0)
    return pd.concat([totals, at], ignore_index=True).assign(what="item"), positional


def curve_rows(n=8):
    rows = [
        ("first k", k, "held out", measure, k / n, k / n - 0.1, k / n + 0.1, 60)
        for k in range(n + 1)
        for measure in ("accuracy", "normalized_logit_diff", "f")
    ]
    rows += [(name, 3, "held out", "accuracy", 0.5, 0.4, 0.6, 60) for name in ("random", "kept")]
    return pd.DataFrame(rows, columns=["circuit", "size", "sample", "measure", "value", "low", "high", "n"])


def edge_chart(rows):
    charts = cc.linked_matrices(rows), cc.exact_scatter(rows[rows["position"].isna()])
    return chart_spec(cc.with_edge_selection(alt.vconcat(*charts), rows))


def all_charts(n_layers, n_kept, n_positions):
    rows, items = tables(n_layers, n_kept, n_positions)
    missing = _missing_names.missing_names(items, n_layers - 1)
    return [
        edge_chart(rows),
        *map(
            chart_spec,
            (
                pc.circuit_graph(items),
                pc.presence_strips(missing),
                pc.strongest_edges(items),
                cc.size_curves(curve_rows(), "edges"),
                cc.searched_edges(rows[rows["position"].isna() & rows["part"].isna()].assign(drop=0.1)),
            ),
        ),
    ]


def names_of_views(spec):
    return set(re.findall(r'"name": "(scores|kept)"', json.dumps(spec)))


def test_charts_of_a_deep_model_stay_small_and_are_made_without_a_warning(recwarn):
    for spec in all_charts(48, 900, 20):
        assert max(len(rows) for rows in spec["datasets"].values()) <= 5000
        assert len(json.dumps(spec)) < 2_000_000
    assert not recwarn.list


def widths(spec):
    """Pixels of each chart side by side, without axes."""
    if "hconcat" in spec:
        return sum(widths(part) for part in spec["hconcat"])
    for word in ("vconcat", "concat"):
        if word in spec:
            across = spec.get("columns", 1)
            return max(widths(part) for part in spec[word]) * across
    return spec.get("width", 0) if isinstance(spec.get("width", 0), int) else 0


def test_the_positions_of_as_many_edges_as_a_chart_carries_are_drawn_and_its_title_says_of_how_many():
    rows, _ = tables(64, n_positions=40)
    text = json.dumps(edge_chart(rows))
    assert f"the strongest {5000 // 40} of {65 * 66 // 2} edges are drawn" in text
    assert "strongest" not in json.dumps(edge_chart(tables(8)[0]))


def test_of_more_edges_than_a_chart_carries_the_strongest_are_drawn_and_the_titles_say_so():
    rows, items = tables(110, n_positions=8)
    n_edges = 111 * 112 // 2
    for chart in (
        edge_chart(rows),
        chart_spec(
            cc.searched_edges(rows[rows["position"].isna() & rows["part"].isna()].assign(drop=rows["score"].abs()))
        ),
    ):
        assert max(len(data) for data in chart["datasets"].values()) == 5000
        assert f"the strongest 5000 of {n_edges} edges" in json.dumps(chart)
    chart_spec(pc.presence_strips(_missing_names.missing_names(items, 100)))


@pytest.mark.parametrize("n_layers", [3, 8, 24, 48, 64])
def test_charts_fit_a_page_1400_pixels_wide(n_layers):
    for spec in all_charts(n_layers, 30, 20):
        assert widths(spec) <= 1100


def test_a_click_on_either_matrix_selects_an_edge_and_the_strongest_is_selected():
    rows, _ = tables(8)
    spec = edge_chart(rows)
    (edge,) = [p for p in spec["params"] if p["name"] == "edge"]
    assert set(edge["views"]) == names_of_views(spec) == {"scores", "kept"}
    edges = rows[rows["position"].isna() & rows["part"].isna()]
    strongest = edges.loc[edges["score"].abs().idxmax()]
    assert edge["value"] == [{"source": strongest["source"], "target": strongest["target"]}]


def test_the_slider_reaches_from_the_smallest_score_to_the_largest():
    rows, _ = tables(8)
    (slider,) = [p for p in edge_chart(rows)["params"] if p["name"] == "smallest"]
    scores = rows[rows["position"].isna() & rows["part"].isna()]["score"].abs()
    assert 10 ** slider["bind"]["min"] <= scores.min()
    assert 10 ** slider["bind"]["max"] >= scores.max()
    assert slider["value"] == slider["bind"]["min"]


def test_every_kept_item_is_drawn_from_its_source_to_its_target():
    _, items = tables(8, 30)
    nodes, labels = circuit_axes.node_order(items), circuit_axes.position_labels(items)
    kept = items[items["kept"]].assign(place=circuit_axes.places(items))
    points = pc._bows(kept, nodes, labels)
    for number, item in enumerate(kept.itertuples()):
        bow = points[points["item"] == number].sort_values("point")
        assert bow["y"].iloc[[0, -1]].tolist() == [nodes.index(item.source), nodes.index(item.target)]
        assert bow["x"].iloc[[0, -1]].tolist() == pytest.approx([item.position, item.position])
        assert item.position < bow["x"].max() < item.position + 1


def test_the_busiest_nodes_of_a_large_circuit_are_hidden_to_begin_with():
    for n_kept, n_hidden in ((pc.MANY, 0), (pc.MANY + 1, 3)):
        _, items = tables(12, n_kept)
        spec = chart_spec(pc.circuit_graph(items))
        (hidden,) = [p for p in spec["params"] if p["name"] == "hidden"]
        assert len(hidden["value"]) == n_hidden
    kept = items[items["kept"]]
    busy = pd.concat([kept["source"], kept["target"]]).value_counts()
    assert {row["node"] for row in hidden["value"]} == set(busy.index[:3])


def test_a_label_at_two_positions_is_two_columns():
    _, items = tables(3)
    assert circuit_axes.position_labels(items) == ["BOS", "x", "n1", ", @3", "n2", ", @5", "out"]


def test_values_that_are_rounding_are_drawn_at_the_edge_of_the_scatter():
    rows, _ = tables(3)
    rows.loc[0, ["exact", "estimate"]] = [0.0, -1e-12]
    spec = cc.exact_scatter(rows[rows["position"].isna()]).to_dict()
    points = [row for data in spec["datasets"].values() for row in data if "kind" in row]
    assert min(row["|exact|"] for row in points) == min(row["|estimate|"] for row in points) == cc.SMALLEST


def test_search_and_attribution_stand_in_one_row_for_each_threshold():
    rows = [
        (name, threshold, size, "f", 0.5, 0.4, 0.6, 40)
        for threshold, size in ((0.1, 7), (0.01, 14))
        for name in ("search", "attribution", "random")
    ]
    columns = ["circuit", "threshold", "size", "measure", "value", "low", "high", "n"]
    compared = pd.DataFrame(rows, columns=columns)
    spec = chart_spec(cc.same_size(compared, compared[compared["circuit"] == "search"]))
    assert [len(panel["facet"]["row"]["sort"]) for panel in spec["hconcat"]] == [2, 2]
    assert spec["hconcat"][0]["facet"]["row"]["sort"] == ["7 items, threshold 0.1", "14 items, threshold 0.01"]
