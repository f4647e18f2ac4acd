"""What a user says of a run, by flags or in a study file: one model, which checks both. It loads no torch.

A study file is YAML with the names of the flags of `ioi-mamba run`. A list is swept: each combination is one cell, a run
of its own. Only `experiments` is a list of what each cell runs; an option that is a list itself stands in a second pair of
brackets.

    experiments: [layer-ablation, conv-shift]
    model: [mini, state-spaces/mamba-370m-hf]
    seed: [1, 2, 3]
    option:
      site: [layer_input, conv]
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from cyclopts import Parameter
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ioi_mamba.errors import InputError

SUFFIXES = (".yaml", ".yml")
"""How the name of a study file ends."""

MAX_CELLS = 10_000


class Settings(BaseModel):
    """One run, without its experiments: on what model, with which prompts, where."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field("mini", description="'mini', a hub id or a directory")
    task: str = Field("ioi", description="what the prompts ask: a name, or a file that holds a task")
    pairs: Path | None = Field(None, description="prompts of one's own, one JSON object a line")
    held_out: Path | None = Field(
        None, description="with --pairs: prompts to judge on what was chosen (default: every second of the pairs)"
    )
    n_pairs: int | None = Field(None, ge=1, description="pairs to draw (default: each experiment's own)")
    seed: int = Field(27, description="of the prompts drawn; 27 as in the paper")
    device: str | None = Field(None, description="cpu, cuda, ... (default: a GPU if there is one)")
    dtype: str = Field("float32", description="of the weights")
    threads: int | None = Field(
        None, ge=1, description="CPU threads (default: OMP_NUM_THREADS, or the cores that are ours; of a worker: 1)"
    )
    chunks: int | None = Field(None, ge=1, description="about how many a pass is cut into (default: 16 at most)")
    no_resume_points: Annotated[bool, Parameter(negative=(), show_default=False)] = Field(
        False, description="run every pass in full: slower, same values"
    )
    bound: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of prompts a model must get right unpatched to be drawn (default: half way between guessing and 1)",
    )
    backend: str = Field(
        "local",
        description="local; ray: workers share the work; ndif: the model is on a server; local-serialized: here, as if sent to a server",
    )
    workers: int | None = Field(None, ge=1, description="with --backend ray: how many (default: one a GPU, or a core)")
    address: str | None = Field(
        None, description="with --backend ray: of a running cluster, or auto (default: one is started here)"
    )
    jobs: int = Field(1, ge=1, description="with --backend ndif: requests in flight")
    host: str | None = Field(None, description="the NDIF server (default: nnsight's setting)")
    max_upload: float = Field(64, gt=0, description="MiB of one request")
    max_download: float = Field(256, gt=0, description="MiB of one result")
    retries: int = Field(5, ge=0, description="after failures that may pass")

    @property
    def given(self) -> dict[str, Any]:
        """What the user said, by name, also where it is the default."""
        return {name: getattr(self, name) for name in self.model_fields_set}

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.pairs is not None and self.n_pairs is not None:
            raise ValueError("--pairs and --n-pairs do not go together: give prompts or how many to draw")
        if self.held_out is not None and self.pairs is None:
            raise ValueError("--held-out goes with --pairs: without it, held-out prompts are drawn")
        for name, backend in (("workers", "ray"), ("address", "ray"), ("jobs", "ndif")):
            if name in self.model_fields_set and self.backend != backend:
                raise ValueError(f"--{name} is for --backend {backend}: leave it out")
        if self.pairs is not None and self.task != "ioi":
            raise ValueError(f"--pairs reads prompts with names, not those of {self.task}: give one of the two")
        return self


QUESTION = ("model", "task", "pairs", "held_out", "n_pairs", "seed", "dtype", "no_resume_points")
"""Settings that a table depends on, beside options; the others say where and how it is made."""


def in_words(error: ValidationError, source: str = "") -> InputError:
    """The first thing that is wrong with settings, in one sentence; source: the file they are of, "" for flags."""
    first = error.errors()[0]
    words = re.sub(r"^(Value error, |Input )", "", first["msg"]).rstrip(".")
    place = f"{source}: " if source else ""
    if not first["loc"]:
        return InputError(f"{place}{words}.")
    name = str(first["loc"][-1]).replace("_", "-")
    given = first["input"] if isinstance(first["input"], str) else repr(first["input"])
    return InputError(f"{place}{name if source else f'--{name}'} is {given}: it {words}.")


@dataclass(frozen=True)
class Cell:
    """One run of a study. options: by name, for every experiment that takes them."""

    settings: Settings
    options: Mapping[str, Any]

    @property
    def question(self) -> dict[str, Any]:
        """What its tables depend on, as JSON has it."""
        chosen = self.settings.model_dump(mode="json", include=set(QUESTION))
        return chosen | {"option": dict(self.options)}

    @property
    def name(self) -> str:
        """Its directory: model and seed to read, what else is no default, and a hash of all; the same in every study."""
        standard = Settings().model_dump(mode="json")
        others = {key: value for key, value in self.question.items() if key not in ("model", "seed", "option")}
        told = {key: value for key, value in others.items() if value != standard[key]} | dict(self.options)
        said = [Path(self.settings.model).name, f"seed-{self.settings.seed}"]
        said += [f"{key.replace('_', '-')}-{Path(str(value)).name}" for key, value in told.items()]
        digest = hashlib.sha256(json.dumps(self.question, sort_keys=True, default=str).encode()).hexdigest()
        return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', '-'.join(said)).strip('.-')[:80]}-{digest[:8]}"


@dataclass(frozen=True)
class Study:
    """Experiments, and the cells that they are run in."""

    name: str
    experiments: tuple[str, ...]
    cells: tuple[Cell, ...]
    out: Path | None


def read_study(path: Path, given: Mapping[str, Any]) -> Study:
    """A study file, unrolled into cells.

    Args:
        path: The file.
        given: Flags by field name of `Settings`, and "option": they stand in place of what the file says.

    Raises:
        InputError: For a file that is not there or is no mapping, a key that is no flag, with the nearest one, a value
            that its flag does not take, and for two cells that are the same.
    """
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"The study file {str(path)!r} cannot be read ({error.strerror}): give an existing one."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = "" if where is None else f", line {where.line + 1}"
        raise InputError(f"{path}{line} is not YAML ({str(error).splitlines()[0]}): mend the file.") from None
    if not isinstance(told, dict):
        raise InputError(f"{path} is no list of `key: value`: write flags of `ioi-mamba run` there, as `seed: [1, 2]`.")
    told = {str(key).replace("-", "_"): value for key, value in told.items()}
    known = (*Settings.model_fields, "experiments", "option", "out")
    for key in told:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise InputError(f"{path}: {key!r} is no flag of `ioi-mamba run`: did you mean {nearest!r}?")
    options = told.pop("option", None) or {}
    if not isinstance(options, dict):
        raise InputError(f"{path}: option is {options!r}: write the options by name, as `option: {{layer: 3}}`.")
    experiments, out = told.pop("experiments", None), told.pop("out", None)
    names = [experiments] if isinstance(experiments, str) else experiments
    if not names or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path} names no experiments: add `experiments: [layer-ablation]`, or `experiments: all`.")
    if out is not None and not isinstance(out, str):
        raise InputError(f"{path}: out is {out!r}: give the directory of the study.")
    settings = told | {key: value for key, value in given.items() if key != "option"}
    options = {str(key): value for key, value in options.items()} | dict(given.get("option", {}))
    cells: dict[str, Cell] = {}
    for values in _combinations([*settings.values(), *options.values()], path):
        of_settings, of_options = values[: len(settings)], values[len(settings) :]
        checked = _checked(dict(zip(settings, of_settings, strict=True)), path)
        cell = Cell(checked, dict(zip(options, of_options, strict=True)))
        if cell.name in cells:
            raise InputError(f"{path} has the cell {cell.name} twice: name each value of a list once.")
        cells[cell.name] = cell
    return Study(path.stem, tuple(dict.fromkeys(names)), tuple(cells.values()), None if out is None else Path(out))


def _checked(values: Mapping[str, Any], path: Path) -> Settings:
    try:
        return Settings(**values)
    except ValidationError as error:
        raise in_words(error, str(path)) from None


def _combinations(values: Sequence[Any], path: Path) -> Iterator[tuple[Any, ...]]:
    axes = [value if isinstance(value, list) else [value] for value in values]
    n_cells = 1
    for axis in axes:
        n_cells *= len(axis)
    if not 0 < n_cells <= MAX_CELLS:
        raise InputError(f"{path} has {n_cells} cells: it takes from 1 to {MAX_CELLS}.")
    return itertools.product(*axes)
