"""One offline page out of a run's tables: what was asked, what is seen, what it says, how it was made.

The page loads nothing: the chart library stands in it once, the charts as JSON. A content security policy in
its head makes the browser hold to that. Whatever text a table or manifest carries is shown as text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import altair as alt
import jinja2
import pandas as pd
import vl_convert
from markupsafe import Markup

import analyses

from . import baseline, charts, compare, provenance, tasks
from .errors import InputError
from .files import written_whole
from .results import read_results

PREVIEW_ROWS = 12
MAX_BYTES = 8 * 2**20
CHART_FORMS = ("svg", "png")
_GLOBALS = "window.vegaEmbed = vegaEmbed;"
_VEGALITE = re.sub(r"^v(\d+\.\d+).*", r"\1", alt.SCHEMA_VERSION)


@dataclass(frozen=True)
class Section:
    """What the page shows of one experiment, or of a summary of several, whose manifest is empty.

    `spec` None: there is no chart, and `trouble` says why, in a sentence. warning: that the model cannot do the task,
    or empty.
    examples: prompts to show for a position that is chosen, as JSON, where the table has positions.
    """

    module: ModuleType
    manifest: dict[str, Any]
    table: pd.DataFrame
    spec: Markup | None
    findings: list[str]
    trouble: str | None
    header: list[str]
    preview: list[list[str]]
    n_rows: int
    code: str
    warning: str
    examples: Markup | None


def write_report(directory: str | Path) -> Path:
    """Write `index.html` from the tables and manifests of a directory, in the paper's order; gives its path.

    A chart that cannot be drawn, or would mean nothing since the model cannot do the task, is replaced by the reason;
    a table without manifest is an unfinished run and left out. Raises InputError for a directory without a finished table, a table that cannot be read, and a
    page over 8 MB.
    """
    directory = Path(directory)
    sections = _sections(directory)
    task = tasks.load(sections[0].manifest.get("task", tasks.ioi.TASK))
    is_ioi = task is tasks.ioi  # what the paper claims is about this task
    page = _template().render(
        task=task,
        is_ioi=is_ioi,
        claims=_claims(sections) if is_ioi else None,
        summaries=_summaries(sections) if is_ioi else [],
        warnings=list(dict.fromkeys(section.warning for section in sections if section.warning)),
        sections=sections,
        provenance=provenance.lines([section.manifest for section in sections]),
        is_mini=any(section.manifest["model"]["id"] == "mini" for section in sections),
        title=f"{_short_name(sections[0].manifest['model']['id'])}, taken apart",
        bundle=Markup(_bundle()),
    )
    if len(page.encode()) > MAX_BYTES:
        raise InputError(
            f"The page would have {len(page.encode()) / 2**20:.1f} MB, more than 8: report fewer analyses."
        )
    with written_whole(directory / "index.html") as path:
        path.write_text(page, encoding="utf-8")
    return directory / "index.html"


def save_charts(directory: str | Path, form: str) -> list[Path]:
    """Write `charts/NAME-of-MODEL.FORM` of every experiment that has a finished table, for papers and slides; gives the paths.

    form: "svg" or "png", black on white. A chart shows what it shows before anything is chosen in it. Raises
    InputError for another form and as `write_report`; an experiment whose chart is not drawn there is left out.
    """
    if form not in CHART_FORMS:
        raise InputError(f"Charts cannot be written as {form!r}: use one of {', '.join(CHART_FORMS)}.")
    sections = _sections(Path(directory))
    folder, written = Path(directory) / "charts", []
    folder.mkdir(exist_ok=True)
    for section in sections:
        if section.spec is None:
            continue
        spec = json.loads(section.spec)
        spec["config"] = spec.get("config", {}) | {"background": "white"}
        image = (
            vl_convert.vegalite_to_svg(spec, _VEGALITE).encode()
            if form == "svg"
            else vl_convert.vegalite_to_png(spec, _VEGALITE, scale=2)
        )
        model = re.sub(r"[^\w.-]", "-", _short_name(section.manifest["model"]["id"]))
        target = folder / f"{section.module.NAME}-of-{model}.{form}"
        with written_whole(target) as path:
            path.write_bytes(image)
        written.append(target)
    return written


def _sections(directory: Path) -> list[Section]:
    """Those of every finished experiment, in the paper's order. Raises InputError where there is none."""
    return [
        _drawn(analyses.load(name), result.manifest, result.table, notebook_code(name), PREVIEW_ROWS)
        for name, result in read_results(directory).items()
    ]


def _drawn(module: ModuleType, manifest: dict[str, Any], table: pd.DataFrame, code: str, n_preview: int) -> Section:
    spec, findings, trouble = None, [], None
    if baseline.means_nothing(module, manifest):
        trouble = (
            "No chart is drawn: it would show changes of what this model does on the task, which it cannot do. "
            f"The numbers are in {module.NAME}.parquet, the first of them below."
        )
    else:
        try:
            findings = list(module.findings(table))
            spec = script_json(chart_spec(module.chart(table)))
        except Exception as error:  # one experiment's table must not cost the page
            trouble = f"The chart could not be drawn. {type(error).__name__}: {error}"
    head = table.head(n_preview)
    return Section(
        module=module,
        manifest=manifest,
        table=table,
        spec=spec,
        findings=findings,
        trouble=trouble,
        header=[str(column) for column in head.columns],
        preview=[[_cell(value) for value in row] for row in head.itertuples(index=False)],
        n_rows=len(table),
        code=code,
        warning=baseline.note(manifest) if baseline.is_below(manifest) else "",
        examples=script_json(manifest["examples"]) if "label" in table and manifest.get("examples") else None,
    )


def _claims(sections: list[Section]) -> dict[str, Any]:
    """The claims of the paper on this run: sentences and two tables, or the trouble there was."""
    tables = {section.module.NAME: section.table for section in sections}
    manifests = {section.module.NAME: section.manifest for section in sections}
    try:
        table = compare.evaluate(tables, manifests)
    except Exception as error:  # as for a section: what cannot be judged must not cost the page
        return {"trouble": f"{type(error).__name__}: {error}"}
    judged = table["verdict"].isin(compare.JUDGED)
    return {
        "trouble": None,
        "about": compare.about(table),
        "judged": list(table[judged].itertuples()),
        "others": list(table[~judged].itertuples()),
    }


def _summaries(sections: list[Section]) -> list[Section]:
    """A section of each summary of which at least one line could be read off the tables that mean something."""
    telling = [section for section in sections if not baseline.means_nothing(section.module, section.manifest)]
    tables = {section.module.NAME: section.table for section in telling}
    drawn = []
    for module in analyses.summaries():
        try:
            table = module.summarize(tables)
        except Exception:  # the tables it reads have their own sections, which say what is wrong with them
            continue
        if table["value"].notna().any():
            drawn.append(_drawn(module, {}, table, summary_code(module.NAME), len(table)))
    return drawn


def chart_spec(chart: Any) -> dict[str, Any]:
    """A chart as Vega-Lite, in the house theme. Raises InputError for data of more than 5,000 rows."""
    with alt.theme.enable("ioi-mamba"):
        spec = chart.to_dict()
    for rows in spec.get("datasets", {}).values():
        if len(rows) > charts.MAX_ROWS:
            raise InputError(f"A chart of {len(rows)} rows is too large: aggregate to {charts.MAX_ROWS} at most.")
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


def summary_code(name: str) -> str:
    """Python that makes a summary's table and chart again."""
    module = name.replace("-", "_")
    return (
        "import ioi_mamba as im\n"
        f"from analyses import {module}\n\n"
        'results = im.open_results(".")  # the folder of this page\n'
        f"table = {module}.summarize({{name: result.to_frame() for name, result in results.items()}})\n"
        f"{module}.chart(table)"
    )


def _cell(value: Any) -> str:
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _short_name(model_id: str) -> str:
    return model_id.rstrip("/").rsplit("/", 1)[-1] or model_id


def _day(created: str) -> str:
    return f"{datetime.fromisoformat(created):%d %B %Y}".lstrip("0")


@lru_cache(maxsize=1)
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script, which sets `vegaEmbed` on the window."""
    script = vl_convert.javascript_bundle(_GLOBALS, _VEGALITE)
    # In a script element only this ends the text; in a JavaScript string the escape means the same.
    return re.sub("</(?=script)", r"<\\/", script, flags=re.IGNORECASE)


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ioi_mamba"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"day": _day, "number": compare.number}
    return environment.get_template("report.html.j2")
