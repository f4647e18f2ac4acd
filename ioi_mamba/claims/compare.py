"""A run held against the paper: every claim with its published value, what this model shows, and a verdict.

A model of mamba-370m's sizes is compared with each published number. Of another model only the relative claims are
asked, which say how parts of a model stand to each other: its own bottleneck layer takes the place of layer 39, and
the published value stands beside as mamba-370m's. The claims are data (`paper.table("claims")`), each measured by one
function of `claims`; there is one path for all models.

Three verdicts are made of a number and its 95 % interval: it holds, it does not hold, or it is undecided, because the
interval straddles the tolerance or too few prompts were used. A claim on exact published numbers is judged on the
published prompts alone. How often a perfect rerun would pass is simulated (docs/statistics.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ioi_mamba import analyses, claims, paper
from ioi_mamba.errors import InputError
from ioi_mamba.files import written_whole
from ioi_mamba.passes.ablations import RESAMPLE
from ioi_mamba.results import baseline
from ioi_mamba.results.stored import open_results

HOLDS, FAILS, UNDECIDED, JUDGED = claims.HOLDS, claims.FAILS, claims.UNDECIDED, claims.JUDGED
NOT_COMPARABLE, NOT_RUN = claims.NOT_COMPARABLE, claims.NOT_RUN
VERDICTS = (*JUDGED, NOT_COMPARABLE, NOT_RUN)
COLUMNS = (
    "claim",
    "section",
    "statement",
    "asked",
    "published",
    "value",
    "low",
    "high",
    "n",
    "tolerance",
    "verdict",
    "why",
    "note",
    "layer",
    "model",
)

PUBLISHED_MODEL = "mamba-370m"
PUBLISHED_SIZES = {"num_hidden_layers": 48, "hidden_size": 1024}
PUBLISHED_LAYER = 39
OTHER_MODEL = f"a number of {PUBLISHED_MODEL} alone"

ATTRIBUTION = {"target": 0.85, "steps": 5, "variant": "paper", "method": "eap-ig", "ranking": "signed"}
QUESTION: dict[str, dict[str, Any]] = {
    "layer-ablation": {"site": "layer_input"},
    "cross-talk": {"threshold": 0.9},
    "state-ablation": {"with_conv": False},
    "edge-attribution": ATTRIBUTION,
    "circuit-search": {"target": 0.85, "threshold": 1e-4, "method": "eap-ig"},
    "positional-attribution": ATTRIBUTION,
}
"""Options, with the paper's values, that make an experiment ask something else: then its claims are not judged."""

Manifest = Mapping[str, Any]


def compare(directory: str | Path) -> pd.DataFrame:
    """Judge the finished tables of a run; also written to `directory`/compare.parquet, whole or not at all.

    The table is that of `evaluate`. Raises InputError for a directory without a finished table, one with tables of
    several runs, one that cannot be written, and a table that cannot be read or is not the one its manifest vouches for.
    """
    tables, manifests = _read_run(Path(directory))
    table = evaluate(tables, manifests)
    target = Path(directory) / "compare.parquet"
    try:
        with written_whole(target) as path:
            table.to_parquet(path, index=False)
    except OSError as error:
        raise InputError(f"{target} cannot be written ({error.strerror}): compare a copy that may be.") from None
    return table


def _read_run(directory: Path) -> tuple[dict[str, pd.DataFrame], dict[str, Manifest]]:
    """(tables, manifests) of the finished experiments of a run, by name. Raises InputError as `compare`."""
    results = open_results(directory)
    return (
        {name: result.table for name, result in results.items()},
        {name: result.manifest for name, result in results.items()},
    )


def evaluate(tables: Mapping[str, pd.DataFrame], manifests: Mapping[str, Manifest]) -> pd.DataFrame:
    """Every claim of the paper, in its order, one row each; columns COLUMNS.

    statement: what the paper says of mamba-370m; asked: the same of this run's layer, empty if not asked.
    published: the paper's number, NaN without one; value, low, high: this model's with a 95 % interval, NaN where
    there is none; n: prompts behind it. verdict: of VERDICTS; why: what kept a claim from being judged or decided.
    note: what is known to be wrong with the published number. layer: the one that was looked at in place of 39; where
    layer-ablation's own table chose it, each corruption of that table is asked about the layer that the others choose
    (`claims.held_out_layers`). model: whose values they are. Raises InputError for a table that lacks a column.
    """
    model = next(iter(manifests.values()))["model"]
    asked_differently = {name: found for name in tables if (found := _other_question(name, manifests[name]))}
    guessed = {name for name in tables if baseline.means_nothing(analyses.load(name), manifests[name])}
    usable = {name: table for name, table in tables.items() if name not in asked_differently.keys() | guessed}
    is_published = is_mamba_370m(model)
    layer = PUBLISHED_LAYER if is_published else _layer(usable)
    chosen = None if is_published else _held_out_layers(usable, layer)
    verdicts: dict[str, str] = {}
    rows = []
    for _, claim in paper.table("claims").iterrows():
        value = claims.NONE
        why = _not_asked(claim, is_published)
        if why:
            verdict = NOT_COMPARABLE
        elif claim.analysis not in tables:
            verdict, why = NOT_RUN, f"run {claim.analysis}"
        elif claim.analysis in asked_differently:
            verdict, why = NOT_COMPARABLE, f"{claim.analysis} was run with {asked_differently[claim.analysis]}"
        elif claim.analysis in guessed:
            verdict, why = NOT_COMPARABLE, "the model cannot do the task"
        elif why := _other_prompts(claim, manifests[claim.analysis]):
            verdict = NOT_COMPARABLE
        elif layer is None and "{layer}" in claim.statement:
            verdict, why = NOT_RUN, "run layer-ablation, which finds the bottleneck layer"
        else:
            place = chosen if chosen is not None and claim.analysis == claims.CHOOSES else layer
            value = _measured(claim, usable[claim.analysis], place)
            verdict, why = claims.judge(claim, value, verdicts.get(claim.requires))
        verdicts[claim.id] = verdict
        rows.append(
            (
                claim.id,
                claim.section,
                claim.statement.format(layer=PUBLISHED_LAYER),
                "" if why == OTHER_MODEL else claim.statement.format(layer=PUBLISHED_LAYER if layer is None else layer),
                claim.published,
                *value[:4],
                claims.tolerance(claim.at_least, claim.at_most),
                verdict,
                why,
                claim.note,
                layer,
                str(model["id"]),
            )
        )
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"layer": "Int64"})


def is_mamba_370m(model: Mapping[str, Any]) -> bool:
    """Whether a manifest's model has the sizes of the paper's; other weights of these sizes are not told apart."""
    sizes = model.get("config", {})
    return model.get("architecture") == "mamba" and all(sizes.get(key) == n for key, n in PUBLISHED_SIZES.items())


def about(table: pd.DataFrame) -> list[str]:
    """What the table of `evaluate` is of and how it came out, in sentences."""
    counts = {verdict: int((table["verdict"] == verdict).sum()) for verdict in VERDICTS}
    layer, model = table["layer"].iloc[0], table["model"].iloc[0]
    found = [
        f"Of {sum(counts[verdict] for verdict in JUDGED)} claims that could be judged {counts[HOLDS]} hold on {model}, "
        f"{counts[FAILS]} do not and {counts[UNDECIDED]} are undecided; {counts[NOT_RUN]} were not run and "
        f"{counts[NOT_COMPARABLE]} cannot be compared."
    ]
    others = int((table["why"] == OTHER_MODEL).sum())
    if others:
        place = "is not known here" if pd.isna(layer) else f"is its bottleneck, layer {layer}"
        found.append(
            f"{model} is not {PUBLISHED_MODEL}: published values are those of {PUBLISHED_MODEL}, {others} claims on "
            f"its absolute numbers are left out, and what takes the place of layer {PUBLISHED_LAYER} {place}."
        )
        if not pd.isna(layer):
            found.append(
                "That layer was chosen on this run's table of layer-ablation. The claims on that table are therefore "
                "measured, for each corruption, at the layer that the prompts of the other corruptions choose."
            )
    return found


def text_rows(table: pd.DataFrame) -> list[tuple[str, ...]]:
    """The claims that this model can be asked, as cells of text for a terminal; a header first."""
    shown = table[table["why"] != OTHER_MODEL]
    rows = [("verdict", "claim", "what is said", PUBLISHED_MODEL, str(table["model"].iloc[0]), "95 %", "tolerance")]
    for row in shown.itertuples(index=False):
        interval = "" if pd.isna(row.low) else f"{number(row.low)} to {number(row.high)}"
        value = f"{number(row.value)} ({row.why})" if number(row.value) and row.why else number(row.value) or row.why
        rows.append((row.verdict, row.claim, row.asked, number(row.published), value, interval, row.tolerance))
    return rows


def number(value: float) -> str:
    """Three digits, or two decimals from 1 on; empty for NaN."""
    if pd.isna(value):
        return ""
    return f"{value:.3g}" if abs(value) < 1 else f"{round(value, 2):g}"


def _held_out_layers(tables: Mapping[str, pd.DataFrame], layer: int | None) -> claims.Layer | None:
    """The layers to ask layer-ablation's table about, if that table chose `layer`; None if it was given."""
    table = tables.get(claims.CHOOSES)
    return None if table is None or layer != claims.bottleneck(tables) else claims.held_out_layers(table)


def _layer(tables: Mapping[str, pd.DataFrame]) -> int | None:
    """The bottleneck of the run, as far as it is known."""
    found = claims.bottleneck(tables)
    return claims.common_layer(tables) if found is None else found


def _not_asked(claim: Any, is_published: bool) -> str:
    if not claim.analysis:
        return "no experiment's table holds it"
    return "" if is_published or claim.relative else OTHER_MODEL


def _other_question(name: str, manifest: Manifest) -> str:
    """The task or the first option that makes the experiment another one than the paper's, as KEY=VALUE."""
    if manifest.get("task", claims.TASK) != claims.TASK:
        return f"task={manifest['task']}"
    options = manifest.get("options", {})
    for key, value in ({"ablation": RESAMPLE.name} | QUESTION.get(name, {})).items():
        if options.get(key, value) != value:
            return f"{key}={options[key]}"
    return ""


def _other_prompts(claim: Any, manifest: Manifest) -> str:
    """Says so if a claim on exact published numbers is asked of other prompts than the published ones."""
    if not claim.prompts:
        return ""
    wanted = paper.table("prompts").set_index("name").loc[claim.prompts]
    if (manifest.get("prompts_sha256") or {}).get(wanted["part"]) == wanted["sha256"]:
        return ""
    return f"needs the published prompts: {wanted['n_pairs']} pairs of seed {wanted['seed']} as the paper draws them"


def _measured(claim: Any, table: pd.DataFrame, layer: claims.Layer | None) -> claims.Value:
    try:
        # A claim that names no layer is measured without one.
        return claims.measure(claim.id, table, -1 if layer is None else layer)
    except KeyError as missing:
        raise InputError(
            f"{claim.analysis}.parquet has no {missing}, which the claim {claim.id} reads: run {claim.analysis} again."
        ) from None
