"""Jobs on an NDIF server: sent, waited for, tried again, kept; and what went wrong said in one sentence.

A job is one nnsight session whose block calls a function of this package. The package's code travels with it, by
value, so the server needs torch, transformers and nnsight only; the model stays there. What comes back are tensors,
read without unpickling anything else.
"""

from __future__ import annotations

import io
import pickle
import pkgutil
import re
import sys
import time
from collections import ChainMap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import nnsight
import torch
from nnsight.intervention.backends.local import LocalSimulationBackend
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError
from nnsight.intervention.serialization import CustomCloudPickler
from nnsight.schema.response import ResponseModel, Status

from ioi_mamba.errors import InputError, ServerError, Submitted
from ioi_mamba.files import written_whole
from ioi_mamba.remote.jobs import Done, Jobs, Progress, in_turn
from ioi_mamba.remote.store import PACKAGE

IN_A_TRACE = ("mixer", "InputError")
"""What of the package itself, `im`, goes along with a block that mentions it: all that can be used inside a trace."""
_MODULE = CustomCloudPickler.dispatch_table[ModuleType]
"""How nnsight sends any other module."""
MIB = 2**20
POLL_SECONDS = 0.5

_TRANSIENT = (
    "submitting request to model deployment",
    "evicted",
    "parent cannot be on a different thread",
    "reconnecting",
    "connection lost",
    "temporarily",
    "503",
    "502",
)
"""In the message of a failure that may be gone a moment later: an actor that restarts, a backend that reconnects."""

_REFUSED = "The server refuses the API key: set it with nnsight.CONFIG.set_default_api_key or NDIF_API_KEY."


class _EnvelopeUnpickler(pickle.Unpickler):
    """Reads what a status message is made of, text, bytes and a status, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == (Status.__module__, Status.__name__):
            return Status
        raise pickle.UnpicklingError(f"the server's message holds {module}.{name}")


_ENVELOPE = SimpleNamespace(Unpickler=_EnvelopeUnpickler, load=None, __name__="envelope")


def _send_by_value() -> None:
    """Have nnsight's serialiser take this package's code along by value.

    The package itself, which a block calls `im`, becomes a namespace of IN_A_TRACE there; docs/remote.md says so.
    """
    # Its rooms one by one: the package itself stays what every serialiser imports by its name.
    for room in pkgutil.iter_modules(sys.modules[PACKAGE].__path__, f"{PACKAGE}."):
        nnsight.register(room.name)
    if _reduced is not CustomCloudPickler.dispatch_table[ModuleType]:
        CustomCloudPickler.dispatch_table = ChainMap({ModuleType: _reduced}, CustomCloudPickler.dispatch_table)


def _reduced(module: ModuleType) -> tuple:
    if module.__name__ == PACKAGE:
        return SimpleNamespace, (), {name: getattr(module, name) for name in IN_A_TRACE}
    return _MODULE(module)


class _Courier(RemoteBackend):
    """nnsight's own client, which also counts bytes and seconds and loads tensors only."""

    def __init__(self, jobs: ServerJobs, record: dict[str, Any], **options: Any):
        super().__init__(jobs.model_key, host=jobs.host, **options)
        self.jobs, self.record, self.seen = jobs, record, {}
        # Two progress displays on one terminal overwrite each other; `study` has its own.
        self.display.enabled = False

    def _serialize(self, tracer) -> bytes:
        blob = super()._serialize(tracer)
        self.record["bytes_up"] += len(blob)
        if len(blob) > self.jobs.max_upload:
            raise InputError(
                f"This request is {len(blob) / MIB:.1f} MiB, more than the {self.jobs.max_upload / MIB:.0f} MiB allowed: "
                "use fewer pairs, or raise --max-upload."
            )
        self.seen["SENT"] = time.monotonic()
        return blob

    def note(self, response: ResponseModel) -> bool:
        self.seen.setdefault(response.status.name, time.monotonic())
        return super().note(response)

    def finalize(self, content: bytes) -> Any:
        self.record["bytes_down"] += len(content)
        if len(content) > self.jobs.max_download:
            raise InputError(
                f"The result is {len(content) / MIB:.1f} MiB, more than the {self.jobs.max_download / MIB:.0f} MiB "
                "allowed: use fewer pairs, or raise --max-download."
            )
        if self.compress:
            content = unpacked(content, 64 * self.jobs.max_download)
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    @staticmethod
    def parse(message: str | bytes) -> ResponseModel:
        if isinstance(message, bytes | bytearray):
            # torch's own safe loader does not read the pickle protocol of these frames.
            return ResponseModel(**torch.load(io.BytesIO(message), weights_only=False, pickle_module=_ENVELOPE))
        return ResponseModel.model_validate_json(message)

    def times(self) -> dict[str, float]:
        """Seconds in the server's queue (with deploying), running, and on the way."""
        now = time.monotonic()
        sent = self.seen.get("SENT", now)
        running, done = self.seen.get("RUNNING", now), self.seen.get("COMPLETED", now)
        received = self.seen.get("RECEIVED", sent)
        return {
            "queue_seconds": max(0.0, running - received),
            "run_seconds": max(0.0, done - running),
            "transfer_seconds": max(0.0, received - sent) + max(0.0, now - done),
        }


class ServerJobs(Jobs):
    """What `call` sends requests through; `model.jobs` of a model opened with a backend.

    wait: False, with a store, hands requests over and raises `Submitted`; the next run with the same store fetches them.
    in_flight: how many requests may be at the server at a time. With one, work that cuts itself into chunks is cut up
    there and is one request; with more, each chunk is a request of its own.
    records: for each request its work, bytes up and down, and seconds in the queue, running and on the way.
    backend: its name, for the record.
    """

    backend = "ndif"
    here = False

    def __init__(self, model_key: str, host: str | None):
        super().__init__()
        self.model_key, self.host = model_key, host
        self.limit()
        self.wait, self.in_flight = True, 1
        _send_by_value()

    @property
    def plans_here(self) -> bool:
        return self.in_flight > 1

    def limit(self, max_upload_mib: float = 64, max_download_mib: float = 256, retries: int = 5) -> None:
        """Set how large a request and a result may be, and how often a request is tried again.

        Each further try comes after twice the wait. Raises InputError for what is not positive.
        """
        if not (max_upload_mib > 0 and max_download_mib > 0 and retries >= 0):
            raise InputError(
                f"--max-upload {max_upload_mib} and --max-download {max_download_mib} must be positive, "
                f"--retries {retries} not negative."
            )
        self.max_upload, self.max_download = int(max_upload_mib * MIB), int(max_download_mib * MIB)
        self.retries = retries

    def one(self, model, work: Callable[..., Any], args: tuple, progress: Progress | None = None) -> Any:
        """The result of `work(model, *args)` from the server, or from the store.

        Raises ServerError when the server cannot be reached or the job fails there, InputError for what the job itself
        found wrong with its arguments or for a request over the limits, Submitted where it is not waited for.
        """
        key = self.store.key(work, args) if self.store else None
        kept = self.store.get(key) if self.store else None
        if kept is not None:
            return kept
        request = _Request(self, work, args, self.store.ticket(key) if self.store and key else None)
        result = request.result(model)
        if self.store:
            self.store.put(key, result)
        return result

    def compute(self, model, work: Callable[..., Any], chunks, keys, under_way) -> Done:
        """Each chunk as a request of its own, so many at a time; with one in flight, all of them as one request."""
        if not chunks:
            return
        if not self.plans_here:
            yield from zip(chunks, self.one(model, in_turn, (work, list(chunks.values()))), strict=True)
            return
        waiting = {
            k: _Request(self, work, chunk, self.store.ticket(key) if self.store and (key := keys[k]) else None)
            for k, chunk in chunks.items()
        }
        submitted = []
        while waiting:
            for k in list(waiting)[: self.in_flight if self.wait else None]:
                result = waiting[k].step(model)
                if result is not None:
                    del waiting[k]
                    yield k, result
                elif not self.wait:
                    submitted.append(waiting.pop(k).job)
            if waiting:
                time.sleep(POLL_SECONDS)
        if submitted:
            raise Submitted(", ".join(submitted))

    def sent(self, model, work: Callable[..., Any], args: tuple, backend) -> Any:
        """What is saved by a session, on that backend, whose block is the work; None where it is not waited for."""
        if work.__module__.split(".")[0] != PACKAGE:
            nnsight.register(work.__module__)  # an experiment from a file or another package
        result = None
        with self.at_work(), model.session(backend=backend):
            result = nnsight.save(work(model, *args))
        return result


class _Request:
    """A piece of work on its way to a server and back, tried again after failures that may pass.

    ticket: a file for the id of a request that is not waited for in one go, so that another process can fetch it.
    """

    def __init__(self, jobs: ServerJobs, work: Callable[..., Any], args: tuple, ticket: Path | None):
        self.jobs, self.work, self.args, self.ticket = jobs, work, args, ticket
        self.record: dict[str, Any] = {"work": f"{work.__module__}.{work.__name__}", "bytes_up": 0, "bytes_down": 0}
        self.attempt, self.not_before = 0, 0.0
        self._courier: _Courier | None = None

    @property
    def job(self) -> str:
        """The server's id of it."""
        assert self._courier is not None
        assert self._courier.job_id is not None
        return self._courier.job_id

    def result(self, model) -> Any:
        """What the server gives, waited for unless requests are handed over: then `Submitted` is raised."""
        jobs = self.jobs
        while True:
            if self.ticket is not None and (not jobs.wait or self.ticket.is_file()):
                result = self.step(model)
                if result is None and not jobs.wait:
                    raise Submitted(self.job)
            else:
                result = self._tried(lambda: self._waited_for(model))
            if result is not None:
                return result
            time.sleep(max(POLL_SECONDS, self.not_before - time.monotonic()))

    def _waited_for(self, model) -> Any:
        courier = None if self.jobs.host is None else _Courier(self.jobs, self.record)
        result = self.jobs.sent(model, self.work, self.args, courier or LocalSimulationBackend(model))
        if courier is not None:
            self.record.update(courier.times())
        self.jobs.records.append(self.record)
        return result

    def step(self, model) -> Any:
        """Hand it over where it is not at the server, else ask for its result; None while there is none."""
        return None if time.monotonic() < self.not_before else self._tried(lambda: self._handed_over_or_fetched(model))

    def _handed_over_or_fetched(self, model) -> Any:
        if self._courier is None:
            known = self.ticket is not None and self.ticket.is_file()
            job = self.ticket.read_text().strip() if self.ticket is not None and known else None
            self._courier = courier = _Courier(self.jobs, self.record, blocking=False, job_id=job)
            if job is None:
                self.jobs.sent(model, self.work, self.args, courier)
                if self.ticket is not None:
                    self.ticket.parent.mkdir(parents=True, exist_ok=True)
                    with written_whole(self.ticket) as path:
                        path.write_text(self.job)
                return None
        saved = self._courier.poll()
        if saved is None:
            return None
        self.record.update(self._courier.times())
        self.jobs.records.append(self.record)
        (result,) = saved.values()
        return result

    def _tried(self, once: Callable[[], Any]) -> Any:
        """What `once` gives; None after a failure that may pass, and then it is not tried again before a while."""
        try:
            return once()
        except (RemoteError, OSError, _connection_errors()) as error:
            if isinstance(error, RemoteError) and self.ticket is not None:
                self.ticket.unlink(missing_ok=True)
            self._courier = None
            wrong = _from_the_job(error)
            if wrong is not None:
                raise wrong from None
            if self.attempt == self.jobs.retries or not _may_pass(error):
                raise ServerError(in_plain_words(error, self.jobs.host)) from None
            self.not_before = time.monotonic() + min(30, 2**self.attempt)
            self.attempt += 1
            self.record["retries"] = self.attempt
            return None


class SerializedJobs(ServerJobs):
    """The same without a server: the job is serialised, its local modules are hidden, and it is run here."""

    backend = "local-serialized"

    def __init__(self, model_key: str):
        super().__init__(model_key, None)


def _connection_errors() -> type[Exception]:
    import websocket

    return websocket.WebSocketException


def _may_pass(error: Exception) -> bool:
    text = str(error).lower()
    if isinstance(error, RemoteError) and not text.startswith("failed to send"):
        return any(_says(text, sign) for sign in _TRANSIENT)
    return "invalid host" not in text and "below the minimum" not in text


def _says(text: str, sign: str) -> bool:
    """Whether the sign stands in the text; a status code as a number of its own, not inside a port or a hash."""
    return re.search(rf"(?<![\w.]){sign}(?!\w)", text) is not None if sign.isdigit() else sign in text


def _from_the_job(error: Exception) -> InputError | None:
    """What the job itself found wrong: the type of an exception is lost on the way, its name and text are not."""
    for line in reversed(str(error).splitlines()):
        name, _, message = line.partition("InputError: ")
        if message and " " not in name:
            return InputError(without_secrets(message))
    return None


def in_plain_words(error: Exception, host: str | None) -> str:
    """One sentence, or two: what happened on the way to the server or there, and what to do."""
    text = without_secrets(str(error)).strip()
    last = text.splitlines()[-1] if text else type(error).__name__
    where = without_secrets(host or nnsight.CONFIG.API.HOST)
    if "backward" in text or "OutOfOrderError" in text or "autograd" in text:
        return (
            "This server gives no gradients (it runs requests in a sandbox): use a method without them, such as exact."
        )
    for sign, sentence in (
        (
            "Could not deploy",
            "The server at {host} cannot deploy this model: check its id, or ask what is deployed there.",
        ),
        ("architecture on this server", "The server holds another version of this model: {last}"),
        ("below the minimum", "The server refuses this client: {last}"),
        ("execution timeout", "The server stopped the job: {last} Use fewer pairs."),
        (
            "evicted",
            "The model was taken off the server while it worked, again and again: run the same again with --resume.",
        ),
        ("could not be read", "The server could not read the request: {last}"),
        ("out of memory", "The server ran out of memory: use fewer pairs or fewer rows in a pass."),
        (
            "submitting request",
            "The model's process on the server ended while it worked, again and again: run the same again with --resume, or with fewer pairs.",
        ),
        *((code, _REFUSED) for code in ("401", "403")),
    ):
        if _says(text, sign):
            return sentence.format(host=where, last=last)
    if not isinstance(error, RemoteError) or text.startswith("Failed to send"):
        return f"No answer from the server at {where} ({last}): check --host and that it runs, then run the same again with --resume."
    return f"The job failed on the server: {last}"


def unpacked(content: bytes, limit: int) -> bytes:
    """What zstandard packed; InputError, before more is unpacked, for more than `limit` bytes."""
    import zstandard

    # In `decompress` a size that the content itself states goes before any limit.
    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content), read_across_frames=True) as stream:
        found = stream.read(limit + 1)
    if len(found) > limit:
        raise InputError(
            f"The result is more than {limit / MIB:.0f} MiB unpacked: use fewer pairs, or raise --max-download."
        )
    return found


def without_secrets(text: str) -> str:
    """The text with the API key, which a server may have said back to us, and what stands before @ in addresses masked."""
    text = re.sub(r"//[^/@\s]+@", "//***@", text)
    return text.replace(nnsight.CONFIG.API.APIKEY, "***") if nnsight.CONFIG.API.APIKEY else text


def host_of(host: str | None) -> str:
    """The server's address: as given, else nnsight's own setting. Raises InputError where it is no web address."""
    host = (host or nnsight.CONFIG.API.HOST).rstrip("/")
    if not host.startswith(("http://", "https://")):
        raise InputError(f"--host {without_secrets(host)!r} is no web address: begin it with http:// or https://.")
    return host
