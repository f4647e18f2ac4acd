"""What a reader does with the page, done in a real browser with the network off: at a glance, with a mouse, with a keyboard.

`npm install --no-package-lock --prefix tests/report` gets axe-core, which looks for what shuts readers out.
Pictures of the page are left in the folder that REPORT_PICTURES names.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from browser import Browser

from ioi_mamba.model.glossary import WORDS
from ioi_mamba.report import pages
from ioi_mamba.study import runs
from ioi_mamba.tasks.base import Pairs

pytestmark = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")

AXE = Path(__file__).parent / "node_modules/axe-core/axe.min.js"
NAMES = ["layer-ablation", "state-ablation", "edge-attribution", "positional-attribution"]
HOSTILE = "</script><img src=x onerror=document.title='broken'>"


@pytest.fixture(scope="module")
def browser(mini, tmp_path_factory):
    """The report of a small run, one of whose prompts tries to break the page."""
    out = tmp_path_factory.mktemp("run")
    runs.run_study(mini, NAMES, out, n_pairs=2, progress=False)
    path = out / "layer-ablation.json"
    manifest = json.loads(path.read_text())
    first = manifest["examples"][0]
    first["clean"][first["positions"].index("n1-1")] = HOSTILE
    path.write_text(json.dumps(manifest))
    page = Browser(pages.write_report(out).as_uri(), tmp_path_factory.mktemp("browser"))
    try:
        page.until(lambda: page.value("document.body.dataset.done"))
        yield page
    finally:
        page.close()


def keep(browser, name):
    """A picture of what is seen, where someone wants it."""
    if folder := os.environ.get("REPORT_PICTURES"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.picture(Path(folder) / f"{name}.png")


@pytest.fixture
def at_size(browser):
    """A function that gives the window another size until the test ends."""
    yield browser.resize
    browser.resize(1400, 900)
    browser.value("window.scrollTo({top: 0, behavior: 'instant'})")


SEEN = """((selector) => { const box = document.querySelector(selector).getBoundingClientRect();
  return box.top >= 0 && box.bottom <= innerHeight && box.left >= 0 && box.right <= innerWidth && box.height > 0; })"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1400, 900), (800, 1000)])
def test_the_first_screen_has_the_example_the_finding_and_the_figure(browser, at_size, width, height, scheme):
    at_size(width, height)
    browser.scheme(scheme)
    browser.value("window.scrollTo({top: 0, behavior: 'instant'})")
    keep(browser, f"first-screen-{width}-{scheme}")
    for selector in ("h1", "header .example", ".lede", ".view:not([hidden]) svg.hero"):
        browser.until(lambda chosen=selector: browser.value(f"{SEEN}({chosen!r})"), 10)
    assert browser.value("document.querySelectorAll('header .example mark').length") == 2
    assert browser.value("document.querySelectorAll('.answers dt').length") == 5
    browser.scheme("light")


def test_the_page_is_no_wider_than_the_window(browser, at_size):
    for width in (1400, 800):
        at_size(width, 900)
        too_wide = (
            "[...document.querySelectorAll('.chart')].filter(c => c.scrollWidth > c.clientWidth + 1).map(c => c.id)"
        )
        browser.until(lambda: browser.value(too_wide) == [])  # noqa: B023
        assert browser.value("document.documentElement.scrollWidth <= innerWidth")


def test_every_word_that_has_a_definition_leads_to_it_and_shows_it(browser):
    uses = browser.value("[...document.querySelectorAll('a.term')].map(a => [a.textContent, a.getAttribute('href')])")
    assert len(uses) > 20
    known = {form: word for word in WORDS for form in (word.word, *word.forms)}
    for text, href in {tuple(use) for use in uses}:
        assert browser.value(f"document.querySelector({href!r}).textContent") == known[text].meaning
    browser.value("document.querySelector('.lede a.term').focus()")
    shown = browser.value("document.getElementById('definition').textContent")
    assert shown == known[browser.value("document.querySelector('.lede a.term').textContent")].meaning
    assert browser.value("document.getElementById('definition').checkVisibility()")
    browser.press("Escape")
    assert not browser.value("document.getElementById('definition').checkVisibility()")


MARKS = "[...document.querySelectorAll('.view:not([hidden]) .mark')]"


def test_the_figure_works_by_keyboard(browser):
    browser.value(f"{MARKS}.find(m => m.classList.contains('reads')).focus()")
    said = browser.value("document.querySelector('.says').textContent")
    assert said == browser.value("document.activeElement.getAttribute('aria-label')")
    assert "patching it turns" in said
    browser.press("ArrowUp")
    assert browser.value("document.activeElement.closest('svg.hero') !== null")
    assert browser.value("document.activeElement.getAttribute('aria-label')") != said
    browser.press("ArrowDown")
    browser.value(f"{MARKS}.find(m => m.classList.contains('reads')).focus()")
    browser.press("Enter")
    assert browser.value("document.querySelector('.pinned .chosen').textContent") == said
    assert browser.value("document.querySelectorAll('.pinned .example mark').length") >= 2
    assert "interval" in browser.value("document.querySelector('.pinned').textContent")
    keep(browser, "pinned")
    section = browser.value("document.querySelector('.pinned a').hash")
    assert browser.value(f"document.querySelector({section!r}).tagName") == "SECTION"
    browser.press("Escape")
    assert not browser.value("document.querySelector('.pinned').checkVisibility()")
    assert browser.value("document.activeElement.getAttribute('aria-label')") == said


def test_a_layer_that_is_hidden_takes_its_marks_with_it_and_the_count_says_so(browser):
    layer = browser.value(f"{MARKS}.find(m => m.classList.contains('reads')).dataset.layers")
    of_it = browser.value(f"{MARKS}.filter(m => m.dataset.layers.split(' ').includes('{layer}')).length")
    everything = browser.value(f"{MARKS}.length")
    assert 0 < of_it < everything
    row = f"document.querySelector('.view:not([hidden]) .row[role][data-layers=\"{layer}\"]')"
    browser.value(f"{row}.focus()")
    browser.press("Enter")
    assert browser.value(f"{MARKS}.filter(m => getComputedStyle(m).display !== 'none').length") == everything - of_it
    told = browser.value("document.querySelector('.view:not([hidden]) .count').textContent")
    assert told.startswith(f"{everything - of_it} of {everything} marks seen")
    browser.press("Enter")
    assert browser.value(f"{MARKS}.filter(m => getComputedStyle(m).display !== 'none').length") == everything


def test_another_corruption_is_shown_in_the_figure_the_example_and_every_chart(browser):
    before = browser.value("document.querySelector('header .example mark').textContent")
    browser.value(
        "[...document.querySelectorAll('button[data-view]')].find(b => b.textContent.trim() === 'n2').click()"
    )
    assert browser.value("document.querySelector('.view:not([hidden])').dataset.view") != "0"
    assert browser.value("document.querySelector('header .example mark').textContent") != before
    chosen = "[...document.querySelectorAll('#layer-ablation-chart input:checked')].map(i => i.value)"
    browser.until(lambda: browser.value(chosen) == ["ACB AB C -> ADB AB D"], 10)
    browser.value("document.querySelector('button[data-view=\"0\"]').click()")


MARKED = "[...document.querySelectorAll('#layer-ablation .prompts mark')].map(mark => mark.textContent)"
SHOWN = "document.querySelector('#layer-ablation select[data-ask]').value"
CELL = """(() => {
  const cells = [...document.querySelectorAll("#CHART path")];
  const cell = cells.find(c => WORDS.every(word => (c.getAttribute("aria-label") || "").includes(word)));
  cell.scrollIntoView({block: "center", behavior: "instant"});
  const box = cell.getBoundingClientRect();
  return [box.x + box.width / 2, box.y + box.height / 2];
})()"""


def cell(browser, where, words):
    """The middle of the mark whose description has all of the words, scrolled into sight."""
    return browser.value(CELL.replace("CHART", where).replace("WORDS", json.dumps(words)))


def test_a_clicked_cell_is_seen_as_chosen_and_shows_its_prompts_with_the_token_marked(browser):
    browser.click(*cell(browser, "layer-ablation-chart .mark-rect", ["layer: 3;", "label: n3;"]))
    browser.until(lambda: browser.value(SHOWN) == "n3")
    marked = browser.value(MARKED)
    assert len(marked) == 4  # two pairs of the corruption that is shown, both prompts of each
    assert all(token.strip().isalpha() for token in marked)
    outlined = "[...document.querySelectorAll('#layer-ablation-chart .mark-rect path[stroke-width=\"2.5\"]')].length"
    browser.until(lambda: browser.value(outlined) >= 1, 10)


def test_a_chart_works_by_keyboard(browser):
    browser.value("document.querySelector('#layer-ablation-chart').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        browser.press(key)
    read = browser.value("document.getElementById('reading').textContent")
    assert "effect:" in read
    browser.press("Enter")
    label = read.split("label: ")[1].split(";")[0]
    browser.until(lambda: browser.value(SHOWN) == label, 10)


def test_a_position_chosen_from_the_list_shows_every_corruption_and_no_prompt_breaks_the_page(browser):
    title = browser.value("document.title")
    browser.value(
        "(() => { const s = document.querySelector('#layer-ablation select[data-ask]'); s.value = 'n1-1'; "
        "s.dispatchEvent(new Event('change')); })()"
    )
    marked = browser.value(MARKED)
    assert len(marked) == 20
    assert HOSTILE in marked
    assert browser.value("document.querySelectorAll('.prompts img, .example img').length") == 0
    assert browser.value("document.title") == title


def test_a_clicked_edge_shows_its_scores_and_its_positions_lead_to_prompts(browser):
    chosen = "document.querySelector('#edge-attribution-chart').textContent.includes('embed to 0:')"
    browser.click(*cell(browser, "edge-attribution-chart .mark-rect", ["to: 6;", "from: embed;"]))
    browser.until(lambda: browser.value(chosen.replace("embed to 0:", "embed to 6:")))
    assert not browser.value(chosen)
    browser.click(*cell(browser, "edge-attribution-chart .mark-rect", ["n5;"]))
    shown = "document.querySelector('#edge-attribution select[data-ask]').value"
    browser.until(lambda: browser.value(shown) == "n5")


def test_charts_on_demand_are_drawn_when_they_are_asked_for(browser):
    drawn = "document.querySelectorAll('#layer-ablation details.more .chart[data-drawn=yes]').length"
    assert browser.value(drawn) == 0
    browser.value("document.querySelector('#layer-ablation details.more').open = true")
    browser.until(lambda: browser.value(drawn) == 1, 20)
    browser.value("document.querySelector('#layer-ablation details.more').open = false")


def test_a_table_is_sorted_by_the_column_that_is_clicked(browser):
    column = (
        "[...document.querySelectorAll('table[data-rows=layer-ablation] tbody tr')].map(r => r.cells[4].textContent)"
    )
    head = "[...document.querySelectorAll('table[data-rows=layer-ablation] th button')].find(b => b.textContent === 'effect')"
    effects = [abs(float(text)) for text in browser.value(column)]
    assert effects == sorted(effects, reverse=True)
    browser.value(f"{head}.click()")
    browser.value(f"{head}.click()")
    effects = [float(text) for text in browser.value(column)]
    assert effects == sorted(effects)
    assert len({len(text.split(".")[1]) for text in browser.value(column)}) == 1


def test_on_paper_method_and_numbers_are_there(browser, tmp_path):
    browser.printed(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    browser.command("Emulation.setEmulatedMedia", media="print")
    browser.value("dispatchEvent(new Event('beforeprint'))")
    try:
        assert browser.value("[...document.querySelectorAll('details.more')].every(d => d.open)")
        assert browser.value("document.querySelector('#layer-ablation .method').checkVisibility()")
        assert browser.value("document.querySelector('#layer-ablation table').checkVisibility()")
        assert not browser.value("document.querySelector('nav').checkVisibility()")
        # Words and provenance behind the results; no heading over a chart that was not drawn.
        assert browser.value("[...document.querySelectorAll('main > details')].map(d => d.className)") == [
            "key",
            "provenance",
        ]
        empty = "[...document.querySelectorAll('.chart:not([data-drawn=yes])')].filter(c => c.checkVisibility()).length"
        assert browser.value(empty) == 0
    finally:
        browser.value("dispatchEvent(new Event('afterprint'))")
        browser.command("Emulation.setEmulatedMedia", media="")
    assert browser.value("document.querySelectorAll('details.more[open], main > details').length") == 0
    assert browser.value("document.querySelectorAll('.about > details').length") == 2


@pytest.mark.skipif(not AXE.is_file(), reason="needs axe-core: npm install --no-package-lock --prefix tests/report")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_shuts_a_reader_out(browser, scheme):
    browser.scheme(scheme)
    browser.value(AXE.read_text())
    browser.value(
        "for (const d of document.querySelectorAll('details.key, #layer-ablation details.more, #claims details')) d.open = true"
    )
    found = browser.value(
        "axe.run(document, {resultTypes: ['violations']}).then(r => r.violations.map(v => "
        "[v.impact, v.id, v.nodes.length, v.nodes[0].html.slice(0, 200), v.nodes[0].failureSummary]))"
    )
    browser.scheme("light")
    browser.value("for (const d of document.querySelectorAll('details')) d.open = false")
    assert browser.value("typeof axe") == "object"
    assert [each for each in found if each[0] in ("serious", "critical")] == []


def test_nothing_is_asked_of_the_network(browser):
    asked = browser.value("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in asked if not name.startswith(("blob:", "data:"))] == []


def test_of_a_random_model_no_chart_is_drawn_and_the_table_is_there(tiny_mamba, tmp_path):
    tokens = torch.arange(1, 61).reshape(12, 5) % 30
    pairs = Pairs(clean=tokens, corrupted=tokens.flip(1), answer=torch.arange(12) + 10, wrong=torch.arange(12) + 23)
    names = ["layer-ablation", "layer-removal", "conv-shift"]
    written = runs.run_study(tiny_mamba, names, tmp_path / "run", pairs=pairs, progress=False)
    page = Browser(written.as_uri(), tmp_path / "browser")
    try:
        page.until(lambda: page.value("document.body.dataset.done"))
        assert page.value("document.querySelectorAll('main .chart, main canvas, .vega-embed, .mark').length") == 0
        assert page.value("document.querySelectorAll('main .trouble').length") == len(names)
        # Why stands at the top alone, once for each set of prompts.
        assert page.value("document.querySelectorAll('header .loud').length") in (1, 2)
        assert page.value("document.querySelectorAll('main .loud').length") == 0
        assert page.value("document.querySelectorAll('main .more tbody tr').length") > len(names)
        shown = page.value("document.querySelector('main').innerText")
        assert shown.count("No chart is drawn") == len(names)
        pages.write_report(tmp_path / "run", draw_anyway=True)
        page.command("Page.reload")
        page.until(
            lambda: (
                page.value("document.body.dataset.done && document.querySelectorAll('.chart[data-drawn=yes]').length")
                == len(names)
            )
        )
        watermark = "getComputedStyle(document.querySelector('#conv-shift .watermarked'), '::after').content"
        assert "guesses" in page.value(watermark)
    finally:
        page.close()
