"""The page: offline, safe with any text, whole, and drawn by a real browser where there is one."""

import json
import re
import shutil
import subprocess
from dataclasses import replace

import deep
import pandas as pd
import paper_run
import pytest

from ioi_mamba import analyses, versions
from ioi_mamba.analyses import layer_removal, state_ablation, state_similarity
from ioi_mamba.analyses.state_similarity import MEASURES
from ioi_mamba.charts import drawing
from ioi_mamba.errors import InputError
from ioi_mamba.files import sha256_of
from ioi_mamba.report import pages

HOSTILE = [
    "</script><script>document.title='broken'</script>",
    "</SCRIPT >",
    "<!-- <script>",
    "\"'`&amp;{{ 7*7 }}",
    "\u202eright to left",
    "line\u2028separator",
    "n1",
]

LAYER_REMOVAL = pd.DataFrame(
    [
        ("none", 0, None, 1.0, 0.9, 8, 1.0),
        ("single", 1, 0, 0.25, 0.3, 8, None),
        ("single", 1, 1, 1.0, 0.89, 8, None),
        ("greedy", 1, 1, 1.0, 0.89, 8, 0.875),
    ],
    columns=list(layer_removal.EXPERIMENT.required),
).astype({"layer": "Int64", "valid_accuracy": "Float64"})

HEATMAP = pd.DataFrame(
    [
        (corruption, layer, position, label, 0.1 * layer - 0.05 * position, 8)
        for corruption in ("A -> B", HOSTILE[0], "C -> A")
        for layer in range(3)
        for position, label in enumerate(HOSTILE)
    ],
    columns=["corruption", "layer", "position", "label", "effect", "n"],
)


def put(directory, name, table, model_id="some/model", **manifest):
    directory.mkdir(exist_ok=True)
    table.to_parquet(directory / f"{name}.parquet", index=False)
    entries = {
        "analysis": name,
        "model": {
            "id": model_id,
            "architecture": "mamba",
            "config": {"num_hidden_layers": 2},
            "weights_sha256": "0f" * 32,
        },
        "seed": 27,
        "pairs_sha256": "ab" * 32,
        "options": {"site": HOSTILE[0]},
        "device": "cpu",
        "dtype": "float32",
        "kernels": [],
        "versions": versions.versions(),
        "n_pairs": 8,
        "wall_seconds": 1.5,
        "peak_memory_mib": 300.0,
        "created": "2026-01-05T10:00:00+00:00",
        "table_sha256": sha256_of(directory / f"{name}.parquet"),
    }
    (directory / f"{name}.json").write_text(json.dumps(entries | manifest))


@pytest.fixture
def heatmap_module(monkeypatch):
    """An experiment whose texts and tokens try to break the page, registered as state-ablation."""
    experiment = replace(
        state_ablation.EXPERIMENT,
        title=f"Title {HOSTILE[0]}",
        paper="4.4",
        question=f"Question {HOSTILE[3]}",
        look_for=HOSTILE[4],
        method="\n".join(HOSTILE[:3]),
        chart=drawing.position_heatmap,
        more=lambda table: {},
        findings=lambda table: list(HOSTILE),
    )
    load = analyses.load
    monkeypatch.setattr(analyses, "available", lambda: ("layer-removal", "state-ablation"))
    monkeypatch.setattr(analyses, "load", lambda name: experiment if name == "state-ablation" else load(name))
    return experiment


@pytest.fixture
def directory(tmp_path, heatmap_module):
    put(tmp_path / "out", "layer-removal", LAYER_REMOVAL, model_id=f"{HOSTILE[0]}/x")
    put(tmp_path / "out", "state-ablation", HEATMAP)
    return tmp_path / "out"


def own_part(page):
    """The page without the chart library, which stands in the last script but one."""
    return page.replace(pages.bundle(), "")


def section_of(page, name):
    return page.split(f'<section id="{name}"')[1].split("</section>")[0]


def test_sections_stand_in_the_papers_order_with_all_their_parts(directory):
    page = own_part(pages.write_report(directory).read_text())
    assert re.findall(r'<section id="([^"]+)"', page) == ["layer-removal", "state-ablation", "claims"]
    text = re.sub(r'<a class="term"[^>]*>([^<]*)</a>', r"\1", page)
    for part in (
        layer_removal.EXPERIMENT.title,
        layer_removal.EXPERIMENT.question,
        layer_removal.EXPERIMENT.look_for,
        "Removing layer 0 costs most",
        "im.open_result",
        "The strongest 4 of 4 rows",
        "5 January 2026",
        "0f0f0f0f0f0f",
    ):
        assert part.replace("'", "&#39;") in text
    assert "These are figures of" not in page


def test_mini_is_said_to_be_mini(tmp_path):
    put(tmp_path / "out", "layer-removal", LAYER_REMOVAL, model_id="mini")
    page = pages.write_report(tmp_path / "out").read_text()
    assert "They are not figures of any published model" in page


def test_the_page_loads_nothing(directory):
    page = own_part(pages.write_report(directory).read_text())
    loading = r"<(script|img|iframe|link|source|video|audio|object|embed)\b[^>]*\b(src|href|data)="
    assert not re.search(loading, page)
    assert "@import" not in page
    assert "url(" not in page
    addresses = set(re.findall(r"https?://[^\"'\\ <]+", page))
    # A schema, a namespace, and a link to the paper that a reader may follow; none is loaded.
    schema = f"https://vega.github.io/schema/vega-lite/{pages.alt.SCHEMA_VERSION}.json"
    assert addresses == {schema, "http://www.w3.org/2000/svg", "https://arxiv.org/abs/2407.14008"}
    assert "default-src 'none'" in page


def test_hostile_text_opens_and_closes_no_element(directory):
    page = own_part(pages.write_report(directory).read_text())
    assert "<script>document" not in page
    assert "7*7" in page
    assert page.count("</script>") == page.count("<script")
    specs = re.findall(r"<script type=\"application/json\"([^>]*)>(.*?)</script>", page, re.DOTALL)
    for attributes, spec in specs:
        assert not set("<>&\u2028") & set(spec)
        assert "data-chart" not in attributes or json.loads(spec)["$schema"]
    assert sum("data-chart" in attributes for attributes, _ in specs) == 2
    assert HOSTILE[0] in re.sub(r"\\u003([ce])", lambda m: {"c": "<", "e": ">"}[m[1]], page)


def test_writing_the_report_again_gives_the_same_page(directory):
    first = pages.write_report(directory).read_bytes()
    assert pages.write_report(directory).read_bytes() == first
    assert len(first) < pages.MAX_BYTES


def test_the_chart_library_stands_in_the_page_once(directory):
    page = pages.write_report(directory).read_text()
    assert page.count(pages.bundle()) == 1
    assert "</script" not in pages.bundle().lower()


def test_a_chart_that_cannot_be_drawn_costs_only_itself(directory, heatmap_module):
    def broken(table):
        raise KeyError("</script>")

    object.__setattr__(heatmap_module, "chart", broken)  # a record is frozen
    page = own_part(pages.write_report(directory).read_text())
    assert "The chart could not be drawn" in page
    assert page.count('class="chart"') == 1
    assert "Removing layer 0 costs most" in page


def test_an_unfinished_run_is_left_out(directory):
    (directory / "state-ablation.json").unlink()
    page = pages.write_report(directory).read_text()
    assert 'id="layer-removal"' in page
    assert 'id="state-ablation"' not in page


def test_a_table_that_is_no_parquet_costs_only_its_own_section(directory):
    (directory / "state-ablation.parquet").write_text("not a table")
    page = own_part(pages.write_report(directory).read_text())
    assert "state-ablation.parquet cannot be read as parquet" in section_of(page, "state-ablation")
    assert page.count('class="chart"') == 1
    (directory / "layer-removal.parquet").unlink()
    assert "cannot be read as parquet" in pages.write_report(directory).read_text()
    (directory / "state-ablation.parquet").unlink()
    with pytest.raises(InputError, match="holds no finished table"):
        pages.write_report(directory)


def test_the_largest_charts_of_a_page_too_large_are_left_out_and_it_says_so(directory, monkeypatch):
    whole = len(pages.write_report(directory).read_bytes())
    monkeypatch.setattr(pages, "MAX_BYTES", whole - 1000)
    page = pages.write_report(directory).read_text()
    assert len(page.encode()) < pages.MAX_BYTES
    assert own_part(page).count('class="chart"') == 1
    assert "The chart is left out: with it the page would have" in own_part(page)
    monkeypatch.setattr(pages, "MAX_BYTES", 1000)
    assert own_part(pages.write_report(directory).read_text()).count("The chart is left out") == 2


def test_a_chart_of_too_many_rows_is_refused():
    table = pd.DataFrame({"x": range(5001)})
    chart = pages.alt.Chart(table).mark_point().encode(x="x:Q")
    with pages.alt.data_transformers.disable_max_rows(), pytest.raises(InputError, match="aggregate"):
        pages.chart_spec(chart)


@pytest.mark.parametrize(
    ("code", "shown"),
    [(pages.notebook_code("layer-removal"), "hconcat"), (pages.SUMMARY_CODE, "spec")],
)
def test_the_notebook_code_draws_the_chart(tmp_path, monkeypatch, code, shown):
    paper_run.write(
        tmp_path, {"layer-removal": paper_run.layer_removal(), "layer-ablation": paper_run.layer_ablation()}
    )
    monkeypatch.chdir(tmp_path)
    *statements, expression = code.splitlines()
    names = {}
    exec("\n".join(statements), names)
    assert eval(expression, names).to_dict()[shown]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
@pytest.mark.parametrize("width", [1400, 800])
def test_a_browser_without_network_draws_every_chart(directory, tmp_path, width):
    page = pages.write_report(directory)
    flags = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        "disable-sync disable-component-update virtual-time-budget=20000 enable-logging=stderr "
        f"window-size={width},900 dump-dom"
    )
    offline = "--host-resolver-rules=MAP * ~NOTFOUND"
    command = ["chromium", *(f"--{flag}" for flag in flags.split()), offline]
    done = subprocess.run(
        [*command, f"--user-data-dir={tmp_path / 'browser'}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    drawn = re.findall(r'data-drawn="(\w+)"', done.stdout)
    assert drawn == ["yes", "yes"], done.stderr[-2000:]
    for name in ("layer-removal", "state-ablation"):
        chart = done.stdout.split(f'id="{name}-chart"')[1].split("<figcaption")[0]
        assert "<svg" in chart
    assert "could not be drawn" not in own_part(done.stdout).split("<main")[1].split("</main>")[0]
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "<title>broken" not in done.stdout


@pytest.mark.parametrize(("form", "begins"), [("svg", b"<svg"), ("png", b"\x89PNG")])
def test_charts_are_written_as_pictures_on_white(directory, form, begins):
    written = pages.save_charts(directory, form)
    assert [path.name for path in written] == [f"layer-removal-of-x.{form}", f"state-ablation-of-model.{form}"]
    for path in written:
        assert path.read_bytes().startswith(begins)
        if form == "svg":
            assert 'fill="white"' in path.read_text()[:800]


def test_charts_in_another_form_are_refused(directory):
    with pytest.raises(InputError, match="svg, png"):
        pages.save_charts(directory, "gif")
    assert not (directory / "charts").exists()


@pytest.fixture(scope="module")
def deep_tables():
    return deep.tables(64, 40)


@pytest.mark.parametrize("name", analyses.available())
def test_the_chart_of_every_experiment_is_drawn_for_64_layers_and_40_positions(name, deep_tables):
    module, table = analyses.load(name), deep_tables[name]
    assert module.findings(table)
    spec = pages.chart_spec(module.chart(table))
    sizes = [len(rows) for rows in spec["datasets"].values()]
    assert 0 < max(sizes) <= drawing.MAX_ROWS
    if name in ("layer-ablation", "state-ablation", "output-ablation"):
        assert sizes == [64 * 40] * 5


def test_the_page_of_all_experiments_holds_64_layers_and_40_positions(deep_tables, tmp_path):
    paper_run.write(tmp_path, deep_tables)
    page = own_part(pages.write_report(tmp_path).read_text())
    assert page.count('class="chart"') >= len(deep_tables)
    assert "The chart could not be drawn. " not in page


def nan_only(table):
    return table.assign(**{name: float("nan") for name in table if pd.api.types.is_numeric_dtype(table[name])})


def text_for_numbers(table):
    return table.assign(**{name: "much" for name in table if pd.api.types.is_numeric_dtype(table[name])})


def numbers_for_text(table):
    return table.assign(**{name: 3.5 for name in table if not pd.api.types.is_numeric_dtype(table[name])})


def strange_texts(table):
    texts = [name for name in table if pd.api.types.is_string_dtype(table[name])]
    return table.assign(**{name: (HOSTILE * len(table))[: len(table)] for name in texts})


DAMAGES = {
    "no rows": lambda table: table.head(0),
    "no rows and columns": lambda table: pd.DataFrame(),
    "NaN": nan_only,
    "all missing": lambda table: table.assign(**dict.fromkeys(table, None)),
    "half of the columns": lambda table: table[list(table)[::2]],
    "foreign": lambda table: pd.DataFrame({"city": ["Rome"], "people": [2.8e6]}),
    "text for numbers": text_for_numbers,
    "numbers for text": numbers_for_text,
    "infinite": lambda table: table.assign(
        **{name: float("inf") for name in table if pd.api.types.is_float_dtype(table[name])}
    ),
    "strange texts": strange_texts,
    "one row": lambda table: table.head(1),
    "the same row again": lambda table: pd.concat([table.head(1)] * 5),
    "lists": lambda table: table.assign(**{name: [[1, 2]] * len(table) for name in list(table)[:2]}),
    "Float64": lambda table: table.convert_dtypes(),
}
NOTHING_TO_DRAW = ("no rows", "no rows and columns", "NaN", "all missing", "half of the columns", "foreign", "infinite")


@pytest.fixture(scope="module")
def few_layers():
    return deep.tables(4, 20)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_table_costs_its_own_section_alone(damage, few_layers, tmp_path):
    intact = "output-ablation"
    damaged = {name: table if name == intact else DAMAGES[damage](table) for name, table in few_layers.items()}
    paper_run.write(tmp_path, damaged)
    page = own_part(pages.write_report(tmp_path).read_text())
    assert f'id="{intact}-chart"' in page
    for name in damaged:
        section = section_of(page, name)
        drawn, says_so = f'id="{name}-chart"' in section, "note trouble" in section
        assert drawn or says_so
        if name != intact and damage in NOTHING_TO_DRAW:
            assert says_so
            assert not drawn


@pytest.mark.parametrize("name", analyses.PAPERS)
@pytest.mark.parametrize("damage", ["NaN", "text for numbers"])
def test_one_damaged_table_leaves_the_other_sections_and_the_claims(name, damage, few_layers, tmp_path):
    some = dict.fromkeys(("layer-removal", "output-ablation", "layer-ablation", name))
    tables = {each: few_layers[each] for each in some} | {name: DAMAGES[damage](few_layers[name])}
    paper_run.write(tmp_path, tables)
    page = own_part(pages.write_report(tmp_path).read_text())
    for other in tables.keys() - {name}:
        assert f'id="{other}-chart"' in page
        assert "note trouble" not in section_of(page, other)
    assert "note trouble" in section_of(page, name)
    assert "claims that could be judged" in section_of(page, "claims")


@pytest.mark.parametrize(
    "damage",
    [
        {"model": "mini"},
        {"model": {}},
        {"model": {"id": 3, "config": []}},
        {"clean": {"accuracy": "high"}},
        {"clean": 3, "requests": 4, "examples": [3], "kernels": [None], "options": "none"},
        {"examples": [{"positions": [1]}], "requests": {"count": 1}, "versions": None},
        {"created": "yesterday", "wall_seconds": None, "n_pairs": "many", "task": "chess", "seed": None},
        {"created": 3, "peak_memory_mib": "much", "pairs_sha256": None, "table_sha256": 1},
    ],
)
def test_a_damaged_manifest_costs_no_chart(damage, directory):
    put(directory, "layer-removal", LAYER_REMOVAL, **damage)
    page = own_part(pages.write_report(directory).read_text())
    assert page.count('class="chart"') == 2
    bare = {"analysis": "layer-removal", "model": None, "table_sha256": None}
    (directory / "layer-removal.json").write_text(json.dumps(bare))
    assert own_part(pages.write_report(directory).read_text()).count('class="chart"') == 2


BELOW = {"accuracy": 0.5, "n": 8, "bound": 0.75}


def test_of_a_model_that_guesses_no_chart_of_what_it_answers_is_on_the_page(tmp_path):
    similarity = pd.DataFrame(
        [("a b", measure, i, j, 0.5, "a", "b", False, 1) for measure in MEASURES for i in range(2) for j in range(2)],
        columns=list(state_similarity.EXPERIMENT.required),
    )
    put(tmp_path, "layer-removal", LAYER_REMOVAL, clean=BELOW)
    put(tmp_path, "layer-ablation", HEATMAP.assign(low=0.0, high=0.0, left_out=0), clean=BELOW)
    put(tmp_path, "state-similarity", similarity, clean=BELOW)
    page = own_part(pages.write_report(tmp_path).read_text())
    assert re.findall(r'data-chart="([^"]+)"', page) == ["state-similarity-chart"]
    for name in ("layer-removal", "layer-ablation"):
        part = page.split(f'<section id="{name}"')[1].split("</section>")[0]
        assert part.count("No chart is drawn") == 1
        assert f"The numbers are in {name}.parquet" in part
        assert "which it cannot do" in part
        assert f"rows of <code>{name}.parquet</code>" in part
        assert "What was found" not in part
        assert "What to look for" not in part
    # At the top, and beside what is drawn.
    assert page.count("some/model cannot do this task") == 2
    assert 'id="names-summary"' not in page
    assert pages.save_charts(tmp_path, "svg") == [tmp_path / "charts/state-similarity-of-model.svg"]
    put(tmp_path, "layer-removal", LAYER_REMOVAL, clean=BELOW | {"accuracy": 0.75})
    assert 'id="layer-removal-chart"' in pages.write_report(tmp_path).read_text()


def test_a_chart_that_cannot_be_written_costs_no_other(tmp_path, monkeypatch):
    put(tmp_path, "layer-ablation", HEATMAP.assign(low=0.0, high=0.0, left_out=0))
    put(tmp_path, "output-ablation", HEATMAP.assign(low=0.0, high=0.0, left_out=0))
    convert = pages.vl_convert.vegalite_to_svg

    def broken(spec, version, calls=[]):  # noqa: B006  the first chart fails
        calls.append(spec)
        if len(calls) == 1:
            raise ValueError("no chart")
        return convert(spec, version)

    monkeypatch.setattr(pages.vl_convert, "vegalite_to_svg", broken)
    with pytest.warns(UserWarning, match="chart of layer-ablation cannot be written"):
        written = pages.save_charts(tmp_path, "svg")
    assert [path.name.split("-of-")[0] for path in written] == ["output-ablation"]
