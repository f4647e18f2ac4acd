"""The charts: one shared scale, no more rows than a page carries, the house theme."""

import re

import altair as alt
import pandas as pd
import pytest
import vl_convert

from ioi_mamba.charts import drawing, theme
from ioi_mamba.errors import InputError


def heatmap_table(labels=("BOS", "n1", ",")):
    rows = [
        (corruption, layer, position, label, layer / 10 - 0.5 * position, 8)
        for corruption in ("A -> B", "B -> C", "C -> A")
        for layer in range(4)
        for position, label in enumerate(labels)
    ]
    return pd.DataFrame(rows, columns=["corruption", "layer", "position", "label", "effect", "n"])


def squares(chart):
    """The layers of a heatmap that hold its cells."""
    return [layer for layer in chart.to_dict()["layer"] if layer["mark"]["type"] == "rect"]


def test_all_panels_share_one_scale_centred_at_zero():
    table = heatmap_table()
    domains = {
        tuple(layer["encoding"]["color"]["scale"]["domain"]) for layer in squares(drawing.position_heatmap(table))
    }
    top = table["effect"].abs().max()
    assert domains == {(-top, top)}


def test_a_scale_begins_at_zero_where_nothing_is_negative():
    table = heatmap_table().assign(effect=lambda t: t["layer"] / 10)
    (scale,) = {str(layer["encoding"]["color"]["scale"]) for layer in squares(drawing.position_heatmap(table))}
    assert "'domain': [0, 0.3" in scale
    legend = squares(drawing.position_heatmap(table))[0]["encoding"]["color"]["legend"]["values"]
    assert legend == pytest.approx([0, 0.15, 0.3])


def test_one_panel_is_shown_and_the_others_are_chosen_in_the_order_of_the_table():
    spec = drawing.position_heatmap(heatmap_table()).to_dict()
    (choice,) = [param for param in spec["params"] if param["name"] == drawing.CHOICE]
    assert choice["bind"]["options"] == ["A -> B", "B -> C", "C -> A"]
    assert choice["value"] == "A -> B"
    filters = [layer["transform"][0]["filter"] for layer in spec["layer"]]
    assert filters == [f'{drawing.CHOICE} === "{value}"' for value in choice["bind"]["options"]]
    assert "params" not in drawing.position_panels(heatmap_table()).to_dict()


def test_what_is_changed_names_the_choices_and_is_marked_above_its_column():
    table = heatmap_table().assign(
        changed=lambda t: t["position"] == t["corruption"].map({"A -> B": 0, "B -> C": 1, "C -> A": 2})
    )
    chart = drawing.position_heatmap(table)
    spec = chart.to_dict()
    (choice,) = [param for param in spec["params"] if param["name"] == drawing.CHOICE]
    assert choice["bind"]["labels"] == ["BOS", "n1", ","]
    marked = [layer for layer in spec["layer"] if layer["mark"]["type"] == "text"]
    assert [spec["datasets"][layer["data"]["name"]] for layer in marked] == [
        [{"label": name}] for name in ("BOS", "n1", ",")
    ]


def test_panels_beside_each_other_keep_the_order_of_the_table():
    spec = drawing.position_panels(heatmap_table()).to_dict()
    assert [panel["title"] for panel in spec["concat"]] == ["A -> B", "B -> C", "C -> A"]
    assert spec["columns"] * (spec["concat"][0]["width"] + 90) <= 1150
    domains = {tuple(panel["layer"][0]["encoding"]["color"]["scale"]["domain"]) for panel in spec["concat"]}
    assert len(domains) == 1


def test_tooltips_have_the_value_and_the_number_of_prompts():
    for layer in squares(drawing.position_heatmap(heatmap_table())):
        assert {"corruption", "effect", "n", "layer"} <= {tip["field"] for tip in layer["encoding"]["tooltip"]}


def test_positions_stand_in_their_order_under_their_labels():
    assert squares(drawing.position_heatmap(heatmap_table()))[0]["encoding"]["x"]["sort"] == ["BOS", "n1", ","]


def test_labels_that_fit_stand_upright():
    few, many = heatmap_table(), heatmap_table(labels=[f"token {k}" for k in range(60)])
    angles = [
        squares(drawing.position_heatmap(table))[0]["encoding"]["x"]["axis"]["labelAngle"] for table in (few, many)
    ]
    assert angles == [0, -90]


def test_the_same_token_at_two_positions_stays_two_columns():
    chart = drawing.position_heatmap(heatmap_table(labels=("BOS", ",", "n1", ",")))
    assert squares(chart)[0]["encoding"]["x"]["sort"] == ["BOS @0", ", @1", "n1 @2", ", @3"]


def test_infinities_do_not_stretch_the_scale():
    scale = drawing.diverging_scale(pd.Series([0.5, float("inf"), float("nan"), -0.25])).to_dict()
    assert scale["domain"] == [-0.5, 0.5]


def test_a_table_of_zeros_still_has_a_scale():
    assert drawing.diverging_scale(pd.Series([0.0, 0.0])).to_dict()["domain"] == [-1.0, 1.0]


@pytest.mark.parametrize(
    "build",
    [
        lambda table: drawing.matrix_heatmap(table, x="position", y="layer", color="effect"),
        lambda table: drawing.line_with_points(table, x="position", y="effect"),
        lambda table: drawing.bars_with_baseline(table, x="layer", y="effect", baseline=0, baseline_label="b"),
    ],
)
def test_no_chart_has_more_rows_than_a_page_carries(build):
    table = pd.DataFrame({"layer": range(5001), "position": 0, "effect": 0.0})
    with pytest.raises(InputError, match="aggregate"):
        build(table)
    build(table.head(5000))


def data_sets(chart):
    """The rows of each data set of a chart."""
    return list(chart.to_dict()["datasets"].values())


def panels_of(n_layers, n_positions, corruptions="ABCDE"):
    rows = [
        (c, k, p, f"p{p}", (k + 1) / 100, ord(c))
        for c in corruptions
        for k in range(n_layers)
        for p in range(n_positions)
    ]
    return pd.DataFrame(rows, columns=["corruption", "layer", "position", "label", "effect", "n"])


def test_panels_that_are_too_many_for_one_data_set_have_one_each_and_lose_nothing():
    table = panels_of(64, 20)
    chart = drawing.position_heatmap(table, title="Effects")
    assert [len(rows) for rows in data_sets(chart)] == [64 * 20] * 5
    spec = chart.to_dict()
    assert spec["title"] == "Effects"
    domains = {tuple(layer["encoding"]["color"]["scale"]["domain"]) for layer in squares(chart)}
    assert domains == {(0, 0.64)}
    # The prompts of a cell are chosen by its corruption, which the panel's rows no longer carry.
    calculated = [layer["transform"][1] for layer in spec["layer"]]
    assert calculated == [{"calculate": f'"{c}"', "as": "corruption"} for c in "ABCDE"]


@pytest.mark.parametrize(("n_positions", "kept"), [(100, 30), (5000, 1)])
def test_of_panels_with_too_many_cells_the_strongest_layers_are_drawn_and_the_title_says_so(n_positions, kept):
    table = panels_of(64, n_positions, "AB" if n_positions == 5000 else "ABCDE")
    chart = drawing.position_heatmap(table, title="Effects")
    for rows in data_sets(chart):
        assert {row["layer"] for row in rows} == set(range(64 - kept, 64))
    assert chart.to_dict()["title"]["subtitle"] == [f"the strongest {kept} of 64 layers are drawn"]


def test_values_of_a_page_are_rounded_below_what_is_seen():
    table = heatmap_table().assign(effect=1 / 3)
    assert {row["effect"] for row in data_sets(drawing.position_heatmap(table))[0]} == {0.33333}


def test_a_missing_column_is_named():
    with pytest.raises(InputError, match="no column 'effect'"):
        drawing.position_heatmap(heatmap_table().drop(columns="effect"))


def test_a_matrix_has_its_values_in_its_cells_if_asked():
    table = pd.DataFrame({"a": [1, 1, 2, 2], "b": [1, 2, 1, 2], "s": [0.1, 0.2, 0.3, 0.4], "m": "r"})
    plain = drawing.matrix_heatmap(table, x="a", y="b", color="s").to_dict()
    assert [layer["mark"]["type"] for layer in plain["layer"]] == ["rect"]
    written = drawing.matrix_heatmap(table, x="a", y="b", color="s", text=True).to_dict()
    assert written["layer"][1]["encoding"]["text"]["field"] == "s"
    signed = drawing.matrix_heatmap(table, x="a", y="b", color="s", domain=(-1, 1), facet="m").to_dict()
    assert signed["spec"]["layer"][0]["encoding"]["color"]["scale"]["domain"] == [-1, 1]


def test_the_baseline_is_drawn_and_named():
    table = pd.DataFrame({"layer": [0, 1], "probability": [0.2, 0.9]})
    spec = drawing.bars_with_baseline(
        table, x="layer", y="probability", baseline=0.875, baseline_label="whole model"
    ).to_dict()
    assert spec["layer"][1]["mark"]["type"] == "rule"
    assert {"baseline": 0.875} in [row for rows in spec["datasets"].values() for row in rows]
    assert spec["title"]["subtitle"] == "dashed line: whole model, 0.88"


def test_the_theme_takes_the_colours_of_the_page():
    config = theme.config()
    assert config["background"] == "transparent"
    assert config["axis"]["labelColor"] == "currentColor"


def test_charts_carry_the_theme_and_leave_the_active_one_alone():
    assert alt.theme.active == "default"
    plain = drawing.position_heatmap(heatmap_table())
    assert theme.themed(plain).to_dict()["config"] == theme.config()
    assert plain.to_dict()["config"] != theme.config()
    assert alt.theme.active == "default"


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_a_chart_can_be_saved_as_a_picture(kind, tmp_path):
    path = tmp_path / f"chart.{kind}"
    drawing.position_heatmap(heatmap_table()).save(path)
    assert path.stat().st_size > 1000


def test_a_square_without_a_value_has_no_text():
    table = pd.DataFrame({"x": ["a", "b"], "y": ["c", "c"], "v": [0.5, None]})
    svg = vl_convert.vegalite_to_svg(drawing.matrix_heatmap(table, x="x", y="y", color="v", text=True).to_dict())
    written = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert "0.50" in written
    assert "null" not in written
    assert "NaN" not in written
