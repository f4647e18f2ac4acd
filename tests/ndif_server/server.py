"""One NDIF server: redis, an S3 stand-in (moto), Ray, ndif's controller and its API, all on loopback."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from . import processes
from .install import Unavailable, environment, redis_server

Part = Literal["api", "object store", "model", "everything"]

_BUCKET = "ndif-results"
_GLUE = Path(__file__).parent / "glue"
_PORT_NAMES = ("redis", "object store", "ray", "ray client", "ray dashboard", "ray agent", "api")


class ServerFailed(RuntimeError):
    """A part of the server did not come up; the message names its log."""


class Server:
    """A server that belongs to the process that made it, and ends with it.

    directory: takes the logs (`logs/`, `ray/session_latest/logs/`), which stay there; one server a directory.
    sandboxed: run every request in a process of its own, as a hosted service does for users it does not trust.
    execution_timeout: seconds a job may run; takes effect when the server is started or `restart("everything")`.
    Use it as a context manager, or call `start` and `stop`. The ports are free ones and stay the same over restarts.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        sandboxed: bool = False,
        execution_timeout: float = 300.0,
        dtype: str = "float32",
    ):
        self.directory = Path(directory).resolve()
        self.sandboxed = sandboxed
        self.execution_timeout = execution_timeout
        self.dtype = dtype
        self._ports = processes.free_ports(_PORT_NAMES)
        self._daemons: dict[str, subprocess.Popen] = {}
        self._guard: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        """The host a client sets: scheme, address and port."""
        return f"http://127.0.0.1:{self._ports['api']}"

    @property
    def logs(self) -> Path:
        """The directory with a log a part; Ray's own lie in `ray/session_latest/logs` beside it."""
        return self.directory / "logs"

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self, *, guarded: bool = True) -> None:
        """Bring every part up and return when the API is connected to Ray (30 to 50 s on two cores).

        guarded: stop the server when this process ends without `stop`, by whatever signal.
        Raises Unavailable (no redis-server, no Python, installation failed, the directory is in use) and ServerFailed.
        """
        if not Path("/proc/self/environ").exists():
            raise Unavailable("The test server finds its processes through /proc: run it on Linux.")
        if processes.found(self.directory):
            raise Unavailable(f"A server of {self.directory} is running: stop it, or use another directory.")
        redis = redis_server()
        self._bin = environment() / "bin"
        for name in ("logs", "ray", "empty", "hf"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        link = processes.short_name(self.directory)
        link.unlink(missing_ok=True)
        link.symlink_to(self.directory)
        if guarded and self._guard is None:
            self._guard = processes.start_guard(self.directory)
        try:
            self._start_redis(redis)
            self._start_object_store()
            self._start_ray(link / "ray")
            self._start_api()
        except BaseException:
            self.stop()
            raise
        (self.directory / "server.json").write_text(
            json.dumps({"url": self.url, "ports": self._ports}, indent=1) + "\n"
        )

    def stop(self) -> None:
        """Stop every process of this server, and nothing else. Raises processes.StillRunning if one survives."""
        self._kill_everything()
        if self._guard is not None:
            self._guard.communicate()  # closes its standard input, and waits for it
            self._guard = None

    def running(self) -> dict[int, list[str]]:
        """Every living process of this server: process id -> command line."""
        return processes.found(self.directory)

    def model_actors(self) -> set[int]:
        """The process ids of the deployed models' actors."""
        return {
            pid for pid, words in self.running().items() if words[0].startswith("ray::") and "ModelActor" in words[0]
        }

    def kill(self, part: Part) -> None:
        """End a part as a crash would, with SIGKILL. Ray itself starts a killed model actor again."""
        if part == "everything":
            self._kill_everything()
        elif part == "model":
            actors = self.model_actors()
            if not actors:
                raise ServerFailed("No model is deployed: send a trace first.")
            processes.end(lambda: actors & self.model_actors())
        else:
            daemon = self._daemons.pop(part)
            processes.end(lambda: [pid for pid in self.running() if _group(pid) == daemon.pid])
            daemon.wait()

    def restart(self, part: Part) -> None:
        """Kill a part if it runs, start it again with its port, and return when it serves.

        A model actor counts as serving when its process is there; it takes requests from then on and loads the weights
        meanwhile. The object store comes back empty.
        """
        if part == "everything":
            self._kill_everything()
            self.start(guarded=self._guard is not None)
        elif part == "model":
            if self.model_actors():
                self.kill("model")
            if not processes.wait_for(lambda: bool(self.model_actors()), 120):
                raise ServerFailed(f"Ray started no model actor within 120 s: see {self.directory / 'ray'}.")
        else:
            if part in self._daemons:
                self.kill(part)
            if part == "api":
                self._start_api()
            else:
                self._start_object_store()

    def _start_redis(self, program: str) -> None:
        port = self._ports["redis"]
        nothing_kept = ["--save", "", "--appendonly", "no", "--dir", str(self.directory / "empty")]
        # Its title would be written over the environment by which its process is found.
        title = ["--set-proc-title", "no"]
        self._start_daemon("redis", [program, "--bind", "127.0.0.1", "--port", str(port), *nothing_kept, *title])
        self._wait("redis", lambda: self._redis("PING") == b"+PONG")

    def _start_object_store(self) -> None:
        port = self._ports["object store"]
        program = str(self._bin / "moto_server")
        self._start_daemon("object store", [program, "-H", "127.0.0.1", "-p", str(port)])
        # moto forgets everything when it stops, and a model actor makes the bucket only once in its life.
        self._wait("object store", lambda: _answers(f"http://127.0.0.1:{port}/{_BUCKET}", method="PUT"))

    def _start_ray(self, temporary: Path) -> None:
        ports = self._ports
        resources = {"head": 10, "cuda_memory_bytes": 8 * 10**9, "cpu_memory_bytes": 8 * 10**9}
        head = [
            *("start", "--head", "--node-ip-address=127.0.0.1", f"--port={ports['ray']}"),
            f"--ray-client-server-port={ports['ray client']}",
            *("--min-worker-port=0", "--max-worker-port=0", "--num-cpus=8"),
            "--num-gpus=1",  # ndif places a model on a GPU's memory; the actor here loads it on the CPU
            f"--resources={json.dumps(resources)}",
            *("--object-store-memory=200000000", "--disable-usage-stats", "--include-dashboard=true"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={ports['ray dashboard']}"),
            *(f"--dashboard-agent-listen-port={ports['ray agent']}", f"--temp-dir={temporary}"),
        ]
        self._run("ray", [str(self._bin / "ray"), *head])
        launcher = "ndif.services.ray.deployments.controller.controller"
        address = {"RAY_ADDRESS": f"127.0.0.1:{ports['ray']}"}
        self._run("controller", [str(self._bin / "python"), "-m", launcher], address)

    def _start_api(self) -> None:
        # Left standing by an API that was killed, it would make the new one look connected too early.
        self._redis("DEL ray:connected")
        bind = ["--bind", f"127.0.0.1:{self._ports['api']}"]
        config = ["--config", "python:ndif.services.api.gunicorn_conf"]
        self._start_daemon("api", [str(self._bin / "gunicorn"), *config, *bind, "ndif.services.api.app:app"])
        self._wait("api", lambda: _answers(f"{self.url}/connected"), seconds=300)

    def _environment(self) -> dict[str, str]:
        """Of the caller's environment only what any program needs: no API key, no proxy, no Python path."""
        ports = self._ports
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "LC_ALL", "TZ") if name in os.environ}
        actor = "SandboxedModelActor" if self.sandboxed else "TrustedModelActor"
        return {
            **kept,
            processes.MARK: str(self.directory),
            "PATH": f"{self._bin}:{os.environ['PATH']}",
            "PYTHONPATH": str(_GLUE),  # this and the installed packages are all the server can import
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",  # one thread on each side gives equal bits
            "HF_HOME": str(self.directory / "hf"),
            "HF_HUB_OFFLINE": "1",
            "USE_HUB_KERNELS": "0",
            "TOKENIZERS_PARALLELISM": "false",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else Ray puts the machine's address in place of 127.0.0.1
            # Else Ray asks for a token where the user's home has one, and ndif sends none.
            "RAY_AUTH_MODE": "disabled",
            "GRPC_ENABLE_FORK_SUPPORT": "0",  # as in ndif's own start script: else Ray's client server dies at times
            "NDIF_REDIS_URL": f"redis://127.0.0.1:{ports['redis']}",
            "NDIF_OBJECT_STORE_URL": f"http://127.0.0.1:{ports['object store']}",
            "NDIF_OBJECT_STORE_BUCKET": _BUCKET,
            "NDIF_RAY_ADDRESS": f"ray://127.0.0.1:{ports['ray client']}",
            "NDIF_API_PORT": str(ports["api"]),
            "NDIF_CONTROLLER_IMPORT_PATH": "ndif_on_cpu.Controller",
            "NDIF_DEFAULT_MODEL_ACTOR_CLASS": f"ndif_on_cpu.{actor}",
            "NDIF_DEFAULT_DTYPE": self.dtype,
            "NDIF_DEFAULT_PADDING_BIAS": "0",
            "NDIF_DEFAULT_EXECUTION_TIMEOUT_SECONDS": str(self.execution_timeout),
            "NDIF_MINIMUM_DEPLOYMENT_TIME_SECONDS": "0",
            "NDIF_AUTOSCALING_MAX_REPLICAS": "1",
            "NDIF_SANDBOX_POOL_SIZE": "1",
        }

    def _start_daemon(self, part: str, command: list[str]) -> None:
        with self._log(part).open("ab") as log:
            self._daemons[part] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                cwd=self.directory / "empty",  # nothing importable lies there
                start_new_session=True,
            )

    def _run(self, part: str, command: list[str], more: dict[str, str] | None = None) -> None:
        """A command that ends by itself, leaving its daemons."""
        with self._log(part).open("ab") as log:
            ended = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment() | (more or {}),
                cwd=self.directory / "empty",
                start_new_session=True,
            )
        if ended.returncode:
            raise ServerFailed(f"The {part} did not start (exit code {ended.returncode}): see {self._log(part)}.")

    def _wait(self, part: str, condition: Callable[[], bool], seconds: float = 120) -> None:
        daemon = self._daemons[part]
        processes.wait_for(lambda: condition() or daemon.poll() is not None, seconds)
        if daemon.poll() is not None or not condition():
            raise ServerFailed(f"The {part} did not come up within {seconds:.0f} s: see {self._log(part)}.")

    def _log(self, part: str) -> Path:
        return self.logs / f"{part.replace(' ', '-')}.log"

    def _redis(self, command: str) -> bytes:
        """One inline command; its answer without the line end, empty while redis does not listen."""
        try:
            with socket.create_connection(("127.0.0.1", self._ports["redis"]), timeout=5) as connection:
                connection.sendall(f"{command}\r\n".encode())
                return connection.recv(1024).strip()
        except OSError:
            return b""

    def _kill_everything(self) -> None:
        processes.stop_all(self.directory)
        for daemon in self._daemons.values():
            daemon.wait()
        self._daemons.clear()


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def _answers(url: str, method: str = "GET") -> bool:
    """Whether a request is answered with success."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=5):
            return True
    except (urllib.error.URLError, OSError, http.client.HTTPException):
        return False
