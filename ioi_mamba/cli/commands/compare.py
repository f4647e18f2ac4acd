"""`ioi-mamba compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ioi_mamba.cli.log import Logging, listen
from ioi_mamba.cli.tables import columns
from ioi_mamba.errors import InputError


def compare(
    directory: Path | None = None,
    /,
    *,
    strict: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    json_: Annotated[bool, Parameter(name="--json", negative=(), show_default=False)] = False,
    log: Annotated[Logging, Parameter(name="*")] = Logging(),  # noqa: B008  immutable
) -> int:
    """Hold finished tables against the published numbers.

    Parameters
    ----------
    directory
        The --out of a run (default: the newest run under reports/).
    strict
        Exit with 4 where a claim does not hold.
    json_
        Print one JSON object for each claim.
    """
    with listen(log):
        from ioi_mamba.claims import compare as claims

        place = directory or _newest_run()
        table = claims.compare(place)
        if json_:
            print(table.to_json(orient="records", lines=True, force_ascii=False), end="")
        else:
            if directory is None:
                print(f"{place}\n")
            print(columns(claims.text_rows(table)))
            print("\n" + "\n".join(claims.about(table)))
        return 4 if strict and (table["verdict"] == claims.FAILS).any() else 0


def _newest_run() -> Path:
    """The directory under reports/ whose table was written last. Raises InputError where there is none."""
    from ioi_mamba.results.stored import read_manifest

    manifests = [path for path in Path("reports").glob("*/*.json") if read_manifest(path) is not None]
    if not manifests:
        raise InputError("There is no run under reports/ to compare: name the --out directory of one.")
    return max(manifests, key=lambda path: path.stat().st_mtime).parent
