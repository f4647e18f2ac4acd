"""The one place where a computation is done here or sent to a server: `call`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def call(model, work: Callable[..., Any], *args: Any, progress: Callable[[int, int], None] | None = None) -> Any:
    """`work(model, *args, progress=progress)`, run where the model is; what it returns are tensors.

    A model opened with a backend has `jobs` (see `remote.py`), which carries out the whole of `work` as one request;
    on the server, where the model has none, everything inside runs at once. `work` is a function of a module, takes
    tensors, plain values, `Pairs` and the like, and returns tensors or lists and dicts of them; a decorator on it, or
    an import inside it, would be lost on the way. Progress is not heard from a server.
    """
    jobs = getattr(model, "jobs", None)
    if jobs is None or jobs.busy:
        return work(model, *args, progress=progress)
    return jobs.send(model, work, args)


def runs_here(model) -> bool:
    """Whether `call` runs its work in this process with this model, so that what it keeps is there the next time."""
    return getattr(model, "jobs", None) is None


def config_of(model) -> Any:
    """The model's configuration, also in a server's sandbox, where it is only in what the client sent along."""
    return model.__dict__.get("sent_config") or model.config


def device_of(model) -> Any:
    """Where the model's inputs go, as `torch.device`; a sandbox has no device of its own and works on the CPU."""
    try:
        return model.device
    except AttributeError:
        return torch.device("cpu")
