"""An experiment as one record: what it asks, what it needs, its options, its table, and how that is shown.

An experiment never touches files, and a chart never touches a model: `run` makes a table of a `Context`, `chart` and
`findings` take the table alone, also one that was read from a file. Its texts may name what differs between the two
prompts of a pair as `{varies}`: each task says it in its own words; and what its option `ablation` writes as `{written}`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd
from pandas.api import types as dtypes

from ioi_mamba.errors import InputError
from ioi_mamba.experiments.needs import Need, unavailable
from ioi_mamba.experiments.options import NoOptions, made
from ioi_mamba.experiments.story import Story
from ioi_mamba.passes.ablations import ABLATIONS, RESAMPLE
from ioi_mamba.passes.sweep import Progress
from ioi_mamba.tasks.base import Pairs, check_pairs
from ioi_mamba.tasks.prompts import is_name
from ioi_mamba.tasks.task import Task

Draw = Callable[[Any, int | None, int], Pairs]
"""(tokenizer, how many or None for its own number, seed) gives pairs."""


@dataclass(frozen=True)
class Column:
    """A column of a table. kind: "int", "float", "bool" or "text"; meaning: in words; unit: "" for none.

    nullable: cells may be empty. later: tables of earlier versions lack it.
    """

    name: str
    kind: str
    meaning: str
    unit: str = ""
    nullable: bool = False
    later: bool = False

    def check(self, values: pd.Series) -> str | None:
        """What is wrong with the values, in words; None where nothing is."""
        if not self.nullable and values.isna().any():
            return "has empty cells"
        is_kind = {
            "int": dtypes.is_integer_dtype,
            "float": dtypes.is_float_dtype,
            "bool": dtypes.is_bool_dtype,
            "text": lambda each: dtypes.is_string_dtype(each) or dtypes.is_object_dtype(each),
        }[self.kind]
        # A column without any value has whatever type pandas gives to nothing.
        return None if is_kind(values.dtype) or values.isna().all() else f"holds {values.dtype}, not {self.kind}"


@dataclass(frozen=True)
class Context:
    """What an experiment is given when it runs.

    model: as `open_model` gives it. pairs: its prompts. options: an instance of its options dataclass. held_out: other
    prompts, for one that judges on them. seed: of what it draws itself. progress: called with (done, total). attributions:
    what was attributed in this run before, which experiments of one run share.
    """

    model: Any
    pairs: Pairs
    options: Any
    held_out: Pairs | None = None
    seed: int = 27
    progress: Progress | None = None
    attributions: dict[Any, Any] = field(default_factory=dict)

    def stage(self, begin: float, end: float) -> Progress | None:
        """A progress of its own for one stage of the run, from `begin` to `end` of the whole (0..1)."""
        return share_of(self.progress, begin, end)


def share_of(progress: Progress | None, begin: float, end: float) -> Progress | None:
    """A progress of its own for one stage of what `progress` counts, from `begin` to `end` of the whole (0..1)."""
    if progress is None:
        return None
    return lambda done, total: progress(round(1000 * (begin + (end - begin) * done / total)), 1000)


def no_more(table: pd.DataFrame) -> Mapping[str, Any]:
    """Of an experiment whose one chart shows all that there is."""
    return {}


@dataclass(frozen=True, repr=False)
class Experiment:
    """One experiment.

    Attributes:
        name: As on the command line and in file names, such as "layer-ablation".
        title: The heading of its section.
        question: What it asks, in a sentence.
        look_for: What to look for in its chart.
        method: How it is done, a line a step.
        columns: The table's columns; a table may have more.
        run: Makes the table of a `Context`.
        chart: Makes an Altair chart of the table.
        findings: Says in sentences what the table holds; the first is the one to read, short, with number and interval.
        paper: The section and figure of the paper that it is from; "" for none.
        needs: What it cannot do without.
        options: The dataclass of its options.
        draws: By task, how it draws its own pairs; a task that is not there draws as it does for all.
        most_pairs: Of a task without a draw of its own, the most pairs to draw unless the user says how many.
        more: Further charts of the table by title, for a reader who wants to see more; a chart each.
        story: What the table adds to the figure at the top of a page; None: nothing.
    """

    name: str
    title: str
    question: str
    look_for: str
    method: str
    columns: tuple[Column, ...]
    run: Callable[[Context], pd.DataFrame]
    chart: Callable[[pd.DataFrame], Any]
    findings: Callable[[pd.DataFrame], list[str]]
    paper: str = ""
    needs: frozenset[Need] = frozenset({Need.SITES, Need.ABLE})
    options: type = NoOptions
    draws: Mapping[str, Draw] = field(default_factory=dict)
    most_pairs: int | None = None
    more: Callable[[pd.DataFrame], Mapping[str, Any]] = no_more
    story: Story | None = None

    def __repr__(self) -> str:
        return f"<Experiment {self.name}: {self.title}>"

    def __call__(
        self,
        model: Any,
        pairs: Pairs,
        *,
        held_out: Pairs | None = None,
        seed: int = 27,
        progress: Progress | None = None,
        **options: Any,
    ) -> pd.DataFrame:
        """The experiment's table, outside of a run that writes files.

        Args:
            model: As `open_model` gives it.
            pairs: Its prompts.
            held_out: Other prompts, for an experiment that judges on them.
            seed: Of what it draws itself.
            progress: Called with (done, total).
            options: Its options by name.

        Raises:
            InputError: For an option that it does not have or that is out of range, and as the experiment says.
        """
        context = Context(model, pairs, made(self.options, options, self.name), held_out, seed, progress)
        return self.table(context)

    def table(self, context: Context) -> pd.DataFrame:
        """The table of a context.

        Raises InputError for a model or pairs that it cannot be done on, and where the table is not one that `columns`
        describes.
        """
        if (why := self.unavailable(context.model)) is not None:
            raise InputError(why)
        self.check_pairs(context.pairs)
        table = self.run(context)
        if not isinstance(table, pd.DataFrame):
            raise InputError(f"{self.name} made a {type(table).__name__}: its run must give a pandas DataFrame.")
        for column in self.columns:
            wrong = column.check(table[column.name]) if column.name in table else "is missing"
            if wrong:
                raise InputError(f"{self.name} made a table whose column {column.name!r} {wrong}: mend its run.")
        return table

    def unavailable(self, model: Any) -> str | None:
        """Why it cannot be done on a model, in a sentence; None where it can be."""
        return unavailable(self.name, self.needs, model)

    def check_pairs(self, pairs: Pairs) -> None:
        """Raise InputError, naming the experiment, for pairs that are not of the kind that it needs."""
        if Need.NAMES in self.needs and not any(map(is_name, check_pairs(pairs).roles)):
            raise InputError(f"{self.name} is about names, and these prompts have none: leave it out.")
        if Need.ONE_TOKEN in self.needs and check_pairs(pairs).readout is not None:
            raise InputError(f"{self.name} reads one token, and these answers have several: leave it out.")

    @property
    def required(self) -> tuple[str, ...]:
        """The columns that every table of it has, also one of an earlier version."""
        return tuple(column.name for column in self.columns if not column.later)

    def draw(self, tokenizer: Any, n_pairs: int | None, seed: int, task: Task) -> Pairs:
        """Pairs of a task as this experiment draws them; n_pairs None: its own number."""
        if task.name in self.draws:
            return self.draws[task.name](tokenizer, n_pairs, seed)
        most = task.default_pairs if self.most_pairs is None else min(task.default_pairs, self.most_pairs)
        return task.generate(tokenizer, most if n_pairs is None else n_pairs, seed)

    def texts(self, varies: str, ablation: Any = RESAMPLE.name) -> dict[str, str]:
        """The texts of its section on a page, by the names of the record's fields.

        Args:
            varies: What differs between the two prompts of a pair, as a task has it.
            ablation: The kind of ablation that it was run with, by name.
        """
        written = ABLATIONS[ablation].meaning if ablation in ABLATIONS else f"what {ablation!r} writes"
        return {
            name: getattr(self, name).replace("{varies}", varies).replace("{written}", written)
            for name in ("title", "question", "look_for", "method")
        }


def resolved(options: Any) -> dict[str, Any]:
    """Every option with its value, as a manifest keeps it."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(options).items()}
