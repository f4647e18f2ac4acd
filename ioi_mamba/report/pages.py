"""One offline page out of a run's tables: the story on its first screen, then a section a question, the paper's claims last.

The page loads nothing: the chart library stands in it once, the charts as JSON. A content security policy in
its head makes the browser hold to that. Whatever text a table or manifest carries is shown as text.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import altair as alt
import jinja2
import numpy as np
import pandas as pd
import vl_convert
from markupsafe import Markup

from ioi_mamba import analyses, tasks
from ioi_mamba.charts import drawing
from ioi_mamba.charts.theme import themed
from ioi_mamba.claims import TASK, compare, names_summary
from ioi_mamba.claims.names_summary import Summary
from ioi_mamba.errors import InputError
from ioi_mamba.experiments.experiment import Experiment, resolved
from ioi_mamba.experiments.story import Told
from ioi_mamba.files import EMBEDDED, written_whole
from ioi_mamba.model.glossary import WORDS
from ioi_mamba.passes.ablations import RESAMPLE
from ioi_mamba.report import preview, provenance, terms
from ioi_mamba.report.hero import drawn
from ioi_mamba.report.story import Found, Story, panel_of, tell
from ioi_mamba.results import baseline
from ioi_mamba.results.origin import check_one_run
from ioi_mamba.results.stored import read_manifest, read_result, read_results

PAGE = "index.html"
PREVIEW_ROWS = 12
CSV_ROWS = 200  # that a page holds of a table, to be sorted and saved there
MAX_BYTES = 8 * 2**20

# What the page shows where a manifest does not say, or says something of another kind.
UNKNOWN: dict[str, Any] = {
    **dict.fromkeys(("device", "dtype", "scan", "pairs_sha256", "table_sha256", "created"), "unknown"),
    "wall_seconds": 0.0,
    **{name: {} for name in ("options", "versions")},
    **{name: [] for name in ("kernels", "examples")},
    "task": TASK,
    "backend": "unknown",
    "n_pairs": 0,
}
UNKNOWN_MODEL: dict[str, Any] = {"id": "unknown", "architecture": "unknown", "config": {}, "weights_sha256": "unknown"}
OPTIONAL = {
    "clean": ("accuracy", "n", "bound"),
    "requests": ("count", "bytes_up", "bytes_down", "queue_seconds", "run_seconds", "transfer_seconds"),
}
NO_TEXTS: dict[str, Any] = {
    "title": "What the model does on a task that is not installed here",
    "varies": "what differs",
    "roles": {},
}
CHART_FORMS = ("svg", "png")
WATERMARK = (
    '<text x="50%" y="50%" text-anchor="middle" font-family="sans-serif" font-size="40" fill="#c8372d" fill-opacity="0.35">'
    "this model guesses</text>"
)
SUMMARY_CODE = """import ioi_mamba as im
from ioi_mamba.claims import names_summary

results = im.open_results(".")  # the folder of this page
table = names_summary.summarize({name: result.to_frame() for name, result in results.items()})
names_summary.chart(table)"""
_GLOBALS = "window.vegaEmbed = vegaEmbed;"
VEGALITE = re.sub(r"^v(\d+\.\d+).*", r"\1", alt.SCHEMA_VERSION)


@dataclass(frozen=True)
class Section:
    """What the page shows of one experiment, or of a summary of several, whose manifest is empty.

    options: those that are not the defaults. `spec` None: there is no chart. more: further charts by title, drawn when a reader
    asks for them. findings: the first of them is the one that is seen. trouble: what could not be made of the table, and why, in a
    sentence. warning: that the model cannot do the task, or empty. told: what it adds to the figure at the top, or None.
    rows: more rows than the preview has, as JSON. examples: prompts to show for a position that is chosen, as JSON, where the table has positions.
    """

    experiment: Experiment | Summary
    texts: dict[str, str]
    options: dict[str, Any]
    manifest: dict[str, Any]
    table: pd.DataFrame
    spec: Markup | None
    more: list[tuple[str, Markup]]
    findings: list[str]
    trouble: str | None
    header: list[str]
    preview: list[list[str]]
    rows: Markup
    n_rows: int
    code: str
    warning: str
    examples: Markup | None
    told: Told | None = None

    @property
    def is_broken(self) -> bool:
        """Whether the table is not one that others can read numbers off."""
        return _what_is_wrong(self.experiment, self.table) is not None


def write_report(directory: str | Path, *, draw_anyway: bool = False) -> Path:
    """Write `index.html` from the tables and manifests of a directory, in the paper's order; gives its path.

    What cannot be made of an experiment's table, or would mean nothing since the model cannot do the task, is replaced by
    the reason; so are the largest charts of a page over 8 MB. A table without manifest is an unfinished run and left out.
    draw_anyway: draw also what a model does that cannot do the task; what is drawn then says so across it.
    Raises InputError for a directory without a finished table, and for one with tables of several runs.
    """
    directory = Path(directory)
    sections = _sections(directory, draw_anyway)
    page = _page(sections)
    while len(page.encode()) > MAX_BYTES and any(map(_drawn_bytes, sections)):
        largest = max(range(len(sections)), key=lambda k: _drawn_bytes(sections[k]))
        megabytes = f"{len(page.encode()) / 2**20:.1f} MB, more than {MAX_BYTES / 2**20:.3g}"
        trouble = f"The chart is left out: with it the page would have {megabytes}. Report fewer analyses to see it."
        sections[largest] = replace(sections[largest], spec=None, more=[], examples=None, trouble=trouble)
        page = _page(sections)
    with written_whole(directory / PAGE) as path:
        path.write_text(page, encoding="utf-8")
    return directory / PAGE


def _drawn_bytes(section: Section) -> int:
    return len(section.spec or "") + sum(len(spec) for _, spec in section.more)


def _story(sections: list[Section]) -> Story:
    """The story of the sections, whatever their tables hold; an empty one where there is nothing to tell."""
    telling = [section for section in sections if section.told is not None]
    with_examples = next((section.manifest for section in telling if section.manifest["examples"]), None)
    with_examples = with_examples or next((s.manifest for s in sections if s.manifest["examples"]), None)
    if with_examples is None:
        return Story([], "")
    found = [Found(section.experiment.name, section.told) for section in telling if section.told is not None]
    try:
        return tell(found, with_examples["examples"], with_examples.get("clean"))
    except Exception:  # as for a section: what cannot be told must not cost the page
        return tell([], with_examples["examples"], with_examples.get("clean"))


def _views(story: Story, sections: list[Section]) -> list[dict[str, Any]]:
    """What the template shows of each view: its figure, and what the side panel says of each mark."""
    titles = {section.experiment.name: section.texts["title"] for section in sections}
    n_layers = sections[0].manifest["model"]["config"].get("num_hidden_layers")
    views = []
    for number, view in enumerate(story.views):
        figure = drawn(view, n_layers if isinstance(n_layers, int) else 1)
        panel = [panel_of(view, mark) | {"title": titles.get(mark.section, "")} for mark in view.marks]
        place = next((k for k, token in enumerate(view.tokens) if token.changed), 0)
        shown = {"view": view, "figure": figure, "number": number, "place": place}
        views.append(shown | {"svg": Markup(figure.svg()), "panel": script_json([panel, view.prompts])})
    return views


def told_by(directory: Path) -> tuple[list[Section], Story]:
    """The sections of a run and their story. Raises InputError as `write_report`."""
    sections = _sections(directory, False)
    return sections, _story(sections)


def hero_svg(directory: str | Path) -> str | None:
    """The figure at the top of the page of a run, as an SVG file of its own; None where there is nothing to draw.

    Raises InputError as `write_report`.
    """
    sections, story = told_by(Path(directory))
    views = [each for each in _views(story, sections) if each["figure"].shapes]
    name = sections[0].manifest["model"]["id"]
    title = f"{name}, not a published model" if name in EMBEDDED else name
    return views[0]["figure"].svg(alone=True, title=title) if views else None


def _page(sections: list[Section]) -> str:
    manifest = sections[0].manifest
    is_papers = manifest["task"] == TASK
    story = _story(sections)
    return template("report.html.j2").render(
        task=manifest["task"],
        task_texts=manifest["task_texts"],
        is_papers=is_papers,
        claims=_claims(sections) if is_papers else None,
        summaries=_summaries(sections) if is_papers else [],
        warnings=list(dict.fromkeys(section.warning for section in sections if section.warning)),
        sections=sections,
        story=story,
        views=_views(story, sections),
        words=WORDS,
        guessing=any(section.warning for section in sections),
        provenance=provenance.lines([section.manifest for section in sections]),
        embedded=[name for name in EMBEDDED if any(section.manifest["model"]["id"] == name for section in sections)],
        title=f"{_short_name(sections[0].manifest['model']['id'])}: {manifest['task_texts']['title']}",
        bundle=Markup(bundle()),
    )


def save_charts(directory: str | Path, form: str, *, draw_anyway: bool = False) -> list[Path]:
    """Write `charts/NAME-of-MODEL.FORM` of every experiment that has a finished table, for papers and slides; gives the paths.

    form: "svg" or "png", black on white. draw_anyway: as for `write_report`. A chart shows what it shows before anything is chosen in it. Raises
    InputError for another form and as `write_report`; an experiment whose chart is not drawn there is left out.
    """
    if form not in CHART_FORMS:
        raise InputError(f"Charts cannot be written as {form!r}: use one of {', '.join(CHART_FORMS)}.")
    sections = _sections(Path(directory), draw_anyway)
    folder, written = Path(directory) / "charts", []
    folder.mkdir(exist_ok=True)
    for section in sections:
        if section.spec is None:
            continue
        spec = json.loads(section.spec)
        spec["config"] = spec.get("config", {}) | {"background": "white"}
        try:
            svg = vl_convert.vegalite_to_svg(spec, VEGALITE)
            if section.warning:
                svg = svg.replace("</svg>", f"{WATERMARK}</svg>")
            image = svg.encode() if form == "svg" else vl_convert.svg_to_png(svg, scale=2)
        except ValueError as error:  # as on the page: one chart must not cost the others
            warnings.warn(f"The chart of {section.experiment.name} cannot be written: {_reason(error)}", stacklevel=2)
            continue
        model = re.sub(r"[^\w.-]", "-", _short_name(section.manifest["model"]["id"]))
        target = folder / f"{section.experiment.name}-of-{model}.{form}"
        with written_whole(target) as path:
            path.write_bytes(image)
        written.append(target)
    return written


def _sections(directory: Path, draw_anyway: bool) -> list[Section]:
    """Those of every finished experiment, in the paper's order. Raises InputError where there is none or they are of several runs."""
    sections, manifests = [], {}
    for name in analyses.available():
        manifest, table, trouble = read_manifest(directory / f"{name}.json"), None, None
        try:
            result = read_result(directory, name)
            table = None if result is None else result.table
        except InputError as error:
            table, trouble = pd.DataFrame(), str(error)
        if manifest is not None and table is not None:
            code, manifests[name], whole = notebook_code(name), manifest, _complete(manifest)
            sections.append(_drawn(analyses.load(name), whole, table, code, PREVIEW_ROWS, trouble, draw_anyway))
    if not sections:
        read_results(directory)  # which says what is wrong with the directory
    check_one_run(directory, manifests)
    return sections


def _drawn(
    experiment: Experiment | Summary,
    manifest: dict[str, Any],
    table: pd.DataFrame,
    code: str,
    n_preview: int,
    trouble: str | None = None,
    draw_anyway: bool = False,
) -> Section:
    """The section of a table. trouble: why there is no table to be drawn, None where there is one."""
    spec, more, findings, told = None, [], [], None
    trouble = trouble or _what_is_wrong(experiment, table)
    guesses = isinstance(experiment, Experiment) and baseline.means_nothing(experiment, manifest)
    if trouble is None and guesses and not draw_anyway:
        trouble = (
            "No chart is drawn: it would show changes of what this model does on the task, which it cannot do. "
            f"The numbers are in {experiment.name}.parquet, the strongest of them below."
        )
    elif trouble is None:
        # One experiment's table must not cost the page, whatever it holds.
        try:
            findings = list(map(str, experiment.findings(table)))
        except Exception as error:
            trouble = f"The table could not be put into words. {_reason(error)}"
        try:
            spec = script_json(chart_spec(experiment.chart(table)))
            if isinstance(experiment, Experiment):
                more = [(title, script_json(chart_spec(each))) for title, each in experiment.more(table).items()]
        except Exception as error:
            trouble = f"The chart could not be drawn. {_reason(error)}"
        told = _told(experiment, table)
    head = preview.strongest_first(table, max(n_preview, CSV_ROWS))
    cells = preview.cells(head)
    return Section(
        experiment=experiment,
        texts=_texts(experiment, manifest),
        options=_set_options(experiment, manifest.get("options", {})),
        manifest=manifest,
        table=table,
        spec=spec,
        more=more,
        findings=findings,
        trouble=trouble,
        header=[str(column)[: preview.MAX_CELL] for column in head.columns],
        preview=cells[:n_preview],
        rows=script_json(cells),
        n_rows=len(table),
        code=code,
        warning=baseline.note(manifest) if baseline.is_below(manifest) else "",
        examples=script_json(manifest["examples"]) if "label" in table and manifest.get("examples") else None,
        told=told,
    )


def _told(experiment: Experiment | Summary, table: pd.DataFrame) -> Told | None:
    """What an experiment tells of its table; None where it tells nothing, or the table does not let it."""
    if not isinstance(experiment, Experiment) or experiment.story is None:
        return None
    try:
        return experiment.story(table)
    except Exception:  # the section itself says what is wrong with the table
        return None


def _texts(experiment: Experiment | Summary, manifest: dict[str, Any]) -> dict[str, str]:
    """The texts of a section, in the words of the task, and with the ablation that the run had."""
    varies = manifest.get("task_texts", NO_TEXTS)["varies"]
    if not isinstance(experiment, Experiment):
        return experiment.texts(varies)
    return experiment.texts(varies, str(manifest.get("options", {}).get("ablation", RESAMPLE.name)))


def _set_options(experiment: Experiment | Summary, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a run that are not the experiment's defaults."""
    defaults = resolved(experiment.options()) if isinstance(experiment, Experiment) else {}
    return {key: value for key, value in options.items() if key not in defaults or value != defaults[key]}


def _what_is_wrong(experiment: Experiment | Summary, table: pd.DataFrame) -> str | None:
    """Why a table holds nothing to be drawn, in a sentence; None where it may."""
    again = f"run {experiment.name} again"
    missing = [name for name in experiment.required if name not in table]
    if missing:
        return f"The table is not one of {experiment.name}: it has no column {missing[0]!r}. To have it, {again}."
    required = experiment.columns if isinstance(experiment, Experiment) else ()
    empty = [
        column.name
        for column in required
        if column.name in table and not column.nullable and table[column.name].isna().all()
    ]
    if len(table) and empty:
        return f"The table's column {empty[0]!r} is empty. To have it, {again}."
    if table.empty:
        return f"The table has no rows: nothing was measured. To have some, {again}."
    numbers = table.select_dtypes("float")
    if len(numbers.columns) and not np.isfinite(numbers.to_numpy(float, na_value=np.nan)).any():
        return (
            f"The table holds no finite number: of these prompts nothing could be measured, as where the two of every pair "
            f"are the same. Look at the prompts and {again}."
        )
    return None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def _complete(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest that has all that the page shows: "unknown", 0 or nothing for what is missing or is something else."""
    model = manifest["model"] if isinstance(manifest["model"], dict) else {}
    known = {name: _if_like(model.get(name), other) for name, other in UNKNOWN_MODEL.items()}
    whole = {"seed": "unknown"} | manifest | {"model": known}
    whole |= {name: _if_like(manifest.get(name), other) for name, other in UNKNOWN.items()}
    whole["kernels"] = list(map(str, whole["kernels"]))
    # Not every system tells it.
    peak = whole.get("peak_memory_mib")
    whole["peak_memory_mib"] = peak if isinstance(peak, (int, float)) and not math.isnan(peak) else None
    for name, needed in OPTIONAL.items():
        entry = whole.get(name)
        if not (isinstance(entry, dict) and all(isinstance(entry.get(key), (int, float)) for key in needed)):
            whole.pop(name, None)
        elif name == "clean":
            whole[name] = {key: value for key, value in entry.items() if isinstance(value, (int, float))}
    if not all(
        isinstance(example, dict)
        and all(isinstance(example.get(key), list) for key in ("positions", "clean", "corrupted"))
        for example in whole["examples"]
    ):
        whole["examples"] = []
    return whole | {"task_texts": _task_texts(whole)}


def _task_texts(manifest: dict[str, Any]) -> dict[str, Any]:
    """The words of the task that a manifest is of: its own, or where it has none, those of the task of that name."""
    texts = manifest.get("task_texts")
    if isinstance(texts, dict) and all(isinstance(texts.get(name), str) for name in ("title", "varies")):
        return {**texts, "roles": _if_like(texts.get("roles"), {})}
    if manifest["task"] not in tasks.available():
        return NO_TEXTS
    task = tasks.load(manifest["task"])
    return {"title": task.title, "varies": task.varies, "roles": task.roles}


def _if_like(value: Any, other: Any) -> Any:
    """The value, or `other` where it is of another kind than this; whole numbers and others are one kind."""
    kinds = (int, float) if isinstance(other, float) else type(other)
    return value if isinstance(value, kinds) and not (isinstance(value, float) and math.isnan(value)) else other


def _claims(sections: list[Section]) -> dict[str, Any]:
    """The claims of the paper on this run: sentences and two tables, or the trouble there was."""
    manifests = {section.experiment.name: section.manifest for section in sections}
    found = {"trouble": None, "about": [], "judged": [], "others": []}
    table, trouble = _of_whole_tables(
        sections, lambda tables: compare.evaluate(tables, {name: manifests[name] for name in tables})
    )
    if trouble:
        found["trouble"] = trouble
    if table is None:
        return found
    judged = table["verdict"].isin(compare.JUDGED)
    return found | {
        "about": compare.about(table),
        "judged": list(table[judged].itertuples()),
        "others": list(table[~judged].itertuples()),
    }


def _of_whole_tables(sections: list[Section], work: Any) -> tuple[Any, str]:
    """What `work` makes of the tables by name, without those it fails on, and a sentence on these; None of no table."""
    tables = {section.experiment.name: section.table for section in sections if not section.is_broken}
    try:
        return (work(tables) if tables else None), ""
    except Exception:  # as for a section: what cannot be judged must not cost the page
        wrong = {}
        for name, table in tables.items():
            try:
                work({name: table})
            except Exception as error:
                wrong[name] = _reason(error)
    left_out = "; ".join(f"{name} ({reason})" for name, reason in wrong.items())
    try:
        kept = {name: table for name, table in tables.items() if name not in wrong}
        return (work(kept) if wrong and kept else None), f"Left out: {left_out or 'all tables, together'}."
    except Exception as error:
        return None, _reason(error)


def _summaries(sections: list[Section]) -> list[Section]:
    """A section of each summary of which at least one line could be read off the tables that mean something."""
    telling = [
        section
        for section in sections
        if isinstance(section.experiment, Experiment)
        and not baseline.means_nothing(section.experiment, section.manifest)
    ]
    table, _ = _of_whole_tables(telling, names_summary.summarize)  # a table's own section says what is wrong with it
    if table is None or not table["value"].notna().any():
        return []
    return [_drawn(names_summary.SUMMARY, {}, table, SUMMARY_CODE, len(table))]


def chart_spec(chart: Any) -> dict[str, Any]:
    """A chart as Vega-Lite, in the house theme. Raises InputError for data of more than 5,000 rows."""
    spec = themed(chart).to_dict()
    for rows in spec.get("datasets", {}).values():
        if len(rows) > drawing.MAX_ROWS:
            raise InputError(f"A chart of {len(rows)} rows is too large: aggregate to {drawing.MAX_ROWS} at most.")
    # Vega's expressions cannot hold these two line ends, and sort orders become expressions.
    text = json.dumps(spec, ensure_ascii=False)
    return json.loads(text.replace("\u2028", "\u21b5").replace("\u2029", "\u21b5"))


def script_json(value: Any) -> Markup:
    """JSON that can stand in a script element: no text in it can close the element or break a line."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def notebook_code(name: str) -> str:
    """Python that draws the section's chart again."""
    return (
        "import ioi_mamba as im\n\n"
        f'result = im.open_result(".", "{name}")  # the folder of this page\n'
        "result.chart()  # also .findings(), .to_frame() and .manifest"
    )


def _short_name(model_id: str) -> str:
    return model_id.rstrip("/").rsplit("/", 1)[-1] or model_id


def _day(created: str) -> str:
    try:
        datetime.fromisoformat(created)
    except ValueError:
        return "on an unknown day"
    return f"{datetime.fromisoformat(created):%d %B %Y}".lstrip("0")


@cache
def bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script, which sets `vegaEmbed` on the window."""
    script = vl_convert.javascript_bundle(_GLOBALS, VEGALITE)
    # In a script element only this ends the text; in a JavaScript string the escape means the same.
    return re.sub("</(?=script)", r"<\\/", script, flags=re.IGNORECASE)


@cache
def template(name: str) -> jinja2.Template:
    """A page's template, by its file."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ioi_mamba.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"day": _day, "number": compare.number, "terms": terms.marked, "anchor": terms.anchor}
    return environment.get_template(name)
