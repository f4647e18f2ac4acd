"""`ioi-mamba doctor`."""

from __future__ import annotations

import json
from typing import Annotated

from cyclopts import Parameter

from ioi_mamba.cli.log import Logging, listen, quieten


def doctor(
    *,
    model: str = "mini",
    backend: str = "local",
    host: str | None = None,
    json_: Annotated[bool, Parameter(name="--json", negative=(), show_default=False)] = False,
    log: Annotated[Logging, Parameter(name="*")] = Logging(),  # noqa: B008  immutable
) -> int:
    """Say what is installed and whether it works. Exits with 1 where something needs attention.

    Parameters
    ----------
    model
        'mini', a hub id or a directory.
    backend
        local; ndif: what the server allows with the model.
    host
        The NDIF server (default: nnsight's setting).
    json_
        Print one JSON object for each check.
    """
    with listen(log):
        quieten()
        from ioi_mamba.cli.doctor import examine

        good = True
        for check in examine(model, backend, host):
            line = f"{'ok ' if check.good else '-- '} {check.subject:<18} {check.says}"
            print(json.dumps(check._asdict(), ensure_ascii=False) if json_ else line, flush=True)
            good = good and check.good
        return 0 if good else 1
