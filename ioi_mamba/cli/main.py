"""The command `ioi-mamba`: a thin layer over `study`, `report`, `sites` and `doctor`.

What a user got wrong is one sentence on stderr and exit code 2; Ctrl-C is 130.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ioi_mamba.errors import InputError, ServerError, Submitted
from ioi_mamba.versions import version

if TYPE_CHECKING:
    from ioi_mamba.experiments.experiment import Experiment

NARROWEST = 20  # characters of a column that is broken to fit a terminal


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message[0].upper()}{message[1:]}: see `{self.prog} --help`.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ioi-mamba", description="Take a Mamba apart and report what is found.")
    parser.add_argument("--version", action="version", version=f"ioi-mamba {version('ioi-mamba') or '(not installed)'}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run experiments and write a report", description="Run experiments.")
    run.add_argument(
        "analysis",
        nargs="+",
        metavar="ANALYSIS",
        help="names such as layer-ablation, files that hold an experiment, or 'all'",
    )
    run.add_argument("--model", default="mini", help="'mini', a hub id or a directory (default: mini)")
    _add_backend(run)
    run.add_argument("--submit", action="store_true", help="hand requests to the server and do not wait for them")
    run.add_argument("--collect", action="store_true", help="fetch what was submitted, wait for it, and go on")
    run.add_argument("--max-upload", type=float, default=64, metavar="MIB", help="of one request (default: 64)")
    run.add_argument("--max-download", type=float, default=256, metavar="MIB", help="of one result (default: 256)")
    run.add_argument("--retries", type=int, default=5, metavar="N", help="after failures that may pass (default: 5)")
    run.add_argument(
        "--task", default="ioi", help="what the prompts ask: a name or a file that holds a task (default: ioi)"
    )
    source = run.add_mutually_exclusive_group()
    source.add_argument("--pairs", type=Path, metavar="FILE", help="prompts of one's own, one JSON object a line")
    source.add_argument("--n-pairs", type=int, metavar="N", help="pairs to draw (default: each experiment's own)")
    run.add_argument(
        "--held-out",
        type=Path,
        metavar="FILE",
        help="with --pairs: prompts to judge on what was chosen (default: every second of the pairs)",
    )
    run.add_argument("--seed", type=int, default=27, help="of the prompts drawn (default: 27, as in the paper)")
    run.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    run.add_argument("--dtype", default="float32", help="of the weights (default: float32)")
    run.add_argument("--out", type=Path, metavar="DIR", help="default: reports/MODEL-DATE-TIME")
    run.add_argument("--resume", action="store_true", help="keep the finished tables in --out")
    run.add_argument("--overwrite", action="store_true", help="replace finished tables in --out")
    run.add_argument(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="CPU threads (default 1: small models are no faster with more)",
    )
    run.add_argument("--no-resume-points", action="store_true", help="run every pass in full: slower, same values")
    run.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of an experiment, such as layer=3; may be given again",
    )
    run.set_defaults(call=_run)
    report = commands.add_parser("report", help="write the report of finished tables again")
    report.add_argument("directory", type=Path, metavar="DIR")
    report.add_argument("--charts", metavar="FORM", help="also write DIR/charts/NAME-of-MODEL.FORM: svg or png")
    report.add_argument(
        "--experiment",
        action="append",
        default=[],
        metavar="FILE",
        help="a file that holds an experiment whose table is there; may be given again",
    )
    report.set_defaults(call=_report)
    compare = commands.add_parser("compare", help="hold finished tables against the published numbers")
    compare.add_argument(
        "directory", type=Path, nargs="?", metavar="DIR", help="default: the newest run under reports/"
    )
    compare.set_defaults(call=_compare)
    sites = commands.add_parser("sites", help="list the hook names: every value that can be read and written")
    sites.add_argument("family", nargs="?", default="mamba", help="of models, as config.json has it (%(default)s)")
    sites.set_defaults(call=_sites)
    doctor = commands.add_parser("doctor", help="say what is installed and whether it works")
    doctor.add_argument("--model", default="mini", help="'mini', a hub id or a directory (default: mini)")
    _add_backend(doctor)
    doctor.set_defaults(call=_doctor)
    return parser


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        default="local",
        help="local (default); ndif: the model is on a server; local-serialized: here, as if sent to a server",
    )
    parser.add_argument("--host", help="the NDIF server (default: nnsight's setting)")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit codes: 0 done, 1 the doctor found something, 2 bad input, 3 server, 130 interrupted."""
    try:
        try:
            arguments = _parser().parse_args(argv)
            _quiet()
            return arguments.call(arguments)
        finally:
            # Here and not when Python ends, where a reader that has gone could not be caught any more.
            sys.stdout.flush()
    except InputError as error:
        print(f"ioi-mamba: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except ServerError as error:
        print(f"ioi-mamba: {' '.join(str(error).split())}", file=sys.stderr)
        return 3
    except Submitted as jobs:
        print(f"Submitted: {jobs}\nRun the same with --collect in place of --submit to fetch the results.")
        return 0
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(
            "ioi-mamba: interrupted; finished tables are kept, --resume with --out takes the run up again.",
            file=sys.stderr,
        )
        return 130


def _quiet() -> None:
    """Leave the terminal to our own progress: transformers and nnsight warn about kernels and show bars."""
    os.environ.setdefault("USE_HUB_KERNELS", "0")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("transformers", "nnsight", "huggingface_hub", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|nnsight|huggingface_hub|torch)\b")


def _run(arguments: argparse.Namespace) -> int:
    from ioi_mamba import analyses, tasks
    from ioi_mamba.experiments.needs import Need
    from ioi_mamba.study.plan import parse_options

    task = tasks.known(arguments.task)
    names = list(dict.fromkeys(arguments.analysis))
    experiments = [analyses.load(name) for name in (analyses.available() if names == ["all"] else names)]
    if names == ["all"] and task is not tasks.ioi.TASK:
        experiments = [experiment for experiment in experiments if Need.NAMES not in experiment.needs]
    if arguments.pairs is not None and task is not tasks.ioi.TASK:
        raise InputError(f"--pairs reads prompts with names, not those of {task.name}: give one of the two.")
    options = parse_options(experiments, arguments.option)
    if arguments.no_resume_points:
        options |= _without_resume_points(experiments)
    for flag, value in (("--n-pairs", arguments.n_pairs), ("--threads", arguments.threads)):
        if value is not None and value < 1:
            raise InputError(f"{flag} is {value}: give at least 1.")
    for flag in ("resume", "overwrite", "submit", "collect"):
        if getattr(arguments, flag) and arguments.out is None:
            raise InputError(f"--{flag} needs --out: name the directory of the run.")
    if (arguments.submit or arguments.collect) and arguments.backend != "ndif":
        raise InputError("--submit and --collect are for --backend ndif: leave them out.")
    if arguments.held_out is not None and arguments.pairs is None:
        raise InputError("--held-out goes with --pairs: without it, held-out prompts are drawn.")
    files = {"--pairs": arguments.pairs, "--held-out": arguments.held_out}
    for flag, path in files.items():
        if path is not None and not path.is_file():
            raise InputError(f"There is no file {str(path)!r} to read pairs from: give {flag} an existing one.")
    from ioi_mamba.study import runs

    out = arguments.out or _default_out(arguments.model, task.name)
    runs.check_out_dir(out)

    import torch

    from ioi_mamba.model.opening import open_model
    from ioi_mamba.tasks.base import Pairs

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model = open_model(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        backend=arguments.backend,
        host=arguments.host,
        any_architecture=not any(Need.SITES in experiment.needs for experiment in experiments),
    )
    if names == ["all"]:
        reasons = {experiment.name: experiment.unavailable(model) for experiment in experiments}
        for why in filter(None, reasons.values()):
            print(f"Left out: {why}", file=sys.stderr)
        experiments = [experiment for experiment in experiments if reasons[experiment.name] is None]
    if arguments.backend == "ndif":
        model.jobs.limit(arguments.max_upload, arguments.max_download, arguments.retries)
        model.jobs.wait = not arguments.submit
    pairs, held_out = (None if path is None else Pairs.from_jsonl(path, model.tokenizer) for path in files.values())
    page = runs.run_study(
        model,
        experiments,
        out,
        task=task,
        pairs=pairs,
        held_out=held_out,
        n_pairs=arguments.n_pairs,
        seed=arguments.seed,
        options=options,
        model_id=arguments.model,
        resume=arguments.resume or arguments.collect,
        overwrite=arguments.overwrite,
    )
    print(f"Report: {page}")
    return 0


def _without_resume_points(experiments: Sequence[Experiment]) -> dict[str, Any]:
    """The option that makes experiments run every pass in full. Raises InputError where none of them has it."""
    from ioi_mamba.experiments.options import options_of

    if not any("resume" in options_of(experiment.options) for experiment in experiments):
        raise InputError("None of these experiments starts passes midway: leave out --no-resume-points.")
    return {"resume": False}


def _default_out(model: str, task: str) -> Path:
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(model).name).strip(".") or "model"
    name += "" if task == "ioi" else f"-{task}"
    return Path("reports") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def _newest_run() -> Path:
    """The directory under reports/ whose table was written last. Raises InputError where there is none."""
    from ioi_mamba.results.stored import read_manifest

    manifests = [path for path in Path("reports").glob("*/*.json") if read_manifest(path) is not None]
    if not manifests:
        raise InputError("There is no run under reports/ to compare: name the --out directory of one.")
    return max(manifests, key=lambda path: path.stat().st_mtime).parent


def _report(arguments: argparse.Namespace) -> int:
    from ioi_mamba import analyses
    from ioi_mamba.report.pages import save_charts, write_report

    for path in arguments.experiment:
        analyses.load(Path(path))
    if arguments.charts is not None:
        for path in save_charts(arguments.directory, arguments.charts):
            print(f"Chart: {path}")
    print(f"Report: {write_report(arguments.directory)}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from ioi_mamba.claims import compare

    directory = arguments.directory or _newest_run()
    table = compare.compare(directory)
    if arguments.directory is None:
        print(f"{directory}\n")
    print(_columns(compare.text_rows(table)))
    print("\n" + "\n".join(compare.about(table)))
    return 0


def _sites(arguments: argparse.Namespace) -> int:
    from ioi_mamba.model.families import FAMILIES
    from ioi_mamba.model.family import Family
    from ioi_mamba.model.glossary import DIMENSIONS
    from ioi_mamba.registry import named

    family = named("family", arguments.family, FAMILIES, Family)
    print(f"{family.label} ({family.name}; there are {', '.join(FAMILIES)})\n")
    print(_columns([("hook name", "shape", "where it is", "meaning"), *family.listed()]))
    print("\nI is the layer, from 0.")
    print(_columns([(term.letter, term.meaning) for term in DIMENSIONS]))
    return 0


def _columns(rows: Sequence[Sequence[str]]) -> str:
    """A table; in a terminal that is too narrow for it the widest columns are broken into lines."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    words = [
        max((len(word) for cell in column for word in cell.split()), default=0) for column in zip(*rows, strict=True)
    ]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    while sum(widths) + 2 * (len(widths) - 1) > room:
        spare = [width if width > max(word, NARROWEST) else 0 for width, word in zip(widths, words, strict=True)]
        if not any(spare):
            break
        widths[spare.index(max(spare))] -= 1
    lines = []
    for row in rows:
        broken = [textwrap.wrap(cell, width or 1) for cell, width in zip(row, widths, strict=True)]
        for cells in itertools.zip_longest(*broken, fillvalue=""):
            lines.append("  ".join(map(str.ljust, cells, widths)).rstrip())
    return "\n".join(lines)


def _doctor(arguments: argparse.Namespace) -> int:
    from ioi_mamba.cli.doctor import examine

    good = True
    for check in examine(arguments.model, arguments.backend, arguments.host):
        print(f"{'ok ' if check.good else '-- '} {check.subject:<18} {check.says}", flush=True)
        good = good and check.good
    return 0 if good else 1
