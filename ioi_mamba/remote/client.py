"""Jobs on an NDIF server: sent, waited for, tried again, kept; and what went wrong said in one sentence.

A job is one nnsight session whose block calls a function of this package. The package's code travels with it, by
value, so the server needs torch, transformers and nnsight only; the model stays there. What comes back are tensors,
read without unpickling anything else.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import pkgutil
import re
import sys
import time
from collections import ChainMap
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import nnsight
import torch
from nnsight.intervention.backends.local import LocalSimulationBackend
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError
from nnsight.intervention.serialization import CustomCloudPickler
from nnsight.schema.response import ResponseModel, Status
from torch import Tensor

from ioi_mamba.errors import InputError, ServerError, Submitted
from ioi_mamba.files import written_whole

PACKAGE = "ioi_mamba"
IN_A_TRACE = ("mixer", "InputError")
"""What of the package itself, `im`, goes along with a block that mentions it: all that can be used inside a trace."""
_MODULE = CustomCloudPickler.dispatch_table[ModuleType]
"""How nnsight sends any other module."""
MIB = 2**20

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

    def __init__(self, jobs: Jobs, record: dict[str, Any], **options: Any):
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


class Jobs:
    """What `call` sends requests through; `model.jobs` of a model opened with a backend.

    store: a directory in which finished results are kept, so that a run that was cut off sends nothing twice.
    wait: False, with a store, hands a request over and raises `Submitted`; the next run with the same store fetches it.
    records: for each request its work, bytes up and down, and seconds in the queue, running and on the way.
    backend: its name, for the record.
    """

    backend = "ndif"

    def __init__(self, model_key: str, host: str | None):
        self.model_key, self.host = model_key, host
        self.limit()
        self.wait, self.busy = True, False
        self.store: Path | None = None
        self.records: list[dict[str, Any]] = []
        _send_by_value()

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

    def __reduce__(self):
        """None: the model is sent with all that hangs on it, and on the server there is nowhere to send jobs."""
        return type(None), ()

    def send(self, model, work: Callable[..., Any], args: tuple) -> Any:
        """The result of `work(model, *args)` from the server, or from the store.

        Raises ServerError when the server cannot be reached or the job fails there, InputError for what the job itself
        found wrong with its arguments or for a request over the limits, Submitted where it is not waited for.
        """
        if work.__module__.split(".")[0] != PACKAGE:
            nnsight.register(work.__module__)  # an experiment from a file or another package
        key = self._key(work, args)
        kept = self.store / f"{key}.pt" if self.store and key else None
        if kept is not None and kept.is_file():
            return torch.load(kept, weights_only=True)
        record: dict[str, Any] = {"work": f"{work.__module__}.{work.__name__}", "bytes_up": 0, "bytes_down": 0}
        result = self._persist(lambda: self._once(model, work, args, record, kept), record)
        self.records.append(record)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(kept) as path:
                torch.save(result, path)
            kept.with_suffix(".job").unlink(missing_ok=True)
        return result

    @staticmethod
    def forget(store: Path) -> None:
        """Delete the kept results of a directory: those of an analysis whose table is written are not needed again."""
        if store.is_dir():
            for path in [*store.glob("*.pt"), *store.glob("*.job")]:
                path.unlink()
            store.rmdir()

    def _persist(self, once: Callable[[], Any], record: dict[str, Any]) -> Any:
        for attempt in range(self.retries + 1):
            try:
                return once()
            except (RemoteError, OSError, _connection_errors()) as error:
                wrong = _from_the_job(error)
                if wrong is not None:
                    raise wrong from None
                if attempt == self.retries or not _may_pass(error):
                    raise ServerError(in_plain_words(error, self.host)) from None
                record["retries"] = attempt + 1
                time.sleep(min(30, 2**attempt))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _once(self, model, work, args, record: dict[str, Any], kept: Path | None) -> Any:
        ticket = kept.with_suffix(".job") if kept else None
        if ticket is None or (self.wait and not ticket.is_file()):
            courier = _Courier(self, record)
            result = self._session(model, work, args, courier)
            record.update(courier.times())
            return result
        return self._submit_or_fetch(model, work, args, record, ticket)

    def _session(self, model, work, args, backend) -> Any:
        self.busy = True
        try:
            with model.session(backend=backend):
                result = nnsight.save(work(model, *args))
        finally:
            self.busy = False
        return result

    def _submit_or_fetch(self, model, work, args, record: dict[str, Any], ticket: Path) -> Any:
        job = ticket.read_text().strip() if ticket.is_file() else None
        courier = _Courier(self, record, blocking=False, job_id=job)
        if job is None:
            self.busy = True
            try:
                with model.session(backend=courier):
                    result = nnsight.save(work(model, *args))
            finally:
                self.busy = False
            assert courier.job_id is not None
            ticket.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(ticket) as path:
                path.write_text(courier.job_id)
            raise Submitted(courier.job_id)
        try:
            while (saved := courier.poll()) is None:
                if not self.wait:
                    raise Submitted(job)
                time.sleep(0.5)
        except RemoteError:
            ticket.unlink()
            raise
        record.update(courier.times())
        (result,) = saved.values()
        return result

    def _key(self, work: Callable, args: tuple) -> str | None:
        """The name under which a result is kept: the same work of the same code on the same arguments and model."""
        digest = hashlib.sha256()
        try:
            for item in (self.model_key, _code_hash(), work.__module__, work.__qualname__, *args):
                _feed(digest, item)
        except TypeError:
            return None
        return digest.hexdigest()[:24]


class SerializedJobs(Jobs):
    """The same without a server: the job is serialised, its local modules are hidden, and it is run here."""

    backend = "local-serialized"

    def __init__(self, model_key: str):
        super().__init__(model_key, None)

    def _once(self, model, work, args, record: dict[str, Any], kept: Path | None) -> Any:
        return self._session(model, work, args, LocalSimulationBackend(model))


@cache
def _code_hash() -> str:
    digest = hashlib.sha256()
    root = Path(sys.modules[PACKAGE].__file__ or "").parent
    # Each room by itself: from the sources, that of the experiments is a link, which `rglob` from above does not follow.
    rooms = [room for room in root.iterdir() if room.is_dir()]
    for path in sorted([*root.glob("*.py"), *(file for room in rooms for file in room.rglob("*.py"))]):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _feed(digest, item: Any) -> None:
    """Add a value to a hash. Raises TypeError for one that has no content to hash, such as a function."""
    if isinstance(item, Tensor):
        digest.update(f"{item.dtype}{tuple(item.shape)}".encode())
        digest.update(item.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif hasattr(item, "hash"):
        digest.update(item.hash().encode())
    elif item is None or isinstance(item, bool | int | float | str):
        digest.update(f"{type(item).__name__}:{item!r};".encode())
    elif isinstance(item, Mapping):
        for name in sorted(item):
            _feed(digest, name)
            _feed(digest, item[name])
    elif isinstance(item, list | tuple | range):
        digest.update(f"[{len(item)}".encode())
        for one in item:
            _feed(digest, one)
    elif hasattr(item, "__dataclass_fields__"):
        for name in item.__dataclass_fields__:
            _feed(digest, getattr(item, name))
    else:
        raise TypeError(f"{type(item).__name__} has no content to hash")


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
