"""What the tables of one directory must have in common: else they are no one run, and no one page.

A manifest says what its table was made from: the weights, the task, the seed, and under "asked" what the user asked for:

| key | value |
|---|---|
| pairs_sha256, held_out_sha256 | of the prompts that were given, None where they were drawn |
| n_pairs | how many were to be drawn, None for each experiment's own number |
| options | the options that the user named and the experiment has |
| found | options that another table of the directory answered, such as the layer that layer-ablation found |

Experiments draw different prompts and have different options, so of an option two tables are only asked where both
experiments have it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ioi_mamba.errors import InputError

Manifest = Mapping[str, Any]


def _entry(manifest: Manifest, *keys: str) -> Any:
    """What stands there; None where nothing does, as in manifests of earlier versions."""
    value: Any = manifest
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _prompts(digest: Any) -> str:
    return "drawn prompts" if digest is None else f"given prompts ({str(digest)[:8]})"


def _model(manifest: Manifest) -> str:
    return (
        f"the model {_entry(manifest, 'model', 'id')} (weights {str(_entry(manifest, 'model', 'weights_sha256'))[:8]})"
    )


_TOLD: tuple[tuple[tuple[str, ...], Callable[[Manifest], str]], ...] = (
    (("model", "weights_sha256"), _model),
    (("task",), lambda manifest: f"the task {_entry(manifest, 'task')}"),
    (("seed",), lambda manifest: f"the seed {_entry(manifest, 'seed')}"),
)
"""Where something stands that all manifests of a directory agree on, and how to say what one has there.

A damaged manifest may not tell it: that is no difference.
"""

_ASKED: tuple[tuple[tuple[str, ...], Callable[[Manifest], str]], ...] = (
    (("asked", "pairs_sha256"), lambda manifest: _prompts(_entry(manifest, "asked", "pairs_sha256"))),
    (
        ("asked", "held_out_sha256"),
        lambda manifest: f"held-out: {_prompts(_entry(manifest, 'asked', 'held_out_sha256'))}",
    ),
    (("asked", "n_pairs"), lambda manifest: f"the number of pairs {_number(_entry(manifest, 'asked', 'n_pairs'))}"),
)
"""As above, where nothing says as much as something: that the prompts were drawn."""


def _number(n_pairs: Any) -> str:
    return "of each experiment" if n_pairs is None else str(n_pairs)


def difference(one: Manifest, other: Manifest) -> tuple[str, str] | None:
    """What keeps two tables from being of one run, as each has it, in words; None where nothing does."""
    for keys, words in _TOLD:
        mine, theirs = _entry(one, *keys), _entry(other, *keys)
        if mine is not None and theirs is not None and mine != theirs:
            return words(one), words(other)
    for keys, words in _ASKED:
        if _entry(one, *keys) != _entry(other, *keys):
            return words(one), words(other)
    both = [key for key in _options(one, "options") if key in _options(other, "options")]
    for kind in ("options", "found"):
        mine, theirs = (_options(manifest, "asked", kind) for manifest in (one, other))
        for key in both:
            # What was found is asked where both found it: who was told needs no other table's answer.
            asked = (key in mine) + (key in theirs)
            if mine.get(key) != theirs.get(key) and asked > (kind == "found"):
                return tuple(_option(key, each) for each in (mine, theirs))  # type: ignore[return-value]  # two
    return None


def _options(manifest: Manifest, *keys: str) -> Mapping[str, Any]:
    found = _entry(manifest, *keys)
    return found if isinstance(found, Mapping) else {}


def _option(key: str, given: Mapping[str, Any]) -> str:
    return f"{key}={given[key]}" if key in given else f"{key} as it is by default"


def check_one_run(directory: Path, manifests: Mapping[str, Manifest]) -> None:
    """Raise InputError, naming two tables and what they differ in, where manifests by name are not of one run."""
    names = list(manifests)
    for number, name in enumerate(names):
        for earlier in names[:number]:
            found = difference(manifests[earlier], manifests[name])
            if found is not None:
                raise InputError(
                    f"{str(directory)!r} holds tables of several runs: {earlier} has {found[0]}, {name} has {found[1]}. "
                    "One page would mix them: move each run's files (NAME.parquet and NAME.json) to a directory of its own."
                )
