"""A run: experiments on a model, each leaving a table and a manifest of where it comes from, and one report.

`DIR/NAME.parquet` is the table, `DIR/NAME.json` the manifest, `DIR/index.html` the report. Experiments, prompts and the
names and types of options are checked before anything runs, the range of an option by its experiment; each file is
written whole or not at all; a run that was cut off is taken up again with `resume=True`.
"""

from __future__ import annotations

import hashlib
import json
import logging
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
from ioi_mamba.model import compiled_scan
from ioi_mamba.model.families import FAMILIES
from ioi_mamba.model.jobs import config_of, keeping, runs_here
from ioi_mamba.model.memory import check_fits
from ioi_mamba.passes.probe import probe
from ioi_mamba.remote.store import Store
from ioi_mamba.report import pages
from ioi_mamba.results import stored
from ioi_mamba.results.baseline import clean_accuracies, clean_means
from ioi_mamba.results.lock import only_run
from ioi_mamba.results.origin import check_one_run, difference
from ioi_mamba.study import machine
from ioi_mamba.study.plan import Plan, bottleneck_of, plans_of
from ioi_mamba.tasks.base import Pairs
from ioi_mamba.tasks.task import Task

logger = logging.getLogger(__name__)

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
    overwrite: bool = False,
    chunks: int | None = None,
    bound: float | None = None,
    progress: bool = True,
    finished: Callable[[dict[str, Any]], None] | None = None,
    failed: Callable[[str, Exception], None] | None = None,
) -> Path:
    """Run experiments and write their tables, manifests and report into `out_dir`; returns the report's path.

    experiments: names (`analyses.available()`), files or records; those of the paper run in its order, then the others.
    task: a name (`tasks.available()`), a file or a record: what the prompts ask, also those of `pairs`. pairs: the prompts of every experiment; None lets each
    choose its own from `n_pairs` (None: its default) and `seed`. held_out: beside `pairs`, on what experiments that
    choose something judge it; None: every second of `pairs`, which is then not chosen on. Without `pairs` these are
    drawn from the next seed. options: for every named experiment that takes them.
    model_id: how the manifest names the model. resume: keep a table that is whole and was made from the same
    weights, pairs, options and seed. overwrite: replace a finished table that is not to be kept; without it none is.
    finished: called with the manifest of each experiment whose table is there, made or kept. failed: called with the name
    of an experiment that fails and why, and the others go on; None: what went wrong is raised at once.
    Raises InputError before anything is written for no name, an unknown name or option, an `out_dir` that cannot be
    written, is in use by another run, holds a finished table of one of the experiments that is neither to be kept nor
    replaced, or of another that is not of this run (`results.origin`), pairs that do not fit the model, and an
    experiment on names with pairs that have none; and later for a disk that is full. An experiment that fails leaves
    the tables finished before it, and a report of them.
    bound: the accuracy below which the unpatched model counts as guessing, so that the report draws nothing of what it does;
    None: half way between guessing and 1. Manifests say which it was.
    Finished chunks of an experiment, or requests to a server, are kept in `out_dir/chunks` until its table is written;
    with resume they are not computed again. chunks: about how many a pass over pairs is cut into (None: 16, fewer where
    they would be too small to be worth it); the last bits of a table depend on it. Raises ServerError for a server or workers that fail, and Submitted where
    requests were handed over and not waited for.
    """
    if not experiments:
        raise InputError("No experiment is named: give at least one, `ioi-mamba run --help` lists them.")
    out = Path(out_dir)
    check_out_dir(out)
    chosen = tasks.known(task)
    found = [analyses.known(each) for each in experiments]
    plans = plans_of(model, found, chosen, pairs, held_out, n_pairs, seed, dict(options or {}))
    asked = {
        "pairs_sha256": None if pairs is None else pairs.hash(),
        "held_out_sha256": None if held_out is None else held_out.hash(),
        "n_pairs": n_pairs,
    }
    if bound is not None and not 0 <= bound <= 1:
        raise InputError(f"The bound is {bound}: it is a share of prompts, from 0 to 1.")
    with only_run(out):
        return _run_plans(
            model,
            plans,
            out,
            chosen,
            asked,
            seed,
            model_id,
            resume,
            overwrite,
            chunks,
            bound,
            progress,
            finished,
            failed,
        )


def _run_plans(
    model,
    plans: list[Plan],
    out: Path,
    task: Task,
    asked: dict[str, Any],
    seed: int,
    model_id: str | None,
    resume: bool,
    overwrite: bool,
    chunks: int | None,
    bound: float | None,
    progress: bool,
    finished: Callable[[dict[str, Any]], None] | None,
    failed: Callable[[str, Exception], None] | None,
) -> Path:
    found = probe(model)
    # A server that does not show its weights is taken at its word: one name, one model.
    weights = found["weights_sha256"] or hashlib.sha256(model.jobs.model_key.encode()).hexdigest()
    about = describe_model(model, model_id) | {"weights_sha256": weights}
    store = Store(out / "chunks", found | {"weights_sha256": weights})
    # Asked for by the first experiment that is not finished yet, and then for all of them at once.
    clean = cache(lambda: _clean_scores(model, task, plans, bound))
    run = _Run(model, out, about, found, store, task, clean, asked, seed, resume, overwrite, chunks, progress)
    run.make_room(plans)
    if not resume:
        store.forget()
    done, whole, waiting = False, True, []
    try:
        for number, plan in enumerate(plans):
            try:
                manifest = run.one(plan, plans[number + 1 :], waiting)
                done = True
                if finished is not None:
                    finished(manifest)
            except Submitted as job:
                waiting.append((plan.experiment.name, str(job)))
            except Exception as error:
                if failed is None:
                    raise
                failed(plan.experiment.name, error)
                whole = False
    finally:
        if done:
            pages.write_report(out)
    if waiting:
        raise Submitted("; ".join(f"{name}: {job}" for name, job in waiting))
    if whole:
        store.forget()
    return out / pages.PAGE


def check_out_dir(out: Path) -> None:
    """Raise InputError unless `out` is a directory that can be written, or can be made."""
    existing = out.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"The out directory {str(out)!r} cannot be made: {existing} is a file; choose another.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"The out directory {str(out)!r} cannot be written: choose one that you may write.")


def _clean_scores(model, task: Task, plans: Sequence[Plan], bound: float | None) -> dict[str, dict[str, Any]]:
    """What the unpatched model does on the pairs of each experiment, by its name: accuracy and the task's own measures.

    Equal pairs are measured once.
    """
    sets = {plan.pairs.hash(): plan.pairs for plan in plans}
    found = dict(zip(sets, clean_accuracies(model, list(sets.values()), bound), strict=True))
    if task.measures is not None:
        found = {key: found[key] | clean_means(model, pairs, task.measures) for key, pairs in sets.items()}
    return {plan.experiment.name: found[plan.pairs.hash()] for plan in plans}


def _examples(pairs: Pairs, tokenizer) -> list[dict[str, Any]]:
    """Up to two pairs of each of five corruptions, for a report to show: tokens and answers as text, and a label for each position."""
    corruptions = pairs.labels.get("corruption", ("",) * len(pairs))
    found = []
    for corruption in list(dict.fromkeys(corruptions))[:5]:
        for row in [row for row, own in enumerate(corruptions) if own == corruption][:2]:
            pair, end = pairs[row], int(pairs.last[row]) + 1
            clean, corrupted = (
                [tokenizer.decode([t]) for t in ids[0, :end].tolist()] for ids in (pair.clean, pair.corrupted)
            )
            labels = pair.position_labels()[:end]
            answer, wrong = (tokenizer.decode(_choice(pair, choice)) for choice in (pair.answer, pair.wrong))
            example = {"corruption": corruption, "positions": labels, "clean": clean, "corrupted": corrupted}
            found.append(example | {"answer": answer, "wrong": wrong})
    return found


def _choice(pair: Pairs, choice: torch.Tensor) -> list[int]:
    """The tokens of an answer of one pair, Int64[1]."""
    return choice.tolist() if pair.readout is None else pair.readout.tokens[0, int(choice)].tolist()


@dataclass(frozen=True)
class _Run:
    """What the experiments of one call of `run_study` have in common.

    found: what `probe` gives. store: of finished chunks. clean: what the unpatched model does, by experiment, from a request of its own. asked: as a
    manifest keeps it (`results.origin`), without options.
    """

    model: Any
    out: Path
    about: dict[str, Any]
    found: dict[str, Any]
    store: Store
    task: Task
    clean: Callable[[], dict[str, dict[str, Any]]]
    asked: dict[str, Any]
    seed: int
    resume: bool
    overwrite: bool
    chunks: int | None
    progress: bool
    attributions: dict[Any, Any] = field(default_factory=dict)

    def make_room(self, plans: Sequence[Plan]) -> None:
        """See that this run may leave its tables beside those that are there.

        Raises InputError where it would replace one without being told to, or where those that stay are of another run.
        """
        ours = {plan.experiment.name: self._identity(self._with_found(plan)) for plan in plans}
        theirs = {
            path.stem: kept
            for path in sorted(self.out.glob("*.json"))
            if (kept := stored.finished(self.out, path.stem))
        }
        for plan in plans:
            # Which layer it will be on is not known before layer-ablation is there; `one` looks again.
            if not plan.needs_layer or "layer-ablation" in theirs or "layer-ablation" not in ours:
                self._kept(ours[plan.experiment.name])
        for name, manifest in theirs.items():
            found = next(filter(None, (difference(each, manifest) for each in ours.values())), None)
            if found is not None and (name not in ours or not self.overwrite):
                raise InputError(
                    f"{str(self.out)!r} holds {name}.json of another run: it has {found[1]}, and this run has {found[0]}; "
                    "choose another out directory."
                )
            if found is not None:
                # A table of another run beside the first one of this run would be a mixture, were this run cut off.
                (self.out / f"{name}.json").unlink()
        check_one_run(self.out, {name: manifest for name, manifest in theirs.items() if name not in ours})

    def _with_found(self, plan: Plan) -> Plan:
        return plan.with_found(bottleneck_of(plan, self.out) | self._without_gradients(plan))

    def _identity(self, plan: Plan) -> dict[str, Any]:
        """What makes the table of a plan what it is, as its manifest has it."""
        return {
            "analysis": plan.experiment.name,
            "model": self.about,
            "task": self.task.name,
            "seed": self.seed,
            "pairs_sha256": plan.pairs.hash(),
            "held_out_sha256": None if plan.held_out is None else plan.held_out.hash(),
            "asked": self.asked | {"options": dict(plan.given), "found": dict(plan.found)},
            "options": resolved(plan.options),
        }

    def _kept(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """The manifest of an experiment whose finished table is kept; None where it is to be made.

        Raises InputError where it is there and to be neither kept nor replaced.
        """
        name = identity["analysis"]
        manifest = stored.finished(self.out, name)
        if manifest is None or (self.overwrite and not self.resume):
            return None
        if not self.resume:
            raise InputError(
                f"{str(self.out)!r} holds a finished table of {name}: --resume keeps it if it is of the same question, "
                "--overwrite replaces it; or choose another out directory."
            )
        changed = _changed(identity, manifest)
        if not changed:
            return manifest
        if self.overwrite:
            return None
        raise InputError(
            f"{str(self.out)!r} holds a finished table of {name} that is of another question ({changed}): --overwrite "
            "replaces it; or choose another out directory."
        )

    def one(self, plan: Plan, later: Sequence[Plan], waiting: list[tuple[str, str]]) -> dict[str, Any]:
        """Run one experiment and write its table and manifest, which it gives.

        later: the experiments that follow. waiting: (name, job) of those not finished.
        """
        experiment = plan.experiment
        if plan.needs_layer and any(name == "layer-ablation" for name, _ in waiting):
            raise Submitted("waits for layer-ablation, which finds its layer")
        plan = self._with_found(plan)
        options, identity = plan.options, self._identity(plan)
        if (kept := self._kept(identity)) is not None:
            logger.info("%s: finished before, kept", experiment.name)
            return kept
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if runs_here(self.model) and self.about["architecture"] in FAMILIES:
            kind = "part gradients" if Need.GRADIENTS in experiment.needs else "sweep"
            check_fits(self.model, len(plan.pairs), plan.pairs.clean.shape[1], kind, experiment.name)
        started = time.perf_counter()
        with _progress_bar(experiment.name, self.progress) as advance, self._counted() as counts:
            table = experiment.table(
                Context(self.model, plan.pairs, options, plan.held_out, self.seed, advance, self.attributions)
            )
        seconds = time.perf_counter() - started
        with self._counted():
            clean = self.clean()[experiment.name]
        on_this_cpu = runs_here(self.model) and self.found["device"] == "cpu"
        manifest = identity | {
            "paper": experiment.paper,
            "task_texts": {"title": self.task.title, "varies": self.task.varies, "roles": dict(self.task.roles)},
            "clean": clean,
            "examples": _examples(plan.pairs, self.model.tokenizer),
            "backend": "local" if runs_here(self.model) else self.model.jobs.backend,
            "device": self.found["device"],
            "dtype": self.found["dtype"],
            "kernels": self.found["kernels"],
            "scan": compiled_scan.load() if on_this_cpu else compiled_scan.LOOP,
            "versions": machine.all_versions() | self.found["versions"],
            **machine.about(),
            "platform": f"{platform.system()} {platform.machine()}",
            "threads": torch.get_num_threads(),
            "n_pairs": len(plan.pairs),
            "prompts_sha256": paper.prompts_sha256(plan.pairs),
            "rows": len(table),
            "wall_seconds": round(seconds, 3),
            "peak_memory_mib": _peak_memory_mib(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        manifest |= counts
        if torch.cuda.is_available():
            manifest["peak_gpu_memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
        self.out.mkdir(parents=True, exist_ok=True)
        # The manifest vouches for the table by its hash: a table without its manifest counts as unfinished.
        with written_whole(self.out / f"{experiment.name}.parquet") as path:
            table.to_parquet(path, index=False)
            manifest["table_sha256"] = sha256_of(path)
        with written_whole(self.out / f"{experiment.name}.json") as path:
            path.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        # Experiments with gradients share attributions: a run that is taken up again finds them for the next one.
        if Need.GRADIENTS not in experiment.needs or not any(Need.GRADIENTS in e.experiment.needs for e in later):
            self.store.forget()
        return manifest

    @contextmanager
    def _counted(self) -> Iterator[dict[str, Any]]:
        """What is done inside the block, for a manifest: chunks, which the store keeps, and requests to a server."""
        counts: dict[str, Any] = {}
        with keeping(self.model, self.store, self.chunks) as jobs:
            computed, kept, sent = jobs.computed, jobs.kept, len(jobs.records)
            yield counts
            counts["chunks"] = {
                "computed": jobs.computed - computed,
                "kept": jobs.kept - kept,
                "wanted": jobs.chunks,
            }
            if jobs.records[sent:]:
                counts["requests"] = _sums(jobs.records[sent:])

    def _without_gradients(self, plan: Plan) -> dict[str, Any]:
        """On a server that gives no gradients: the method that needs none, unless the user named one."""
        if self.found["gradients"] or Need.GRADIENTS not in plan.experiment.needs or "method" in plan.given:
            return {}
        if "method" not in options_of(plan.experiment.options):
            raise InputError(f"{plan.experiment.name} takes gradients, which this server does not give: leave it out.")
        logger.info("%s: no gradients on this server; each item is patched instead", plan.experiment.name)
        return {"method": "exact"}


def _sums(requests: list[dict[str, Any]]) -> dict[str, Any]:
    """How many requests, and their bytes and seconds together."""
    names = ("bytes_up", "bytes_down", "queue_seconds", "run_seconds", "transfer_seconds", "retries")
    sums = {name: sum(request.get(name, 0) for request in requests) for name in names}
    return {"count": len(requests)} | {name: round(value, 3) for name, value in sums.items()}


_MADE_FROM = {"seed": "seed", "task": "task", "pairs_sha256": "prompts", "held_out_sha256": "held-out prompts"}


def _changed(identity: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """In words, in what the question of a table is not that of a manifest; "" where it is the same.

    The same weights under another path are the same model.
    """
    ours = json.loads(json.dumps(dict(identity)))
    said = [f"other {words}" for key, words in _MADE_FROM.items() if ours[key] != manifest.get(key)]
    if ours["model"]["weights_sha256"] != (manifest["model"] or {}).get("weights_sha256"):
        said.insert(0, f"the model {manifest['model'].get('id')}, or other weights or dtype")
    options = manifest.get("options") or {}
    names = [key for key in ours["options"] | options if ours["options"].get(key) != options.get(key)]
    return ", ".join([*said, *(f"{key}={options.get(key)}" for key in names)])


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


PROGRESS = 15
"""The level of the logger at which progress is told, a line a minute: for a log file, below what is worth a message."""
logging.addLevelName(PROGRESS, "PROGRESS")

_OFTEN = 60.0  # seconds between two lines of progress in a file


@contextmanager
def _progress_bar(name: str, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A function progress(done, total) that moves one line on stderr, and tells the logger once a minute.

    What is counted are steps of the experiment: rows of passes, edges, layers, as it has them.
    """
    form = "{desc:<24} {percentage:3.0f}%|{bar:30}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}, {rate_noinv_fmt}]"
    # In a file each drawing stays.
    often = 0.1 if sys.stderr.isatty() else _OFTEN
    began = told = time.monotonic()
    with tqdm(
        desc=name,
        total=1,
        disable=not shown,
        bar_format=form,
        file=sys.stderr,
        mininterval=often,
        miniters=1,
        unit="steps",
    ) as bar:

        def advance(done: int, total: int) -> None:
            nonlocal told
            bar.total = total
            bar.update(done - bar.n)
            now = time.monotonic()
            if now - told >= _OFTEN:
                told = now
                logger.log(PROGRESS, "%s: %d of %d steps, %.3g a second", name, done, total, done / (now - began))

        yield advance
        bar.n = bar.total
        bar.refresh()
    logger.log(PROGRESS, "%s: done in %.1f s", name, time.monotonic() - began)
