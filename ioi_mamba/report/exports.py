"""What a page says, in other forms: a short summary in Markdown, and the kept circuit as a graph for circuit-tracer's front end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ioi_mamba.charts.circuit_axes import SUB_BLOCKS
from ioi_mamba.errors import InputError
from ioi_mamba.experiments.story import Kind
from ioi_mamba.files import written_whole
from ioi_mamba.report import pages
from ioi_mamba.report.story import Mark, View, all_marks

SUMMARY, FIGURE, GRAPH = "summary.md", "story.svg", "circuit-graph.json"
_SPECIAL = re.compile(r"([\\`*_\[\]<>|#])")


def write_markdown(directory: str | Path) -> list[Path]:
    """Write `summary.md` and, where there is a figure, `story.svg` beside it, for a README or a lab notebook; gives the paths.

    Raises InputError as `pages.write_report`.
    """
    directory = Path(directory)
    sections, story = pages.told_by(directory)
    figure = pages.hero_svg(directory)
    manifest = sections[0].manifest
    lines = [f"# {_plain(manifest['model']['id'])}: {_plain(manifest['task_texts']['title'])}", ""]
    lines += [
        line
        for warning in dict.fromkeys(s.warning for s in sections if s.warning)
        for line in (f"**{_plain(warning)}**", "")
    ]
    if story.finding:
        lines += [_plain(story.finding), ""]
    if figure:
        lines += [f"![Tokens from left to right, layers upwards: what matters where.]({FIGURE})", ""]
    lines += [f"- **{what}**: {_plain(answer)}" for what, answer in story.answers]
    lines += ["", "| question | found |", "|---|---|"]
    lines += [
        f"| {_plain(s.texts['question'])} | {_plain(s.findings[0] if s.findings else s.trouble or '')} |"
        for s in sections
    ]
    versions = manifest["versions"].get("ioi-mamba", "")
    lines += [
        "",
        f"Seed {manifest['seed']}, weights `{manifest['model']['weights_sha256'][:12]}`, ioi-mamba {versions}.",
        "",
    ]
    written = []
    for name, text in ((FIGURE, figure), (SUMMARY, "\n".join(lines))):
        if text:
            with written_whole(directory / name) as path:
                path.write_text(text, encoding="utf-8")
            written.append(directory / name)
    return written


def write_graph(directory: str | Path) -> Path:
    """Write the kept circuit as `circuit-graph.json`, in the format that circuit-tracer's front end reads; gives the path.

    A node is a layer at a token, an edge one that is kept there, its weight how much patching it lowers the metric (minus its
    score). What passes inside a layer from token to token is no edge of the circuit and none of the graph. Raises
    InputError as `pages.write_report`, and for a run whose tables hold no circuit by token.
    """
    directory = Path(directory)
    sections, story = pages.told_by(directory)
    found = [pages.Found(s.experiment.name, s.told) for s in sections if s.told is not None]
    view = story.views[0] if story.views else None
    edges = [mark for mark in (all_marks(found, view) if view else []) if mark.kind == Kind.EDGE]
    if view is None or not edges:
        raise InputError(
            f"{str(directory)!r} holds no circuit by token to write: run positional-attribution there first."
        )
    with written_whole(directory / GRAPH) as path:
        path.write_text(
            json.dumps(_graph(view, edges, sections[0].manifest), ensure_ascii=False, indent=1), encoding="utf-8"
        )
    return directory / GRAPH


def _graph(view: View, edges: list[Mark], manifest: dict[str, Any]) -> dict[str, Any]:
    layers = [int(mark.layer) for mark in edges if mark.target != "output"]
    n_layers = manifest["model"]["config"].get("num_hidden_layers", max(layers, default=0) + 1)
    nodes = {}
    for mark in edges:
        for name in (mark.source, mark.target):
            node = _node(name, mark.end, n_layers, view)
            nodes[node["node_id"]] = node
    links = [
        {
            "source": _node(mark.source, mark.end, n_layers, view)["node_id"],
            "target": _node(mark.target, mark.end, n_layers, view)["node_id"],
            "weight": -mark.value,
        }
        for mark in edges
    ]
    tokens = [token.clean for token in view.tokens]
    metadata = {
        "slug": f"{manifest['analysis']}-{manifest['pairs_sha256'][:8]}",
        "scan": manifest["model"]["id"],
        "transcoder_list": [],
        "prompt_tokens": tokens,
        "prompt": "".join(token.clean for token in view.tokens if token.label != "BOS"),
        "node_threshold": None,
        "schema_version": 1,
    }
    choices = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    return {"metadata": metadata, "qParams": choices, "nodes": list(nodes.values()), "links": links}


def _node(name: str, position: int, n_layers: int, view: View) -> dict[str, Any]:
    """A node of the graph. Features are numbered in circuit-tracer; here a layer has one, or one a sub-block."""
    common = {
        "ctx_idx": position,
        "token_prob": 0.0,
        "is_target_logit": name == "output",
        "run_idx": 0,
        "reverse_ctx_idx": 0,
    }
    common |= {"influence": None, "activation": None}
    if name == "embed":
        layer, feature, kind, words = "E", position, "embedding", view.tokens[position].clean
    elif name == "output":
        layer, feature, kind, words = str(n_layers + 1), 0, "logit", f'Output "{view.answer.strip()}"'
    else:
        number, _, sub_block = name.partition(".")
        layer, feature, kind = number, SUB_BLOCKS.index(sub_block), "cross layer transcoder"
        words = f"layer {number}{' ' + sub_block if sub_block else ''} at {view.tokens[position].label}"
    letter = "L" if name == "output" else layer
    own = {"node_id": f"{layer}_{feature}_{position}", "jsNodeId": f"{letter}_{feature}-{position}"}
    return own | {"feature": feature, "layer": layer, "feature_type": kind, "clerp": words} | common


def _plain(text: Any) -> str:
    """A text that Markdown shows as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(str(text).split()))
