"""The notebooks of the site: the tutorial and one an experiment, run when the site is built, shown with what they gave.

What was run is kept in build/notebooks and used again as long as cells, code and versions are the same.
"""

from __future__ import annotations

import atexit
import hashlib
import html
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import jupytext
import nbclient
import nbformat
import vl_convert
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpec
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from ioi_mamba import analyses, tasks
from ioi_mamba.charts import theme
from ioi_mamba.experiments.experiment import Experiment
from ioi_mamba.experiments.needs import Need
from ioi_mamba.files import written_whole
from ioi_mamba.report.pages import VEGALITE, script_json

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "build" / "notebooks"
TUTORIAL = ROOT / "docs" / "tutorial.py"
N_PAIRS = 5
MORE_PAIRS = {"name-steering": 40}  # of fewer, most cells of its table are empty
CHART = "application/vnd.vegalite.v6+json"
# Charts as JSON, which the site draws with its own copy of the library. Of Altair's own forms one asks a server for the
# library, and the other has a name that is not one of JSON for nbformat.
SETUP = f"""
import altair
altair.renderers.register("site", lambda spec, **_: {{"{CHART}": spec}})
altair.renderers.enable("site")
del altair
"""
# An empty NDIF_HOST: the tutorial then asks no server.
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NDIF_HOST": ""}


class NotRun(Exception):
    """A notebook with a cell that was not run, or that failed."""


def of_tutorial() -> NotebookNode:
    """The tutorial, not run."""
    return jupytext.read(TUTORIAL)


def of_experiment(experiment: Experiment) -> NotebookNode:
    """What an experiment asks, a call of it on few pairs, its table, findings and charts; not run."""
    texts = experiment.texts(tasks.ioi.TASK.varies)
    steps = "\n".join(f"{k}. {line.strip()}" for k, line in enumerate(texts["method"].strip().splitlines(), 1))
    judges, n_pairs = Need.HELD_OUT in experiment.needs, MORE_PAIRS.get(experiment.name, N_PAIRS)
    other = f"\nheld_out = experiment.draw(model.tokenizer, {n_pairs}, seed=28, task=im.ioi.TASK)" if judges else ""
    call = "experiment(model, pairs, held_out=held_out)" if judges else "experiment(model, pairs)"
    cells = [
        new_markdown_cell(
            f"# {texts['title']}\n\n**{texts['question']}**\n\n{steps}\n\n"
            f"Here on `mini`, the small model inside the package, and on few prompts: no number below is one of mamba-370m. "
            f"`ioi-mamba run {experiment.name}` does it on more of them and writes a report."
        ),
        new_code_cell(
            "import ioi_mamba as im\nfrom ioi_mamba import analyses\n\n"
            f'model = im.open_model("mini", device="cpu")\nexperiment = analyses.load("{experiment.name}")\n'
            f"pairs = experiment.draw(model.tokenizer, {n_pairs}, seed=27, task=im.ioi.TASK){other}\n"
            'print(*pairs.texts[0], sep="\\n")'
        ),
        new_markdown_cell("## Its table"),
        new_code_cell(f"table = {call}\ntable.head(10).round(3)"),
        new_markdown_cell("## What it says"),
        new_code_cell('print(*experiment.findings(table), sep="\\n")'),
        new_markdown_cell(f"## Its chart\n\n{texts['look_for']}"),
        new_code_cell("experiment.chart(table)"),
    ]
    for k, cell in enumerate(cells):
        cell.id = f"cell-{k}"  # by chance otherwise, and the notebook would be another one each time
    return new_notebook(cells=cells)


def all_run() -> Iterator[tuple[str, NotebookNode]]:
    """Every notebook of the site with its outputs, by its path without an ending. Raises `NotRun` for a cell that fails."""
    yield "tutorial", run(of_tutorial(), "tutorial")
    for name in analyses.ORDER:
        yield f"notebooks/{name}", run(of_experiment(analyses.load(name)), name)


def run(notebook: NotebookNode, name: str) -> NotebookNode:
    """The notebook with what its cells give, or as it was kept under `name`.

    Raises `NotRun` for a cell that fails.
    """
    cells = json.dumps([(cell.cell_type, cell.source) for cell in notebook.cells])

    def make(path: Path) -> None:
        _execute(notebook, name)
        check(notebook, name)
        for cell in notebook.cells:
            if cell.cell_type == "code":  # progress and warnings are of this machine, and no result
                cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
        path.write_text(nbformat.writes(notebook), encoding="utf-8")

    return nbformat.read(_kept(f"{name}.ipynb", cells, make), as_version=4)


def sample_report() -> bytes:
    """The report of all experiments on `mini`, on few pairs each. Raises `NotRun` where the run fails."""
    command = f"run all --model mini --n-pairs {N_PAIRS} --threads 1 --quiet --overwrite --out"

    def make(path: Path) -> None:
        with TemporaryDirectory() as out:
            given = [sys.executable, "-m", "ioi_mamba", *command.split(), out]
            done = subprocess.run(given, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
            if done.returncode:
                raise NotRun(f"The sample report: {done.stderr}")
            path.write_bytes((Path(out) / "index.html").read_bytes())

    return _kept("sample-report.html", command, make).read_bytes()


def _kept(name: str, asked: str, make: Callable[[Path], None]) -> Path:
    """The file that `make` writes for what is asked, made only where it is not kept; one of something else is removed."""
    stem, ending = name.split(".")
    path = KEPT / f"{stem}.{hashlib.sha256(f'{_code()} {asked}'.encode()).hexdigest()[:16]}.{ending}"
    if not path.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as beside:
            make(beside)
        for old in set(KEPT.glob(f"{stem}.*.{ending}")) - {path}:
            old.unlink()
    return path


def check(notebook: NotebookNode, name: str) -> None:
    """Raise `NotRun`, with the cell, unless every cell of code was run without an error."""
    for cell in notebook.cells:
        failed = any(output.output_type == "error" for output in cell.get("outputs", []))
        if cell.cell_type == "code" and (cell.execution_count is None or failed):
            raise NotRun(f"{name}: the cell {cell.source.splitlines()[0]!r} {'failed' if failed else 'was not run'}.")


def page(notebook: NotebookNode, link: str) -> str:
    """A notebook as a page in Markdown, its outputs below their cells. link: to the notebook as a file."""
    title, *rest = [_cell(cell) for cell in notebook.cells]
    head, _, below = title.partition("\n\n")
    # Charts are as wide as the page with nothing at its right.
    front = "---\nhide: [toc]\n---\n\n"
    return f"{front}{head}\n\nThis page is a notebook, [{link}]({link}), as it was run.\n\n{below}{''.join(rest)}"


def charts(notebook: NotebookNode) -> list[dict]:
    """The charts that a notebook shows, as Vega-Lite has them."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.data[CHART] for output in outputs if CHART in output.get("data", {})]


def picture(chart: dict) -> bytes:
    """A chart as PNG, on white."""
    spec = chart | {"config": theme.config() | {"background": "white"}}
    return vl_convert.vegalite_to_png(spec, VEGALITE)


def _cell(cell: NotebookNode) -> str:
    if cell.cell_type != "code":
        return f"{cell.source}\n\n"
    return f"```python\n{cell.source}\n```\n\n" + "".join(map(_output, cell.outputs))


def _output(output: NotebookNode) -> str:
    data = output.get("data", {"text/plain": output.get("text", "")})
    if CHART in data:
        spec = script_json(data[CHART] | {"config": theme.config()})
        return f'<div class="chart"><script type="application/json">{spec}</script></div>\n\n'
    if "text/html" in data:
        return f'<div class="output">{re.sub(r"<style.*?</style>", "", data["text/html"], flags=re.DOTALL)}</div>\n\n'
    return f'<div class="output"><pre>{html.escape(data["text/plain"].rstrip())}</pre></div>\n\n'


def _execute(notebook: NotebookNode, name: str) -> None:
    # One kernel for all, since it takes longer to start than most notebooks to run; nothing of one is left for the next.
    notebook.cells.insert(0, new_code_cell(f"%reset -f\n{SETUP}"))
    try:
        nbclient.NotebookClient(notebook, km=_kernel(), timeout=600).execute()
    except nbclient.exceptions.CellExecutionError as error:
        raise NotRun(f"{name}: {error}") from error
    finally:
        del notebook.cells[0]


@cache
def _kernel() -> KernelManager:
    """A kernel of this Python: whatever others are installed, this one has the package's dependencies. It ends with this process."""
    manager = KernelManager()
    quiet = "--IPKernelApp.log_level=ERROR"  # it warns of a connection without encryption, which stays on this machine
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", quiet]
    manager._kernel_spec = KernelSpec(argv=argv, display_name="this", language="python")
    manager.start_kernel(cwd=str(ROOT), env=os.environ | ENVIRONMENT)
    atexit.register(manager.shutdown_kernel, now=True)
    return manager


@cache
def _code() -> str:
    """A hash of what a notebook runs on: the files of the package and the versions of what it stands on."""
    found = hashlib.sha256(SETUP.encode())
    for path in sorted((ROOT / "ioi_mamba").rglob("*")) + sorted((ROOT / "analyses").rglob("*.py")):
        if path.is_file() and path.suffix != ".pyc":
            found.update(path.read_bytes())
    for package in ("torch", "nnsight", "transformers", "pandas", "altair", "nbclient"):
        found.update(f"{package} {version(package)}".encode())
    return found.hexdigest()
