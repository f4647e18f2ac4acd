"""Where work is done: here, chunk by chunk. Other places, a server or workers, say how they compute what is left to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ioi_mamba.remote.store import Store

Progress = Callable[[int, int], None]
Done = Iterator[tuple[int, Any]]
"""(number, result) of chunks, in the order in which they are done."""


def in_turn(model, work: Callable[..., Any], chunks: Sequence[tuple], *, progress: Progress | None = None) -> list[Any]:
    """`work(model, *chunk, progress=...)` of every chunk, one after the other in this process."""
    found = []
    for k, chunk in enumerate(chunks):

        def heard(done: int, total: int, before: int = k) -> None:
            if progress is not None:
                progress(1000 * before + 1000 * done // total, 1000 * len(chunks))

        found.append(work(model, *chunk, progress=heard))
        heard(1, 1)
    return found


class Jobs:
    """What `model.jobs` is: does chunks of work in this process, and keeps those that are done.

    Attributes:
        store: Where finished chunks are kept, so that a run that was cut off does nothing twice; None: nowhere.
        chunks: About how many chunks a pass over pairs is cut into; None: as `memory.rows_per_chunk` finds best.
        busy: Whether a piece of work is under way, inside of which nothing is cut up or kept any more.
        computed, kept: How many chunks were computed, and how many were found in a store.
        records: What each request to a server took.
        device: Where workers have the model; None: where it is says the model itself.
    """

    backend = "local"
    here = True
    """Whether the model is in this process, so that what is kept beside it is there the next time."""
    plans_here = True
    """Whether work that cuts itself into chunks does so in this process."""

    def __init__(self):
        self.store: Store | None = None
        self.chunks: int | None = None
        self.busy = False
        self.computed = self.kept = 0
        self.device: Any = None
        self.records: list[dict[str, Any]] = []

    def __reduce__(self):
        """None: a model is sent with all that hangs on it, and where it arrives there is nowhere to send jobs."""
        return type(None), ()

    def each(
        self, model, work: Callable[..., Any], chunks: Sequence[tuple], progress: Progress | None = None
    ) -> list[Any]:
        """`work(model, *chunk, progress=...)` of every chunk, in order; those in the store are not computed."""
        store = self.store
        keys = [store.key(work, chunk) if store else None for chunk in chunks]
        kept = {k: store.get(key) for k, key in enumerate(keys)} if store else {}
        found = {k: result for k, result in kept.items() if result is not None}
        left = {k: chunk for k, chunk in enumerate(chunks) if k not in found}
        self.kept += len(found)

        def heard(done: int, total: int) -> None:
            """Progress inside of a chunk, in thousandths of it."""
            if progress is not None:
                progress(1000 * len(found) + 1000 * done // total, 1000 * len(chunks))

        if found:
            heard(0, 1)
        for k, result in self.compute(model, work, left, {k: keys[k] for k in left}, heard):
            self.computed += 1
            if store:
                store.put(keys[k], result)
            found[k] = result
            heard(0, 1)
        return [found[k] for k in range(len(chunks))]

    def one(self, model, work: Callable[..., Any], args: tuple, progress: Progress | None = None) -> Any:
        """`work(model, *args, progress=progress)` as a whole."""
        return work(model, *args, progress=progress)

    def close(self) -> None:
        """End what was started for this model elsewhere."""

    def compute(
        self,
        model,
        work: Callable[..., Any],
        chunks: Mapping[int, tuple],
        keys: Mapping[int, str | None],
        progress: Progress,
    ) -> Done:
        """Do these chunks. keys: their names in the store. progress: heard from the chunk that is under way."""
        for k, chunk in chunks.items():
            with self.at_work():
                result = work(model, *chunk, progress=progress)
            yield k, result

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside the block everything runs at once."""
        self.busy = True
        try:
            yield
        finally:
            self.busy = False
