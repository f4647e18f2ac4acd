"""The story of the first screen: what is said is what the tables hold, and what is drawn can be counted."""

import json
import re
import xml.etree.ElementTree as ET

import deep
import pandas as pd
import paper_run
import pytest

from ioi_mamba.cli.main import main
from ioi_mamba.errors import InputError
from ioi_mamba.experiments.story import MARKS, Kind, Told
from ioi_mamba.report import exports, hero, pages, preview, story

LABELS = deep.labels(20)
TOKENS = [" ".join(["", f"w{k}"]) for k in range(20)]


def example(corruption, at):
    corrupted = [f"{token}x" if k == at else token for k, token in enumerate(TOKENS)]
    own = {"corruption": corruption, "positions": LABELS, "clean": TOKENS, "corrupted": corrupted}
    return own | {"answer": " yes", "wrong": " no"}


EXAMPLES = [example("first", 3), example("second", 15)]
ACCURACY = {"accuracy": 0.93, "n": 80}


def told(*rows, sure=""):
    """What an experiment tells: rows (kind, corruption, layer or (source, target), from label, to label, value)."""
    table = []
    for kind, corruption, layer, start, end, value in rows:
        source, target = layer if isinstance(layer, tuple) else (str(layer), str(layer))
        table.append((str(kind), corruption, source, target, start, end, value, value - 0.02, value + 0.01, 80))
    return Told(pd.DataFrame(table, columns=list(MARKS)), sure)


WHOLE = [
    story.Found(
        "reading",
        told(
            (Kind.READS, "first", 0, "n1", "n1", 0.99),
            (Kind.READS, "first", 5, "n1", "n1", 0.7),
            (Kind.READS, "second", 0, "n5", "n5", 0.98),
            (Kind.READS, "second", 5, "n5", "n5", 0.9),
            (Kind.READS, "second", 5, "n2", "n2", 0.04),
        ),
    ),
    story.Found(
        "moving", told((Kind.MOVES, "second", 5, "n5", "n5+16", 0.8), (Kind.MOVES, "second", 5, "n5", "n5", 0.3))
    ),
    story.Found(
        "carrying",
        told((Kind.CARRIES, "second", 5, "n5+16", "n5+16", 0.85), (Kind.CARRIES, "second", 5, "out", "out", 0.9)),
    ),
    story.Found("writing", told((Kind.WRITES, "second", 5, "out", "out", 0.88))),
    story.Found(
        "keeping",
        told(
            (Kind.EDGE, "", ("embed", "0"), "n5", "n5", -0.5),
            (Kind.EDGE, "", ("0", "5"), "n5", "n5", -0.4),
            (Kind.EDGE, "", ("5", "output"), "out", "out", -0.3),
            sure="3 of 900 edges are kept",
        ),
    ),
]


def test_the_finding_and_the_five_answers_are_those_of_the_tables():
    found = story.tell(WHOLE, EXAMPLES, ACCURACY)
    assert [view.corruption for view in found.views] == [
        "second",
        "first",
    ]  # what is read after layer 0 is stronger there
    assert found.finding == (
        "Layer 5 reads the changed token, its convolution moves it 1 token on, its state carries it to the last token and "
        "there it writes the answer. Patching what it reads turns 90\u00a0% of the answer (95 % interval 88 to 91\u00a0%)."
    )
    answers = dict(found.answers)
    assert list(answers) == ["What was asked", "Which layers", "At which tokens", "How it gets there", "How sure"]
    assert "“yes”" in answers["What was asked"]
    assert "“w15” to “w15x”" in answers["What was asked"]
    assert answers["Which layers"] == "0 (98\u00a0%) and 5 (90\u00a0%)."
    assert answers["At which tokens"] == "Read at “w15” (n5); written at “w19” (out)."
    assert (
        "80 prompts; 70\u00a0% to 90\u00a0% in 2 corruptions; unpatched right in 93\u00a0%; 3 of 900"
        in answers["How sure"]
    )


def test_nothing_is_said_that_no_table_holds():
    only = story.tell(WHOLE[:1], EXAMPLES, None)
    assert only.finding.startswith("Layer 5 reads the changed token. Patching")
    assert "How it gets there" not in dict(only.answers)
    elsewhere = story.Found("reading", told((Kind.READS, "second", 4, "n5+11", "n5+11", 0.6)))
    assert "reads “w11” (n5+11)" in story.tell([elsewhere], EXAMPLES, None).finding
    assert story.tell([], EXAMPLES, None).finding == ""
    assert story.tell(WHOLE, [], None).views == []


def test_weak_marks_and_tokens_that_an_example_lacks_are_not_drawn():
    view = story.tell(WHOLE, EXAMPLES, None).views[0]
    assert {mark.end for mark in view.of(Kind.READS)} == {15}
    other = [story.Found("reading", told((Kind.READS, "second", 4, "elsewhere", "elsewhere", 0.9)))]
    assert story.tell(other, EXAMPLES, None).views[0].marks == []


def texts_of(svg):
    return [element.text for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_the_figure_has_every_token_the_layers_that_matter_and_a_mark_for_each_number():
    view = story.tell(WHOLE, EXAMPLES, None).views[0]
    figure = hero.drawn(view, 8)
    assert [row.name for row in figure.rows] == ["layers 6–7", "layer 5", "layers 1–4", "layer 0"]
    # The slice that takes from its own token moves nothing and is not drawn.
    assert len(figure.shapes) == len(view.marks) - 1
    svg = figure.svg()
    shown = texts_of(svg)
    assert [text for text in shown if text in {f"w{k}" for k in range(20)}] == [f"w{k}" for k in range(1, 20)]
    assert "w15x" in shown
    assert re.findall(r'aria-label="(Layer 5 reads [^"]*)"', svg) == [
        "Layer 5 reads “w15” (n5); patching it turns 90\u00a0% of the answer."
    ]
    assert "role=" not in figure.svg(alone=True)


@pytest.mark.parametrize("n_layers", [1, 8, 48, 64])
def test_of_a_deep_model_the_strongest_layers_have_rows_and_the_rest_is_folded_and_counted(n_layers):
    rows = [(Kind.READS, "second", layer, "n5", "n5", 0.2 + 0.01 * layer) for layer in range(n_layers)]
    view = story.tell([story.Found("reading", told(*rows))], EXAMPLES, None).views[0]
    figure = hero.drawn(view, n_layers)
    own = [row for row in figure.rows if not row.folded]
    assert sorted(layer for row in figure.rows for layer in row.layers) == list(range(n_layers))
    assert {layer for row in own for layer in row.layers} == set(list(range(n_layers))[-story.ROWS :])
    assert len(figure.shapes) == len(own)
    assert figure.left_out == n_layers - len(own)
    assert figure.height < 560


def test_text_of_a_prompt_opens_no_element_of_the_figure():
    hostile = example("second", 15)
    hostile["clean"] = [*TOKENS[:4], "</svg><script>x</script>", *TOKENS[5:]]
    svg = hero.drawn(story.tell(WHOLE, [hostile], None).views[0], 8).svg()
    assert "<script" not in svg
    assert "</svg><script>x</script>" in texts_of(svg)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("story")
    tables = deep.tables(8, 20)
    names = ("layer-ablation", "state-ablation", "positional-attribution", "conv-shift")
    examples = [example(corruption, 3) for corruption in dict.fromkeys(tables["layer-ablation"]["corruption"])]
    paper_run.write(out, {name: tables[name] for name in names}, examples=examples)
    return out


def test_the_summary_says_what_the_page_says(out, capsys):
    assert main(["report", str(out), "--markdown", "--graph"]) == 0
    text, page = (out / exports.SUMMARY).read_text(), (out / "index.html").read_text()
    assert "![" in text
    assert ET.parse(out / exports.FIGURE).getroot().tag.endswith("svg")
    for name in ("layer-ablation", "positional-attribution"):
        section = page.split(f'<section id="{name}"')[1]
        lead = re.sub(r"<[^>]+>", "", re.search(r'<p class="found">(.*?)</p>', section)[1])
        assert f"| {exports._plain(lead)} |" in text.replace("&#39;", "'")
    assert len(text.split()) < 400
    assert {"Summary:", "Graph:", "Report:"} <= set(capsys.readouterr().out.split())


def test_the_graph_has_every_kept_edge_in_the_form_of_circuit_tracer(out):
    graph = json.loads(exports.write_graph(out).read_text())
    table = pd.read_parquet(out / "positional-attribution.parquet")
    kept = table[(table["what"] == "item") & table["kept"]]
    assert len(graph["links"]) == len(kept)
    assert sum(link["weight"] for link in graph["links"]) == pytest.approx(-kept["score"].sum())
    nodes = {node["node_id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"])
    assert {"metadata", "qParams", "nodes", "links"} == set(graph)
    assert graph["metadata"]["prompt_tokens"] == TOKENS
    depth = lambda node: -1 if node["layer"] == "E" else int(node["layer"])
    for link in graph["links"]:
        source, target = nodes[link["source"]], nodes[link["target"]]
        assert depth(source) < depth(target)
        assert source["ctx_idx"] == target["ctx_idx"]
    kinds = {node["feature_type"] for node in graph["nodes"]}
    assert kinds <= {"embedding", "logit", "cross layer transcoder"}


def test_a_run_without_a_circuit_has_no_graph(tmp_path):
    paper_run.write(tmp_path, {"layer-ablation": paper_run.layer_ablation()})
    with pytest.raises(InputError, match="holds no circuit by token"):
        exports.write_graph(tmp_path)


def test_a_preview_begins_with_the_strongest_and_its_columns_have_the_same_decimals():
    table = pd.DataFrame({"layer": [0, 1, 2], "effect": [0.1, -0.9, 0.00001], "low": [None, -1.0, 0.0]})
    head = preview.strongest_first(table, 2)
    assert list(head["layer"]) == [1, 0]
    assert preview.cells(preview.strongest_first(table, 3)) == [
        ["1", "-0.9000", "-1.000"],
        ["0", "0.1000", "–"],
        ["2", "0.0000", "0.000"],
    ]
    minus = pd.DataFrame({"effect": [1.0, -1e-9]})
    assert preview.cells(minus) == [["1.000"], ["0.000"]]


def test_what_is_drawn_of_a_model_that_guesses_says_so(tmp_path):
    guesses = {"accuracy": 0.5, "n": 8, "bound": 0.75, "guessing": 0.5}
    paper_run.write(tmp_path, {"layer-ablation": paper_run.layer_ablation()}, clean=guesses)
    assert 'data-chart="layer-ablation-chart"' not in pages.write_report(tmp_path).read_text()
    page = pages.write_report(tmp_path, draw_anyway=True).read_text()
    assert 'data-chart="layer-ablation-chart"' in page
    assert '<section id="layer-ablation" aria-labelledby="layer-ablation-title" class="guess">' in page
    (picture,) = pages.save_charts(tmp_path, "svg", draw_anyway=True)
    assert "this model guesses" in picture.read_text()
    assert pages.save_charts(tmp_path, "svg") == []
