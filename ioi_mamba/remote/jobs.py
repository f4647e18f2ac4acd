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
    sizes, found = [size_of(chunk) for chunk in chunks], []
    for k, chunk in enumerate(chunks):

        def heard(done: int, total: int, before: int = sum(sizes[:k]), size: int = sizes[k]) -> None:
            if progress is not None:
                progress(before + size * done // total, sum(sizes))

        found.append(work(model, *chunk, progress=heard))
        heard(1, 1)
    return found


def size_of(chunk: tuple) -> int:
    """What progress counts of a chunk: its pairs, where these come first, else the chunk itself."""
    first = chunk[0] if chunk else None
    return len(first) if hasattr(first, "clean") else 1


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

        sizes = [size_of(chunk) for chunk in chunks]

        def heard(under_way: float) -> None:
            """under_way: how many chunks those that are not finished amount to."""
            if progress is not None:
                finished = sum(sizes[k] for k in found)
                progress(
                    finished + int(under_way * (sum(sizes) - finished) / max(1, len(chunks) - len(found))), sum(sizes)
                )

        if found:
            heard(0)
        for k, result in self.compute(model, work, left, {k: keys[k] for k in left}, heard):
            self.computed += 1
            if store:
                store.put(keys[k], result)
            found[k] = result
            heard(0)
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
        under_way: Callable[[float], None],
    ) -> Done:
        """Do these chunks. keys: their names in the store. under_way: told how many chunks the unfinished amount to."""
        for k, chunk in chunks.items():
            with self.at_work():
                result = work(model, *chunk, progress=lambda done, total: under_way(done / total))
            yield k, result

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside the block everything runs at once."""
        self.busy = True
        try:
            yield
        finally:
            self.busy = False
