"""What `ioi-mamba run --help` and completion say of the experiments, without importing them and torch.

`experiments.json` is written from the records by `python -m ioi_mamba.cli.listing`; a test holds it to them.
"""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("experiments.json")

EXAMPLES = """\
Examples:
  ioi-mamba run layer-ablation
  ioi-mamba run all --model state-spaces/mamba-370m-hf --device cuda
  ioi-mamba run conv-shift name-steering --option layer=3 --n-pairs 20 --out reports/mine
  ioi-mamba run edge-attribution --pairs mine.jsonl --option method=eap --out reports/mine --resume
  ioi-mamba run ./my_experiment.py --task greater-than --json
  ioi-mamba run study.yaml --out reports/study"""


def described() -> list[dict[str, Any]]:
    """Our own experiments as JSON has them: name, title, paper, and options with values in words, default and help."""
    from ioi_mamba import analyses
    from ioi_mamba.experiments.options import options_of

    return [
        {
            "name": name,
            "title": experiment.title,
            "paper": experiment.paper,
            "options": [
                {"name": each.name, "takes": each.described, "default": _default(each.default), "help": each.help}
                for each in options_of(experiment.options).values()
            ],
        }
        for name, experiment in ((name, analyses.load(name)) for name in analyses.ORDER)
    ]


def _default(value: Any) -> str:
    """A default as it is written on the command line."""
    if value is None or value == ():
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def read() -> list[dict[str, Any]]:
    """What `described` gave when the file was written."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def run_help() -> str:
    """The end of `ioi-mamba run --help`: every experiment with its options, then examples."""
    room = max(60, shutil.get_terminal_size().columns - 1)
    lines = [
        wrapped
        for depth, line in _lines()
        for wrapped in textwrap.wrap(line, room, initial_indent=" " * depth, subsequent_indent=" " * (depth + 4))
    ]
    return "\n".join(["Experiments, and their options for --option KEY=VALUE:", *lines, "", EXAMPLES])


def _lines() -> Iterator[tuple[int, str]]:
    """(how far it stands in, text) of each line."""
    for experiment in read():
        paper = f" ({experiment['paper']})" if experiment["paper"] else ""
        yield 2, f"{experiment['name']}: {experiment['title']}{paper}"
        for option in experiment["options"]:
            yield 6, f"{option['name']}={option['default']}: {option['help']} [{option['takes']}]"
    for point in entry_points(group="ioi_mamba.experiments"):
        yield 2, f"{point.name}: of the package {point.dist.name if point.dist else 'of someone else'}"


def experiment_names(context: Any) -> list[str]:
    """What may stand for ANALYSIS, to complete it."""
    return ["all", *(experiment["name"] for experiment in read())]


if __name__ == "__main__":
    FILE.write_text(json.dumps(described(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
