"""Chunks shared out by Ray: workers, on this machine or many, that hold the model once each.

A worker is an actor with a model of its own, opened where it runs. It does one chunk at a time; what comes back are
tensors, and they are put together in order. A worker that ends is replaced and its chunk done again.
"""

from __future__ import annotations

import atexit
import logging
import os
import socket
import sys
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ioi_mamba.errors import InputError, ServerError
from ioi_mamba.remote.jobs import Done, Jobs, Progress
from ioi_mamba.remote.store import PACKAGE, weights_digest

ASKED = "asked"  # the group of an actor's methods that answers while another one is at work
CHUNKS_A_WORKER = 4  # at least, where there are many: the last chunk is done by one while the others have none
TRIES = 3  # of a chunk whose worker ends each time
START_SECONDS = 600  # a worker may take to start and to open its model
CONNECT_SECONDS = 10  # for a cluster's address to answer
HEARD_SECONDS = 0.5  # from one look at what workers say of their progress to the next
STORE_BYTES = 512 << 20  # of Ray's object store on this machine: chunks and their results are small


@dataclass(frozen=True)
class Workers:
    """Where workers run, and how many.

    Attributes:
        address: A running Ray cluster's ("auto": the one of this machine or job); None: on this machine, started here.
        count: How many workers; None: one a GPU, or, without any, one for each `threads` CPUs of the cluster.
        threads: CPU threads of a worker.
        gpus: GPUs of a worker, also a share of one; None: as many as go round, at most one each.
    """

    address: str | None = None
    count: int | None = None
    threads: int = 1
    gpus: float | None = None


class _Loaded(NamedTuple):
    """What a worker says of itself once its model is open."""

    pid: int
    weights: str
    device: str


class _Worker:
    """The actor."""

    share = 0.0

    def open(self, opened: Callable[[], Any], threads: int) -> _Loaded:
        torch.set_num_threads(threads)
        self.model = opened()
        return _Loaded(os.getpid(), weights_digest(self.model._module.state_dict()), str(self.model.device))

    def do(self, work: Callable[..., Any], chunk: tuple) -> Any:
        self.share = 0.0

        def heard(done: int, total: int) -> None:
            self.share = done / total

        try:
            return work(self.model, *chunk, progress=heard)
        except InputError as error:
            raise InputError(str(error)) from None
        except Exception as error:
            # What is raised inside a trace holds frames, and these cannot be sent.
            raise RuntimeError(f"{type(error).__name__}: {error}") from None

    def done(self) -> float:
        """The share of its chunk that is done, 0..1; asked while `do` is at it."""
        return self.share


class RayJobs(Jobs):
    """`model.jobs` of a model whose work is done by workers; here the model has no weights.

    pids: the processes of the workers that are up, oldest first. replaced: how many ended and were replaced.
    device: of their models. Raises InputError where Ray is not installed or no cluster answers, or a worker cannot
    open the model, and ServerError where none comes up in time.
    """

    backend = "ray"
    here = False

    def __init__(self, opened: Callable[[], Any], workers: Workers):
        super().__init__()
        self.opened, self.workers = opened, workers
        self.pids: list[int] = []
        self.replaced = 0
        self._weights: str | None = None
        self._ray = _connected(workers)
        self._started_here = workers.address is None
        # Also where the program ends without a word to us.
        atexit.register(self.close)
        try:
            count, self._gpus = self._shares()
            self._starting: dict[Any, Any] = {}
            self._idle: deque[tuple[Any, int]] = deque()
            for _ in range(count):
                self._start()
            self.count = count
            if count * CHUNKS_A_WORKER > 16:
                self.chunks = count * CHUNKS_A_WORKER
            while not self._idle:
                self._greet(self._wait(list(self._starting), START_SECONDS))
        except BaseException:
            self.close()
            raise

    def _shares(self) -> tuple[int, float]:
        """How many workers, and the GPUs of each."""
        there, wanted = self._ray.cluster_resources(), self.workers
        gpus, cpus = int(there.get("GPU", 0)), int(there.get("CPU", 1))
        if wanted.gpus == 0 or not gpus:
            return wanted.count or max(1, cpus // wanted.threads), 0
        count = wanted.count or (gpus if wanted.gpus is None else int(gpus / wanted.gpus))
        return count, min(1.0, gpus / count) if wanted.gpus is None else wanted.gpus

    def _start(self) -> None:
        options = {"num_cpus": self.workers.threads, "num_gpus": self._gpus, "concurrency_groups": {ASKED: 1}}
        actor = self._ray.remote(**options)(_Worker).remote()
        self._starting[actor.open.remote(self.opened, self.workers.threads)] = actor

    def _wait(self, refs: list[Any], seconds: float) -> list[Any]:
        ready, _ = self._ray.wait(refs, num_returns=1, timeout=seconds)
        if not ready and seconds == START_SECONDS:
            raise ServerError(
                f"No worker came up in {START_SECONDS} s: look at `ray status`, or ask for fewer --workers or --threads."
            )
        return ready

    def _greet(self, refs: list[Any]) -> None:
        """Take those workers in whose model is open."""
        for ref in refs:
            actor = self._starting.pop(ref)
            try:
                loaded = self._ray.get(ref)
            except self._ray.exceptions.RayTaskError as error:
                raise _cause(error) from None
            except self._ray.exceptions.RayError as error:
                self._replace(error)
                continue
            if loaded.weights != (self._weights or loaded.weights):
                raise InputError(
                    "The workers hold different weights under this model's name: make the files the same on all nodes."
                )
            self._weights, self.device = loaded.weights, torch.device(loaded.device)
            self.pids.append(loaded.pid)
            self._idle.append((actor, loaded.pid))

    def _replace(self, error: Exception) -> None:
        """Start a worker in the place of one that ended. Raises ServerError where they end again and again."""
        self.replaced += 1
        print(f"A worker ended ({type(error).__name__}); another one takes its place.", file=sys.stderr)
        if self.replaced > TRIES * self.count + TRIES:
            raise ServerError(f"Workers end again and again: {str(error).splitlines()[0]}")
        self._start()

    def one(self, model, work: Callable[..., Any], args: tuple, progress: Progress | None = None) -> Any:
        """The whole of `work` on one worker."""

        def heard(share: float) -> None:
            if progress is not None:
                progress(int(1000 * share), 1000)

        ((_, result),) = self.compute(model, work, {0: args}, {0: None}, heard)
        return result

    def compute(self, model, work: Callable[..., Any], chunks, keys, under_way) -> Done:
        ray = self._ray
        _send_by_value(work)
        waiting, running, tries = deque(chunks.items()), {}, Counter()
        while waiting or running:
            while waiting and self._idle:
                k, chunk = waiting.popleft()
                actor, pid = self._idle.popleft()
                running[actor.do.remote(work, chunk)] = (k, actor, pid)
            seconds = HEARD_SECONDS if running else START_SECONDS
            ready = self._wait([*running, *self._starting], seconds)
            self._greet([ref for ref in ready if ref in self._starting])
            for ref in ready:
                if ref not in running:
                    continue
                k, actor, pid = running.pop(ref)
                try:
                    result = ray.get(ref)
                except ray.exceptions.RayTaskError as error:
                    self._idle.append((actor, pid))
                    raise _cause(error) from None
                except ray.exceptions.RayError as error:
                    self.pids.remove(pid)
                    tries[k] += 1
                    if tries[k] == TRIES:
                        raise ServerError(
                            f"A chunk ended its worker {TRIES} times, perhaps for want of memory: use fewer pairs, or a "
                            "larger --chunks."
                        ) from None
                    self._replace(error)
                    waiting.appendleft((k, chunks[k]))
                else:
                    self._idle.append((actor, pid))
                    yield k, result
            if running and not ready:
                under_way(self._share([actor for _, actor, _ in running.values()]))

    def _share(self, actors: list[Any]) -> float:
        """How many chunks are done, counting the share of each that is under way."""
        asked = [actor.done.options(concurrency_group=ASKED).remote() for actor in actors]
        answered, _ = self._ray.wait(asked, num_returns=len(asked), timeout=HEARD_SECONDS)
        found = 0.0
        for ref in answered:
            with suppress(self._ray.exceptions.RayError):  # one that ended is noticed by its chunk
                found += self._ray.get(ref)
        return found

    def close(self) -> None:
        """End the workers, and Ray where it was started here. Nothing is left running."""
        atexit.unregister(self.close)
        if self._ray.is_initialized():
            for actor in [*(actor for actor, _ in self._idle), *self._starting.values()]:
                with suppress(Exception):
                    self._ray.kill(actor)
            # The rest of what this program started on a cluster ends with its connection.
            self._ray.shutdown()


def _connected(workers: Workers) -> Any:
    """Ray, connected. Raises InputError where it is not installed or no cluster answers."""
    # Nothing is reported to anybody, and a driver's log is ours alone.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if workers.address is None:
        # Else Ray, when it is imported, decides to put the machine's address in place of 127.0.0.1.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    else:
        # Else it tries for many minutes to reach a cluster that is no longer there.
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")
    try:
        import ray
    except ImportError:
        raise InputError("The backend 'ray' needs Ray: install ioi-mamba[ray], or use the backend 'local'.") from None
    if ray.is_initialized():
        raise InputError("This process is connected to Ray already: end that with ray.shutdown() first.")
    if workers.address is None:
        options = {
            "address": "local",
            "num_cpus": workers.count * workers.threads if workers.count else None,
            "include_dashboard": False,
            "object_store_memory": STORE_BYTES,
            "_node_ip_address": "127.0.0.1",
            # Else its workers give way to everything else on the machine.
            "_system_config": {"worker_niceness": 0},
        }
    else:
        options = {"address": workers.address}
        host, colon, port = workers.address.rpartition(":")
        if colon and "://" not in workers.address:
            _look_for(host.strip("[]"), port, workers.address)
    for attempt in range(TRIES):
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
            break
        except Exception as error:  # Ray raises whatever it likes, also Exception itself
            ray.shutdown()
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            if workers.address is not None and "AuthenticationError" in str(error.__cause__):
                raise InputError(
                    f"The Ray cluster at --address {workers.address} asks for its token: set RAY_AUTH_MODE=token, and the "
                    "token in ~/.ray/auth_token or RAY_AUTH_TOKEN."
                ) from None
            if workers.address is not None:
                raise _no_cluster(workers.address, said) from None
            # A busy machine takes longer than the 30 seconds that Ray allows its own processes.
            if attempt == TRIES - 1:
                raise ServerError(f"Ray did not start on this machine: {said}") from None
    return ray


def _look_for(host: str, port: str, address: str) -> None:
    """Raise InputError where nobody listens, which Ray says late and in many words."""
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise _no_cluster(address, str(error)) from None


def _no_cluster(address: str, said: str) -> InputError:
    return InputError(f"No Ray cluster at --address {address}: start one with `ray start` ({said}).")


def _send_by_value(work: Callable) -> None:
    """An experiment from a file is not there to be imported on other nodes: its module travels."""
    from ray import cloudpickle

    module = sys.modules[work.__module__]
    if work.__module__.split(".")[0] != PACKAGE:
        cloudpickle.register_pickle_by_value(module)


def _cause(error: Any) -> Exception:
    """What was wrong on the worker, as it would have been raised here."""
    cause = error.cause if isinstance(error.cause, Exception) else error
    return cause if isinstance(cause, InputError) else ServerError(f"A worker failed: {cause}")
