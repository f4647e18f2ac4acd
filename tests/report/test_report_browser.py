"""What a reader does with the page, done in a real browser with the network off: a cell clicked, a position chosen."""

import json
import shutil
import subprocess
import time
import urllib.request

import pytest
import torch
import websocket

from ioi_mamba.report import pages
from ioi_mamba.study import runs
from ioi_mamba.tasks.base import Pairs

pytestmark = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")

NAMES = ["layer-ablation", "edge-attribution"]  # and the summary that reads them
HOSTILE = "</script><img src=x onerror=document.title='broken'>"


class Browser:
    """A page in Chromium, driven through its debugging protocol."""

    def __init__(self, url, folder):
        flags = "headless no-sandbox disable-gpu no-first-run remote-debugging-port=0 remote-allow-origins=*"
        command = ["chromium", *(f"--{flag}" for flag in flags.split()), "--window-size=1000,1400"]
        command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={folder}", url]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port_file = folder / "DevToolsActivePort"
        self.until(lambda: port_file.is_file() and port_file.read_text().strip())
        port = port_file.read_text().split()[0]
        tabs = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
        (address,) = [tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page"]
        self.socket, self.sent = websocket.create_connection(address, timeout=60), 0

    @staticmethod
    def until(done, seconds=60.0):
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.2)

    def command(self, method, **parameters):
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == self.sent:
                return answer["result"]

    def value(self, expression):
        return self.command("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def click(self, x, y):
        for kind in ("mousePressed", "mouseReleased"):
            self.command("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def browser(mini, tmp_path_factory):
    """The report of a small run, one of whose prompts tries to break the page."""
    out = tmp_path_factory.mktemp("run")
    runs.run_study(mini, NAMES, out, n_pairs=2, progress=False)
    path = out / "layer-ablation.json"
    manifest = json.loads(path.read_text())
    first = manifest["examples"][0]
    first["clean"][first["positions"].index("n1")] = HOSTILE
    path.write_text(json.dumps(manifest))
    page = Browser(pages.write_report(out).as_uri(), tmp_path_factory.mktemp("browser"))
    try:
        page.until(lambda: page.value("document.querySelectorAll('.chart[data-drawn=yes]').length") == len(NAMES) + 1)
        yield page
    finally:
        page.close()


MARKED = "[...document.querySelectorAll('.prompts mark')].map(mark => mark.textContent)"
SHOWN = "document.querySelector('.prompts select').value"
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


def test_a_clicked_cell_shows_its_prompts_with_the_token_marked(browser):
    words = ["layer: 3;", "corruption: ABC AB C -> ABC AC B", "label: n5;"]
    browser.click(*cell(browser, "layer-ablation-chart .mark-rect", words))
    browser.until(lambda: browser.value(SHOWN) == "n5")
    marked = browser.value(MARKED)
    assert len(marked) == 4  # two pairs of this corruption, both prompts of each
    assert marked[0] != marked[1]  # n5 is the name that differs
    assert all(token.strip().isalpha() for token in marked)


def test_a_position_chosen_from_the_list_shows_every_corruption_and_no_prompt_breaks_the_page(browser):
    title = browser.value("document.title")
    browser.value(
        "(() => { const s = document.querySelector('.prompts select'); s.value = 'n1'; "
        "s.dispatchEvent(new Event('change')); })()"
    )
    marked = browser.value(MARKED)
    assert len(marked) == 20
    assert HOSTILE in marked
    assert browser.value("document.querySelectorAll('.prompts img').length") == 0
    assert browser.value("document.title") == title


def test_a_clicked_edge_shows_its_scores_and_its_positions_lead_to_prompts(browser):
    chosen = "document.querySelector('#edge-attribution-chart').textContent.includes('embed to 0:')"
    browser.click(*cell(browser, "edge-attribution-chart .mark-rect", ["to: 6;", "from: embed;"]))
    browser.until(lambda: browser.value(chosen.replace("embed to 0:", "embed to 6:")))
    assert not browser.value(chosen)
    browser.click(*cell(browser, "edge-attribution-chart .mark-rect", ["position: n5;"]))
    shown = "document.querySelector('[data-prompts=edge-attribution-chart] select').value"
    browser.until(lambda: browser.value(shown) == "n5")


@pytest.mark.parametrize("width", [1400, 800])
def test_no_chart_is_wider_than_the_page(browser, width):
    browser.command("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    too_wide = "[...document.querySelectorAll('.chart')].filter(c => c.scrollWidth > c.clientWidth).map(c => c.id)"
    try:
        browser.until(lambda: browser.value(too_wide) == [])
    finally:
        browser.command("Emulation.clearDeviceMetricsOverride")


def test_of_a_random_model_no_chart_is_drawn_and_the_table_is_there(tiny_mamba, tmp_path):
    tokens = torch.arange(1, 61).reshape(12, 5) % 30
    pairs = Pairs(clean=tokens, corrupted=tokens.flip(1), answer=torch.arange(12) + 10, wrong=torch.arange(12) + 23)
    names = ["layer-ablation", "layer-removal", "conv-shift"]
    written = runs.run_study(tiny_mamba, names, tmp_path / "run", pairs=pairs, progress=False)
    page = Browser(written.as_uri(), tmp_path / "browser")
    try:
        page.until(lambda: page.value("document.readyState") == "complete")
        page.until(lambda: page.value("typeof vegaEmbed") == "function")
        assert page.value("document.querySelectorAll('main svg, main canvas, .vega-embed, [data-drawn]').length") == 0
        assert page.value("document.querySelectorAll('main .trouble').length") == len(names)
        assert page.value("document.querySelectorAll('main .loud').length") == len(names)
        assert page.value("document.querySelectorAll('main .more tbody tr').length") > len(names)
        shown = page.value("document.querySelector('main').innerText")
        assert shown.count("No chart is drawn") == len(names)
    finally:
        page.close()
