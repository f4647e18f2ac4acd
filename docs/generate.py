"""What the documentation takes from the code: mkdocs calls `on_files` and `on_page_markdown` while it builds.

In a page, a line `<!-- from the code: NAME -->` becomes the text that the function NAME of this module gives.
"""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path

import jupytext

from ioi_mamba import analyses, tasks
from ioi_mamba.analyses import output_ablation as shortest
from ioi_mamba.experiments.experiment import Experiment
from ioi_mamba.experiments.needs import limits_of
from ioi_mamba.experiments.options import options_of
from ioi_mamba.model import glossary
from ioi_mamba.model.families import FAMILIES, nemotron_h
from ioi_mamba.model.family import Family

TUTORIAL = Path(__file__).parent / "tutorial.py"
MARK = re.compile(r"^<!-- from the code: (\w+) -->$", re.MULTILINE)


def on_files(files, config):
    """Add the tutorial as a page, without outputs, and as a notebook to download."""
    from mkdocs.structure.files import File

    notebook = jupytext.read(TUTORIAL)
    text = "".join(_cell(cell) for cell in notebook.cells)
    title, _, rest = text.partition("\n\n")
    link = "This page is a notebook: [tutorial.ipynb](tutorial.ipynb). Its outputs appear when it is run."
    files.append(File.generated(config, "tutorial.md", content=f"{title}\n\n{link}\n\n{rest}"))
    files.append(File.generated(config, "tutorial.ipynb", content=jupytext.writes(notebook, fmt="ipynb")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Fill in what the page asks of the code. Raises KeyError for a function that is not there."""
    return MARK.sub(lambda mark: PARTS[mark[1]](), markdown)


def dimensions() -> str:
    """The letters of shapes."""
    rows = [(f"`{term.letter}`", term.name, term.paper, term.meaning) for term in glossary.DIMENSIONS]
    return _table(("in shapes", "name", "paper", "meaning"), rows)


def words() -> str:
    """The words of the field, as every page explains them."""
    rows = [(word.word, word.meaning) for word in glossary.WORDS]
    return _table(("word", "means"), rows)


def quantities() -> str:
    """The letters of the state space model."""
    rows = [(f"`{term.letter}`", term.name, term.paper, term.meaning) for term in glossary.QUANTITIES]
    return _table(("here", "name", "paper", "meaning"), rows)


def sites() -> str:
    """Every hook name of a Mamba-1 with its shape, place and meaning, in the order of a forward pass."""
    return _sites(FAMILIES["mamba"])


def _sites(family: Family) -> str:
    rows = [(f"`{name}`", f"`{shape}`", place, meaning) for name, shape, place, meaning in family.listed()]
    return _table(("hook name", "shape", "where it is", "meaning"), rows)


def families() -> str:
    """The families of models, in a line each."""
    rows = []
    for family in FAMILIES.values():
        blocks = ["; ".join(_words(group) for group in kind.writers) for kind in family.kinds.values()]
        attends = any(kind.attends for kind in family.kinds.values())
        rows.append(
            (
                family.label,
                f"`{family.name}`",
                ", or ".join(dict.fromkeys(blocks)),
                "a layer" if attends else "a layer and a position",
                f"`{family.published[0]}`",
            )
        )
    return _table(("family", "model_type", "a block has", "passes go on from", "such as"), rows)


def limits() -> str:
    """What cannot be done, why, and with which families."""
    of: dict[tuple[str, str], list[str]] = {}
    for family in FAMILIES.values():
        for limit in limits_of(family):
            of.setdefault(limit, []).append(family.label)
    rows = [(what, why, ", ".join(labels)) for (what, why), labels in of.items()]
    return _table(("what", "why", "with"), rows)


def _words(group: tuple) -> str:
    return " beside ".join(writer.name for writer in group)


def a_family() -> str:
    """The record of a family, as it stands in the code."""
    return f"```python\n{inspect.getsource(nemotron_h)}```"


def sites_of_families() -> str:
    """The sites of every family after the first."""
    others = [family for family in FAMILIES.values() if family.name != "mamba"]
    return "\n\n".join(f"### {family.label}\n\n{_sites(family)}" for family in others)


def experiments() -> str:
    """One section an experiment: its question, method, docstring and table."""
    return "\n\n".join(_experiment(analyses.load(name)) for name in analyses.available())


def task_table() -> str:
    """The built-in tasks."""
    rows = [
        (f"`{name}`", task.title, task.varies)
        for name, task in ((name, tasks.load(name)) for name in tasks.available())
    ]
    return _table(("task", "what a report of it is about", "the prompts of a pair differ in"), rows)


def greater_than() -> str:
    """The source of the second task."""
    return f"```python\n{Path(tasks.greater_than.__file__).read_text(encoding='utf-8')}```"


def output_ablation() -> str:
    """The source of the shortest experiment."""
    return f"```python\n{Path(shortest.__file__).read_text(encoding='utf-8')}```"


def slurm() -> str:
    """The script for Slurm."""
    return f"```bash\n{(Path(__file__).parent / 'slurm.sh').read_text()}```"


PARTS = {
    part.__name__: part
    for part in (
        words,
        dimensions,
        quantities,
        sites,
        families,
        limits,
        sites_of_families,
        a_family,
        experiments,
        task_table,
        greater_than,
        output_ablation,
        slurm,
    )
}


def _experiment(experiment: Experiment) -> str:
    module = import_module(experiment.run.__module__)
    about = (module.__doc__ or "").partition("\n\n")[2].strip()
    texts = experiment.texts(tasks.ioi.TASK.varies)
    method = "\n".join(f"{k}. {line.strip()}" for k, line in enumerate(texts["method"].strip().splitlines(), 1))
    options = [
        (f"`{option.name}`", f"`{option.default}`", option.described, option.help)
        for option in options_of(experiment.options).values()
    ]
    columns = [
        (f"`{column.name}`", column.kind + (", may be empty" if column.nullable else ""), column.meaning)
        for column in experiment.columns
    ]
    shown = _table(("option", "default", "what it takes", "what it does"), options) if options else "It has no options."
    return (
        f"## {texts['title']}\n\n`ioi-mamba run {experiment.name}` · paper {experiment.paper}\n\n"
        f"**{texts['question']}**\n\n{method}\n\n*What to look for.* {texts['look_for']}\n\n{about}\n\n"
        f"{shown}\n\n{_table(('column', 'type', 'meaning'), columns)}\n\n"
        f"::: {module.__name__}.run\n    options:\n      heading_level: 3\n"
    )


def _cell(cell) -> str:
    return f"```python\n{cell.source}\n```\n\n" if cell.cell_type == "code" else f"{cell.source}\n\n"


def _table(header, rows) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
