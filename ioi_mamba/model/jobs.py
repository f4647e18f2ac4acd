"""Where computations are done, and in what pieces: here, on a server or on workers.

`call` does one piece of work where the model is. `each_chunk` does a piece of work on every chunk of something, such as some
of the pairs: chunks are what workers share out, and what a run that was cut off does not do twice. `conduct` does work
that itself cuts what it is given into chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ioi_mamba.remote.jobs import Jobs, in_turn
from ioi_mamba.remote.store import Store


def call(model, work: Callable[..., Any], *args: Any, progress: Callable[[int, int], None] | None = None) -> Any:
    """`work(model, *args, progress=progress)`, run where the model is; what it returns are tensors.

    A model opened with a backend has `jobs` (see `remote`), which carries out the whole of `work` as one request; on
    the server, where the model has none, everything inside runs at once. `work` is a function of a module, takes
    tensors, plain values, `Pairs` and the like, and returns tensors or lists and dicts of them; a decorator on it, or
    an import inside it, would be lost on the way. Progress is not heard from a server.
    """
    jobs = getattr(model, "jobs", None)
    if jobs is None or jobs.busy:
        return work(model, *args, progress=progress)
    return jobs.one(model, work, args, progress)


def conduct(model, work: Callable[..., Any], *args: Any, progress: Callable[[int, int], None] | None = None) -> Any:
    """As `call`, of work that reaches the model through `each_chunk` alone: it runs here where chunks are shared out from here."""
    jobs = getattr(model, "jobs", None)
    if jobs is None or jobs.busy or jobs.plans_here:
        return work(model, *args, progress=progress)
    return jobs.one(model, work, args, progress)


def each_chunk(
    model, work: Callable[..., Any], chunks: Sequence[tuple], *, progress: Callable[[int, int], None] | None = None
) -> list[Any]:
    """`work(model, *chunk, progress=...)` of every chunk, in order; `work` and what it returns as in `call`, on the CPU.

    In a run each result is kept until the table is written. Workers share the chunks out; a server gets them in as
    many requests as may be in flight.
    """
    jobs = getattr(model, "jobs", None)
    if jobs is not None and not jobs.busy:
        return jobs.each(model, work, chunks, progress)
    return in_turn(model, work, chunks, progress=progress)


@contextmanager
def keeping(model, store: Store, chunks: int | None = None) -> Iterator[Jobs]:
    """Inside the block finished chunks are kept in `store`. Gives what does the work of this model.

    chunks: about how many a pass over pairs is cut into; None: as is best for whoever does the work.
    """
    jobs = getattr(model, "jobs", None)
    own = jobs is None
    if own:
        jobs = model.jobs = Jobs()
    before, jobs.store = jobs.chunks, store
    jobs.chunks = chunks or before
    try:
        yield jobs
    finally:
        jobs.store, jobs.chunks = None, before
        if own:
            model.jobs = None


def close(model) -> None:
    """End the workers of a model, if it has any."""
    jobs = getattr(model, "jobs", None)
    if jobs is not None:
        jobs.close()


def runs_here(model) -> bool:
    """Whether `call` runs its work in this process with this model, so that what it keeps is there the next time."""
    jobs = getattr(model, "jobs", None)
    return jobs is None or jobs.here


def chunks_wanted(model) -> int | None:
    """About how many chunks a pass over pairs is to be cut into; None: whoever cuts finds what is best."""
    jobs = getattr(model, "jobs", None)
    return None if jobs is None else jobs.chunks


def config_of(model) -> Any:
    """The model's configuration, also in a server's sandbox, where it is only in what the client sent along."""
    return model.__dict__.get("sent_config") or model.config


def device_of(model) -> Any:
    """Where the model's inputs go, as `torch.device`; a sandbox has no device of its own and works on the CPU."""
    jobs = getattr(model, "jobs", None)
    if jobs is not None and jobs.device is not None:
        return jobs.device
    try:
        return model.device
    except AttributeError:
        return torch.device("cpu")
