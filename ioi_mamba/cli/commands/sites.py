"""`ioi-mamba sites`."""

from __future__ import annotations

import json
from typing import Annotated

from cyclopts import Parameter

from ioi_mamba.cli.log import Logging, listen
from ioi_mamba.cli.tables import columns


def sites(
    family: str = "mamba",
    /,
    *,
    json_: Annotated[bool, Parameter(name="--json", negative=(), show_default=False)] = False,
    log: Annotated[Logging, Parameter(name="*")] = Logging(),  # noqa: B008  immutable
) -> None:
    """List the hook names: every value that can be read and written.

    Parameters
    ----------
    family
        Of models, as config.json has it.
    json_
        Print one JSON object for each name.
    """
    with listen(log):
        from ioi_mamba.model.families import FAMILIES
        from ioi_mamba.model.family import Family
        from ioi_mamba.model.glossary import DIMENSIONS
        from ioi_mamba.registry import named

        found = named("family", family, FAMILIES, Family)
        if json_:
            for row in found.listed():
                print(
                    json.dumps(dict(zip(("name", "shape", "place", "meaning"), row, strict=True)), ensure_ascii=False)
                )
            return
        print(f"{found.label} ({found.name}; there are {', '.join(FAMILIES)})\n")
        print(columns([("hook name", "shape", "where it is", "meaning"), *found.listed()]))
        print("\nI is the layer, from 0.")
        print(columns([(term.letter, term.meaning) for term in DIMENSIONS]))
