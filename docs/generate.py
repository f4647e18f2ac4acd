"""What the documentation takes from the code: mkdocs calls the functions `on_...` while it builds.

In a page, a line `<!-- from the code: NAME -->` becomes the text that the function NAME of this module gives. A formula
between dollars becomes MathML, which browsers set by themselves.
"""

from __future__ import annotations

import inspect
import re
from html import unescape
from importlib import import_module
from pathlib import Path
from textwrap import indent

import blocks
import latex2mathml.converter
import links
import nbformat
import notebooks
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

from ioi_mamba import analyses, tasks
from ioi_mamba.analyses import output_ablation as shortest
from ioi_mamba.experiments.experiment import Experiment
from ioi_mamba.experiments.needs import limits_of
from ioi_mamba.experiments.options import options_of
from ioi_mamba.model import glossary
from ioi_mamba.model.families import FAMILIES, nemotron_h
from ioi_mamba.model.family import Family
from ioi_mamba.report.pages import bundle

MARK = re.compile(r"^<!-- from the code: (\w+) -->$", re.MULTILINE)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config):
    """List the notebooks in the navigation."""
    (section,) = (section["Experiments"] for section in config.nav if "Experiments" in section)
    section.append({"Notebooks": [{_title(name): f"notebooks/{name}.md"} for name in analyses.ORDER]})
    return config


def on_files(files, config):
    """Add the notebooks, each as a page with its outputs and as a file to download, their pictures, and the sample report."""

    def add(path, content):
        files.append(File.generated(config, path, content=content))

    try:
        for path, notebook in notebooks.all_run():
            name = Path(path).name
            text = notebooks.page(notebook, f"{name}.ipynb")
            add(f"{path}.ipynb", nbformat.writes(notebook))
            if name in analyses.ORDER:
                text += _source(name)
                add(f"pictures/{name}.png", notebooks.picture(notebooks.charts(notebook)[0]))
            add(f"{path}.md", text)
        add("sample-report/index.html", notebooks.sample_report())
    except notebooks.NotRun as error:
        raise PluginError(str(error)) from error
    add("vega.js", bundle())
    return files


def on_page_markdown(markdown, page, config, files):
    """Fill in what the page asks of the code. Raises KeyError for a function that is not there."""
    return MARK.sub(lambda mark: PARTS[mark[1]](), markdown)


def on_page_content(html, page, config, files):
    """Set the formulas."""
    return FORMULA.sub(lambda found: _set(unescape(found[2]), "block" if found[1] == "div" else "inline"), html)


def on_post_build(config):
    """Raise PluginError where a link of the site leads nowhere, or a page would load something from elsewhere."""
    if found := links.broken(Path(config.site_dir)):
        raise PluginError("\n".join(found))


def _title(name: str) -> str:
    return analyses.load(name).texts(tasks.ioi.TASK.varies)["title"]


def _source(name: str) -> str:
    """The module of an experiment, folded, at the end of its notebook."""
    module = import_module(analyses.load(name).run.__module__)
    code = indent(f"```python\n{inspect.getsource(module)}```", "    ")
    return f'## Its source\n\n??? note "analyses/{Path(module.__file__).name}"\n\n{code}\n'


def _symbol(written: str) -> str:
    """A symbol of the paper, such as A_bar_t, as a formula; of none, nothing."""
    name, *rest = written.split("_")
    name = {"Delta": "\\Delta"}.get(name, name)
    name = f"\\bar{{{name}}}" if "bar" in rest else name
    return f"${'_'.join((name, *(each for each in rest if each != 'bar')))}$" if written else ""


def _set(formula: str, display: str) -> str:
    return latex2mathml.converter.convert(formula, display=display)


def dimensions() -> str:
    """The letters of shapes."""
    rows = [(f"`{term.letter}`", term.name, _symbol(term.paper), term.meaning) for term in glossary.DIMENSIONS]
    return _table(("in shapes", "name", "paper", "meaning"), rows)


def words() -> str:
    """The words of the field, as every page explains them."""
    rows = [(word.word, word.meaning) for word in glossary.WORDS]
    return _table(("word", "means"), rows)


def quantities() -> str:
    """The letters of the state space model."""
    rows = [(f"`{term.letter}`", term.name, _symbol(term.paper), term.meaning) for term in glossary.QUANTITIES]
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
    return "\n\n".join(_experiment(analyses.load(name)) for name in analyses.ORDER)


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


def pictures_of_blocks() -> str:
    """The picture of a block of every family."""
    return "\n\n".join(
        f'## {family.label}\n\n<div class="drawn">{blocks.draw(family)}</div>' for family in FAMILIES.values()
    )


def gallery() -> str:
    """A picture an experiment, with links to its notebook and its source."""
    cards = []
    for name in analyses.ORDER:
        texts = analyses.load(name).texts(tasks.ioi.TASK.varies)
        cards.append(
            f"<div markdown>\n[![{texts['title']}: the chart of the notebook](pictures/{name}.png)](notebooks/{name}.md)\n\n"
            f"**{texts['title']}.** {texts['question']}\n\n"
            f"[notebook](notebooks/{name}.md) · [source](notebooks/{name}.md#its-source) · "
            f"[method and columns](experiments.md#{name})\n</div>"
        )
    return '<div class="gallery" markdown>\n' + "\n\n".join(cards) + "\n</div>"


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
        pictures_of_blocks,
        gallery,
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
        f"## {texts['title']} {{#{experiment.name}}}\n\n`ioi-mamba run {experiment.name}` · paper {experiment.paper} · [notebook](notebooks/{experiment.name}.md)\n\n"
        f"**{texts['question']}**\n\n{method}\n\n*What to look for.* {texts['look_for']}\n\n{about}\n\n"
        f"{shown}\n\n{_table(('column', 'type', 'meaning'), columns)}\n\n"
        f"::: {module.__name__}.run\n    options:\n      heading_level: 3\n"
    )


def _table(header, rows) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
