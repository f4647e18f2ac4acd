"""What the paper published about mamba-370m, as small tables: `names()`, `table(name)`, `about(name)`.

The numbers are those of arXiv 2407.14008 and of the notebooks, logs and circuit files published with it; nothing here
was measured by this package. `about` tells exact tables from those read off figures, and what is known to be wrong
with each. `claims` lists what the paper says, one number a row, with the tolerance a correct rerun should keep;
`ioi_mamba.claims.compare` holds a run against it.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import pandas as pd

from ioi_mamba.errors import InputError
from ioi_mamba.tasks.base import Pairs

_DATA = files(__name__) / "data"


class About(NamedTuple):
    """kind: exact, digitised (read off a figure) or mixed; source: where from; faults: what not to trust it for."""

    figure: str
    kind: str
    source: str
    columns: str
    faults: str


@cache
def _index() -> dict[str, About]:
    entries = json.loads((_DATA / "index.json").read_text(encoding="utf-8"))
    return {name: About(**entry) for name, entry in entries.items()}


def names() -> tuple[str, ...]:
    """The names of the tables."""
    return tuple(_index())


def about(name: str) -> About:
    """Where a table comes from, what its columns mean and what is wrong with it. Raises InputError as `table`."""
    if name not in _index():
        raise InputError(f"There is no table {name!r} of the paper: the names are {', '.join(names())}.")
    return _index()[name]


def table(name: str) -> pd.DataFrame:
    """A table of the paper, a new copy; its `attrs` hold `about(name)`. Raises InputError for an unknown name."""
    entry, read = about(name), _read(name).copy()
    read.attrs = entry._asdict()
    return read


@cache
def _read(name: str) -> pd.DataFrame:
    if name == "claims":
        rows = json.loads((_DATA / "claims.json").read_text(encoding="utf-8"))
        return pd.DataFrame(rows).astype(dict.fromkeys(("published", "at_least", "at_most", "min_n"), float))
    # Nodes are names, also those that look like numbers.
    with (_DATA / f"{name}.csv").open("rb") as file:
        return pd.read_csv(file, dtype={"source": "str", "target": "str"})


ALL = "all"


def prompts_sha256(pairs: Pairs) -> dict[str, str] | None:
    """SHA-256, in hex, of the prompts' texts: of ALL, and of each "template: corruption"; None for pairs without texts.

    It depends on no tokenizer and not on the order of the pairs, only on which (clean, corrupted) texts there are. A
    manifest carries it, so that a claim on published prompts (`table("prompts")`) is judged on these alone.
    """
    if pairs.texts is None:
        return None
    groups: dict[str, list[tuple[str, str]]] = {ALL: list(pairs.texts)}
    if {"template", "corruption"} <= set(pairs.labels):
        for text, *labels in zip(pairs.texts, pairs.labels["template"], pairs.labels["corruption"], strict=True):
            groups.setdefault(": ".join(labels), []).append(text)
    return {
        name: hashlib.sha256(json.dumps(sorted(texts), ensure_ascii=False).encode()).hexdigest()
        for name, texts in groups.items()
    }
