"""The processes of one server: found by a mark in their environment, and stopped without touching any other.

Run as a script (`processes.py DIR`) this is the guard: it waits for the end of its standard input, which comes when the
process that started it is gone, however that ended, and then stops the server of DIR. Needs Linux's /proc.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

MARK = "IOI_MAMBA_NDIF_SERVER"
# Below the range from which the kernel takes the ports of outgoing connections, and above Ray's own 10002-23999.
_PORTS = range(24000, 32000)
_RUNNER = "ndif.services.ray.sandbox.runner"


class StillRunning(RuntimeError):
    """Processes of a server that could not be stopped."""


def found(directory: Path) -> dict[int, list[str]]:
    """Every living process of the server of `directory`: process id -> command line."""
    wanted = f"{MARK}={directory.resolve()}".encode()
    processes = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                words = (entry / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
                processes[int(entry.name)] = words
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # ended meanwhile, or another user's
    return processes


def alive(pid: int) -> bool:
    """Whether a process exists and has not ended (one that ended stays in /proc until its parent asks for it)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def end(chosen: Callable[[], Collection[int]], patience: float = 20.0) -> None:
    """SIGKILL the chosen processes until none is left: one may start another while it dies.

    Raises StillRunning if one is alive after `patience` seconds.
    """
    limit = time.monotonic() + patience
    ours: set[int] = set()
    # A dying process loses its environment, and with it the mark, some time before it closes its ports.
    while pids := set(chosen()) | {pid for pid in ours if alive(pid)}:
        if time.monotonic() > limit:
            raise StillRunning(f"The processes {sorted(pids)} are still running after {patience:.0f} s.")
        ours |= pids
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def stop_all(directory: Path) -> None:
    """Kill every process of the server of `directory` and remove what they left outside it. Raises StillRunning."""
    sockets: set[str] = set()

    def living() -> dict[int, list[str]]:
        processes = found(directory)
        # A sandbox runner's socket lies in /tmp, and a killed runner cannot remove it.
        sockets.update(words[words.index(_RUNNER) + 1] for words in processes.values() if _RUNNER in words[:-1])
        return processes

    end(living)
    for path in sockets:
        Path(path).unlink(missing_ok=True)
    short_name(directory).unlink(missing_ok=True)


def short_name(directory: Path) -> Path:
    """A short link to a directory: the path of a Unix socket has at most 107 bytes, and Ray adds some 60 of its own."""
    return Path("/tmp") / f"ndif-{hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:10]}"


def free_ports(names: Iterable[str]) -> dict[str, int]:
    """A free loopback port for every name."""
    ports: dict[str, int] = {}
    candidates = iter(random.sample(_PORTS, len(_PORTS)))
    for name in names:
        ports[name] = next(port for port in candidates if _is_free(port))
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Ask every quarter of a second; whether it came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.25)
    return True


def start_guard(directory: Path) -> subprocess.Popen:
    """A process that stops the server of `directory` when this process ends without having done so."""
    return subprocess.Popen(
        [sys.executable, __file__, str(directory)],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C in the terminal is not for it
    )


if __name__ == "__main__":
    sys.stdin.buffer.read()
    stop_all(Path(sys.argv[1]))
