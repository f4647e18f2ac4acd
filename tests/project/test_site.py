"""What the site adds to the pages: notebooks that were run, pictures of blocks that are true, links that lead somewhere."""

import re
import shutil
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import conftest  # noqa: F401  sets the environment before transformers is imported
import pytest
import torch
from browser import Browser
from pages import DOCS, ROOT

import ioi_mamba as im
from ioi_mamba import analyses
from ioi_mamba.model.families import FAMILIES
from ioi_mamba.passes.forward import forward

LAYER = 3
SPELLED = {"conv_slice": "conv_slice.-1"}


@pytest.fixture
def docs(monkeypatch):
    """The folder of the modules that make the site, to import them from."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    monkeypatch.syspath_prepend(DOCS)


@pytest.fixture
def notebooks(docs, tmp_path, monkeypatch):
    import notebooks

    monkeypatch.setattr(notebooks, "KEPT", tmp_path / "kept")
    return notebooks


def a_notebook(*sources):
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    return new_notebook(cells=[new_markdown_cell("# A title\n\nText."), *map(new_code_cell, sources)])


def test_a_notebook_is_run_once_and_shows_what_it_gave(notebooks, monkeypatch):
    chart = (
        "import altair as alt, pandas as pd\nalt.Chart(pd.DataFrame({'a': ['</script>']})).mark_bar().encode(x='a:N')"
    )
    cells = ("import sys\nprint('a', 'warning', file=sys.stderr)\nprint('<b>', 6 * 7)", chart)
    found = notebooks.run(a_notebook(*cells), "some")
    page = notebooks.page(found, "some.ipynb")
    assert "&lt;b&gt; 42" in page
    assert "a warning" not in page
    assert page.count('<div class="chart">') == len(notebooks.charts(found)) == 1
    assert page.partition('<div class="chart">')[2].count("</script>") == 1, "a text of the chart ended the element"
    assert notebooks.picture(notebooks.charts(found)[0]).startswith(b"\x89PNG")
    # Nothing is left of a notebook for the next.
    with pytest.raises(notebooks.NotRun, match="name 'sys' is not defined"):
        notebooks.run(a_notebook("sys.version"), "other")
    monkeypatch.setattr(notebooks, "_execute", lambda notebook, name: pytest.fail("it was run again"))
    assert notebooks.run(a_notebook(*cells), "some") == found


def test_a_notebook_that_was_not_run_or_failed_is_refused(notebooks, monkeypatch):
    not_run = a_notebook("print(1)")
    with pytest.raises(notebooks.NotRun, match=r"some: the cell 'print\(1\)' was not run"):
        notebooks.check(not_run, "some")
    monkeypatch.setattr(notebooks, "_execute", lambda notebook, name: None)
    with pytest.raises(notebooks.NotRun, match="was not run"):
        notebooks.run(not_run, "some")
    assert not list(notebooks.KEPT.glob("*.ipynb"))
    not_run.cells[1].execution_count = 1
    not_run.cells[1].outputs = [notebooks.NotebookNode(output_type="error")]
    with pytest.raises(notebooks.NotRun, match="failed"):
        notebooks.check(not_run, "some")


@pytest.mark.parametrize("name", analyses.ORDER)
def test_the_notebook_of_an_experiment_is_python_that_calls_it(notebooks, name):
    notebook = notebooks.of_experiment(analyses.load(name))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            compile(cell.source, name, "exec")
    assert f'analyses.load("{name}")' in notebook.cells[1].source
    assert analyses.load(name).question.partition("{")[0] in notebook.cells[0].source


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as `make docs` builds it, but with one small chart in place of what each notebook gives."""
    pytest.importorskip("mkdocs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    def shown(notebook, name):
        *_, last = (cell for cell in notebook.cells if cell.cell_type == "code")
        values, x = [{"a": 1}], {"field": "a", "type": "quantitative"}
        spec = {"mark": "point", "data": {"values": values}, "encoding": {"x": x}}
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.execution_count, cell.outputs = 1, []
        data = {notebooks.CHART: spec}
        last.outputs = [notebooks.NotebookNode(output_type="display_data", metadata={}, data=data)]
        return notebook

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS)
        patch.syspath_prepend(ROOT)
        patch.chdir(ROOT)
        import notebooks

        patch.setattr(notebooks, "run", shown)
        patch.setattr(notebooks, "sample_report", lambda: b"<html><body>a report</body></html>")
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


def test_the_site_builds_strictly_and_has_every_site_and_experiment(site):
    concepts = (site / "concepts" / "index.html").read_text()
    assert "<math" in concepts
    for name, *_ in FAMILIES["mamba"].listed():
        assert name in concepts
    experiments = (site / "experiments" / "index.html").read_text()
    gallery = (site / "gallery" / "index.html").read_text()
    for name in analyses.ORDER:
        assert f"ioi-mamba run {name}" in experiments
        assert f"analyses.{name.replace('-', '_')}.run" in experiments
        assert f'src="../pictures/{name}.png"' in gallery
        assert f'href="../notebooks/{name}/#its-source"' in gallery
        assert '<div class="chart">' in (site / "notebooks" / name / "index.html").read_text()
        assert '"cells"' in (site / "notebooks" / f"{name}.ipynb").read_text()
    assert '"cells"' in (site / "tutorial.ipynb").read_text()
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert "from the code:" not in text
        assert 'class="arithmatex"' not in text
        assert str(ROOT) not in text
    assert (site / "blocks" / "index.html").read_text().count('class="block"') == len(FAMILIES)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
def test_a_browser_without_network_draws_a_chart_of_the_site(site, tmp_path):
    handler = partial(SimpleHTTPRequestHandler, directory=str(site))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    browser = Browser(f"{address}notebooks/layer-ablation/", tmp_path)
    try:
        browser.until(lambda: browser.value("document.querySelector('.chart')?.dataset.drawn"))
        assert browser.value("document.querySelector('.chart').dataset.drawn") == "yes"
        assert browser.value("document.querySelectorAll('.chart svg.marks').length") == 1
        loaded = browser.value("performance.getEntriesByType('resource').map(each => each.name)")
        assert any(url.endswith("/vega.js") for url in loaded)
        assert all(url.startswith(address) for url in loaded), loaded
    finally:
        browser.close()
        server.shutdown()


def test_links_of_a_site_that_lead_nowhere_are_found(docs, tmp_path):
    import links

    (tmp_path / "there").mkdir()
    (tmp_path / "there/index.html").write_text('<h1 id="place">x</h1><a href="../index.html#no">x</a>')
    good = '<a href="there/#place">x</a><a href="https://elsewhere.org">x</a><a href="#here" id="here">x</a>'
    bad = (
        '<a href="gone/">x</a><a href="there/#gone">x</a><img src="no.png"><script src="https://cdn.org/x.js"></script>'
    )
    (tmp_path / "index.html").write_text(good + bad)
    found = "\n".join(links.broken(tmp_path))
    for part in (
        "gone/, which",
        "there/#gone, a place",
        "no.png, which",
        "loads https://cdn.org",
        "index.html#no, a place",
    ):
        assert found.count(part) == 1
    assert len(found.splitlines()) == 5


@pytest.mark.parametrize("name", FAMILIES)
def test_the_picture_of_a_block_has_every_hook_name_once(docs, name):
    import blocks

    drawn = re.findall(r">(hook_[^<]+)<", blocks.draw(FAMILIES[name]))
    listed = [hook.removeprefix("blocks.I.") for hook, *_ in FAMILIES[name].listed()]
    assert sorted(drawn) == sorted(listed)


def below(arrows, start):
    """Everything that arrows lead to from a site."""
    found, todo = set(), [start]
    while todo:
        at = todo.pop()
        new = {arrow.target for arrow in arrows if arrow.source == at} - found
        found |= new
        todo += new
    return found


@pytest.mark.parametrize("model_id", ["mini", "mini-mamba2"])
def test_what_an_edit_changes_is_what_the_arrows_of_the_picture_lead_to(docs, model_id):
    import blocks

    model = im.open_model(model_id, device="cpu")
    tokens = im.ioi.generate(model.tokenizer, 1, 27).clean
    spots, arrows = blocks.places(FAMILIES[model.config.model_type])
    names = {site: f"blocks.{LAYER}.hook_{SPELLED.get(site, site)}" for site in spots}
    plain = forward(model, tokens, reads=names.values())
    for site, hook in names.items():
        edited = forward(model, tokens, {hook: lambda value: value * 1.5 + 0.1}, names.values())
        changed = {other for other, name in names.items() if not torch.allclose(edited[name], plain[name], atol=1e-5)}
        assert changed == below(arrows, site) | {site}, site


def test_the_arrows_of_a_block_hold_what_its_layer_says_of_writes_that_come_too_late(docs):
    import blocks

    for name in ("mamba", "mamba2"):
        family = FAMILIES[name]
        _, arrows = blocks.places(family)
        for site, feeds in family.mixer.layer_pass.fed_by.items():
            for fed in feeds:
                assert site in below(arrows, fed), (fed, site)
