"""A run: experiments on a model, each leaving a table and a manifest of where it comes from, and one report.

`DIR/NAME.parquet` is the table, `DIR/NAME.json` the manifest, `DIR/index.html` the report. Experiments, prompts and the
names and types of options are checked before anything runs, the range of an option by its experiment; each file is
written whole or not at all; a run that was cut off is taken up again with `resume=True`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ioi_mamba import analyses, paper, tasks
from ioi_mamba.errors import InputError, Submitted
from ioi_mamba.experiments.experiment import Context, Experiment, resolved
from ioi_mamba.experiments.needs import Need
from ioi_mamba.experiments.options import options_of
from ioi_mamba.files import EMBEDDED, sha256_of, written_whole
from ioi_mamba.model.families import FAMILIES
from ioi_mamba.model.jobs import config_of, runs_here
from ioi_mamba.model.memory import check_fits
from ioi_mamba.passes.probe import probe
from ioi_mamba.report import pages
from ioi_mamba.results.baseline import clean_accuracies, clean_means
from ioi_mamba.results.lock import only_run
from ioi_mamba.results.stored import read_manifest
from ioi_mamba.study.plan import Plan, bottleneck_of, plans_of
from ioi_mamba.tasks.base import Pairs
from ioi_mamba.tasks.task import Task
from ioi_mamba.versions import versions

try:
    import resource
except ImportError:  # Windows has none
    resource = None


def run_study(
    model,
    experiments: Sequence[str | Path | Experiment],
    out_dir: str | Path,
    *,
    task: str | Path | Task = "ioi",
    pairs: Pairs | None = None,
    held_out: Pairs | None = None,
    n_pairs: int | None = None,
    seed: int = 27,
    options: Mapping[str, Any] | None = None,
    model_id: str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Path:
    """Run experiments and write their tables, manifests and report into `out_dir`; returns the report's path.

    experiments: names (`analyses.available()`), files or records; those of the paper run in its order, then the others.
    task: a name (`tasks.available()`), a file or a record: what the prompts ask, also those of `pairs`. pairs: the prompts of every experiment; None lets each
    choose its own from `n_pairs` (None: its default) and `seed`. held_out: beside `pairs`, on what experiments that
    choose something judge it; None: every second of `pairs`, which is then not chosen on. Without `pairs` these are
    drawn from the next seed. options: for every named experiment that takes them.
    model_id: how the manifest names the model. resume: keep a table that is whole and was made from the same
    weights, pairs, options and seed. Raises InputError before anything is written for no name, an unknown name or
    option, an `out_dir` that cannot be written, is in use by another run or holds tables of another model or task,
    pairs that do not fit the model, and an experiment on names with pairs that have none; and later for a disk that is
    full. An experiment that fails leaves the tables finished before it, and a report of them.
    With a model on a server, finished requests are kept in `out_dir/jobs` until their experiment is done. Raises
    ServerError for a server that fails, and Submitted where requests were handed over and not waited for.
    """
    if not experiments:
        raise InputError("No experiment is named: give at least one, `ioi-mamba run --help` lists them.")
    out = Path(out_dir)
    check_out_dir(out)
    chosen = tasks.known(task)
    found = [analyses.known(each) for each in experiments]
    plans = plans_of(model, found, chosen, pairs, held_out, n_pairs, seed, dict(options or {}))
    with only_run(out):
        return _run_plans(model, plans, out, chosen, seed, model_id, resume, progress)


def _run_plans(
    model, plans: list[Plan], out: Path, task: Task, seed: int, model_id: str | None, resume: bool, progress: bool
) -> Path:
    found = probe(model)
    # A server that does not show its weights is taken at its word: one name, one model.
    weights = found["weights_sha256"] or hashlib.sha256(model.jobs.model_key.encode()).hexdigest()
    _refuse_other_run(out, weights, task.name)
    about = describe_model(model, model_id) | {"weights_sha256": weights}
    # Asked for by the first experiment that is not finished yet, and then for all of them at once.
    clean = cache(lambda: _clean_scores(model, task, plans))
    run = _Run(model, out, about, found, task, clean, seed, resume, progress)
    if not resume and not runs_here(model):
        model.jobs.forget(out / "jobs")
    done, waiting = False, []
    try:
        for plan in plans:
            try:
                run.one(plan, waiting)
                done = True
            except Submitted as job:
                waiting.append((plan.experiment.name, str(job)))
    finally:
        if done:
            page = pages.write_report(out)
    if waiting:
        raise Submitted("; ".join(f"{name}: {job}" for name, job in waiting))
    return page


def check_out_dir(out: Path) -> None:
    """Raise InputError unless `out` is a directory that can be written, or can be made."""
    existing = out.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"The out directory {str(out)!r} cannot be made: {existing} is a file; choose another.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"The out directory {str(out)!r} cannot be written: choose one that you may write.")


def _clean_scores(model, task: Task, plans: Sequence[Plan]) -> dict[str, dict[str, Any]]:
    """What the unpatched model does on the pairs of each experiment, by its name: accuracy and the task's own measures.

    Equal pairs are measured once.
    """
    sets = {plan.pairs.hash(): plan.pairs for plan in plans}
    found = dict(zip(sets, clean_accuracies(model, list(sets.values())), strict=True))
    if task.measures is not None:
        found = {key: found[key] | clean_means(model, pairs, task.measures) for key, pairs in sets.items()}
    return {plan.experiment.name: found[plan.pairs.hash()] for plan in plans}


def _examples(pairs: Pairs, tokenizer) -> list[dict[str, Any]]:
    """Up to two pairs of each of five corruptions, for a report to show: tokens as text, and a label for each position."""
    corruptions = pairs.labels.get("corruption", ("",) * len(pairs))
    found = []
    for corruption in list(dict.fromkeys(corruptions))[:5]:
        for row in [row for row, own in enumerate(corruptions) if own == corruption][:2]:
            pair, end = pairs[row], int(pairs.last[row]) + 1
            clean, corrupted = (
                [tokenizer.decode([t]) for t in ids[0, :end].tolist()] for ids in (pair.clean, pair.corrupted)
            )
            labels = pair.position_labels()[:end]
            found.append({"corruption": corruption, "positions": labels, "clean": clean, "corrupted": corrupted})
    return found


@dataclass(frozen=True)
class _Run:
    """What the experiments of one call of `run_study` have in common.

    found: what `probe` gives. clean: what the unpatched model does, by experiment, from a request of its own.
    """

    model: Any
    out: Path
    about: dict[str, Any]
    found: dict[str, Any]
    task: Task
    clean: Callable[[], dict[str, dict[str, Any]]]
    seed: int
    resume: bool
    progress: bool
    attributions: dict[Any, Any] = field(default_factory=dict)

    def one(self, plan: Plan, waiting: list[tuple[str, str]]) -> None:
        """Run one experiment and write its table and manifest. waiting: (name, job) of those not finished."""
        experiment = plan.experiment
        if plan.needs_layer and any(name == "layer-ablation" for name, _ in waiting):
            raise Submitted("waits for layer-ablation, which finds its layer")
        plan = plan.with_options(bottleneck_of(plan, self.out) | self._without_gradients(plan))
        options = plan.options
        identity = {
            "analysis": experiment.name,
            "model": self.about,
            "seed": self.seed,
            "pairs_sha256": plan.pairs.hash(),
            "held_out_sha256": None if plan.held_out is None else plan.held_out.hash(),
            "options": resolved(options),
        }
        if self.resume and _is_finished(self.out, identity):
            if self.progress:
                print(f"{experiment.name}: finished before, kept", file=sys.stderr)
            return
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if runs_here(self.model) and self.about["architecture"] in FAMILIES:
            kind = "part gradients" if Need.GRADIENTS in experiment.needs else "sweep"
            check_fits(self.model, len(plan.pairs), plan.pairs.clean.shape[1], kind, experiment.name)
        started = time.perf_counter()
        with _progress_bar(experiment.name, self.progress) as advance, self._jobs() as requests:
            table = experiment.table(
                Context(self.model, plan.pairs, options, plan.held_out, self.seed, advance, self.attributions)
            )
        seconds = time.perf_counter() - started
        with self._jobs():
            clean = self.clean()[experiment.name]
        manifest = identity | {
            "paper": experiment.paper,
            "task": self.task.name,
            "task_texts": {"title": self.task.title, "varies": self.task.varies},
            "clean": clean,
            "examples": _examples(plan.pairs, self.model.tokenizer),
            "backend": "local" if runs_here(self.model) else self.model.jobs.backend,
            "device": self.found["device"],
            "dtype": self.found["dtype"],
            "kernels": self.found["kernels"],
            "versions": versions() | self.found["versions"],
            "platform": f"{platform.system()} {platform.machine()}",
            "threads": torch.get_num_threads(),
            "n_pairs": len(plan.pairs),
            "prompts_sha256": paper.prompts_sha256(plan.pairs),
            "rows": len(table),
            "wall_seconds": round(seconds, 3),
            "peak_memory_mib": _peak_memory_mib(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if requests:
            manifest["requests"] = _sums(requests)
        if torch.cuda.is_available():
            manifest["peak_gpu_memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
        self.out.mkdir(parents=True, exist_ok=True)
        # The manifest vouches for the table by its hash: a table without its manifest counts as unfinished.
        with written_whole(self.out / f"{experiment.name}.parquet") as path:
            table.to_parquet(path, index=False)
            manifest["table_sha256"] = sha256_of(path)
        with written_whole(self.out / f"{experiment.name}.json") as path:
            path.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if not runs_here(self.model):
            self.model.jobs.forget(self.out / "jobs")

    @contextmanager
    def _jobs(self) -> Iterator[list[dict[str, Any]]]:
        """The requests sent inside the block; their results are kept in the out directory."""
        requests: list[dict[str, Any]] = []
        if runs_here(self.model):
            yield requests
            return
        jobs = self.model.jobs
        before, jobs.store = len(jobs.records), self.out / "jobs"
        try:
            yield requests
        finally:
            requests += jobs.records[before:]
            jobs.store = None

    def _without_gradients(self, plan: Plan) -> dict[str, Any]:
        """On a server that gives no gradients: the method that needs none, unless the user named one."""
        if self.found["gradients"] or Need.GRADIENTS not in plan.experiment.needs or "method" in plan.given:
            return {}
        if "method" not in options_of(plan.experiment.options):
            raise InputError(f"{plan.experiment.name} takes gradients, which this server does not give: leave it out.")
        if self.progress:
            print(f"{plan.experiment.name}: no gradients on this server; each item is patched instead", file=sys.stderr)
        return {"method": "exact"}


def _sums(requests: list[dict[str, Any]]) -> dict[str, Any]:
    """How many requests, and their bytes and seconds together."""
    names = ("bytes_up", "bytes_down", "queue_seconds", "run_seconds", "transfer_seconds", "retries")
    sums = {name: sum(request.get(name, 0) for request in requests) for name in names}
    return {"count": len(requests)} | {name: round(value, 3) for name, value in sums.items()}


def _is_finished(out: Path, identity: Mapping[str, Any]) -> bool:
    """Whether the table of this experiment is there, whole, and made from the same things."""
    manifest = read_manifest(out / f"{identity['analysis']}.json")
    table = out / f"{identity['analysis']}.parquet"
    if manifest is None or not table.is_file() or manifest.get("table_sha256") != sha256_of(table):
        return False
    ours = json.loads(json.dumps(dict(identity)))
    theirs = {key: manifest.get(key) for key in ours}
    return _without_name(ours) == _without_name(theirs)


def _without_name(identity: dict[str, Any]) -> dict[str, Any]:
    """The same weights under another path are the same model."""
    return identity | {"model": (identity["model"] or {}).get("weights_sha256")}


def _refuse_other_run(out: Path, weights: str, task: str) -> None:
    for path in sorted(out.glob("*.json")):
        manifest = read_manifest(path)
        if manifest is not None and manifest.get("task", task) != task:
            raise InputError(
                f"{str(out)!r} holds {path.name} of the task {manifest['task']}: choose another out directory."
            )
        if manifest is not None and manifest["model"]["weights_sha256"] != weights:
            raise InputError(
                f"{str(out)!r} holds {path.name} of another model ({manifest['model']['id']}, or other "
                "weights or dtype): choose another out directory."
            )


def describe_model(model, model_id: str | None = None) -> dict[str, Any]:
    """The model's id as given and the sizes in its config; the embedded model is called "mini"."""
    config = config_of(model)
    if model_id is None:
        path = str(getattr(config, "_name_or_path", "") or "unnamed")
        model_id = next((name for name, home in EMBEDDED.items() if path == str(home)), path)
    family = FAMILIES.get(config.model_type)
    sizes = ("num_hidden_layers", "hidden_size", "vocab_size") if family is None else family.config_names
    summary = {name: getattr(config, name) for name in sizes if getattr(config, name, None) is not None}
    revision = getattr(config, "_commit_hash", None)
    return {"id": model_id, "revision": revision, "architecture": config.model_type, "config": summary}


def _peak_memory_mib() -> float | None:
    """The most memory this process has held so far, over all that it did; None where the system does not tell."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 2**20 if sys.platform == "darwin" else peak / 2**10, 1)


@contextmanager
def _progress_bar(name: str, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A function progress(done, total) that moves one line on stderr."""
    form = "{desc:<24} {percentage:3.0f}%|{bar:30}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
    often = 0.1 if sys.stderr.isatty() else 30  # seconds; in a file each drawing stays
    with tqdm(
        desc=name, total=1, disable=not shown, bar_format=form, file=sys.stderr, mininterval=often, miniters=1
    ) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance
        bar.n = bar.total
        bar.refresh()
