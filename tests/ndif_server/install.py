"""What the server needs from the machine: redis-server, Python 3.12 or 3.13, and a virtual environment made once."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PYTHONS = ("3.12", "3.13")  # those ndif 0.1.2 runs on
CACHE_VARIABLE = "IOI_MAMBA_NDIF_CACHE"
# The same release on both sides: rounding differs between releases of torch, module trees between those of the others.
_SHARED = ("torch", "nnsight", "transformers")


class Unavailable(Exception):
    """The server cannot run on this machine; the message is one sentence with the reason."""


def redis_server() -> str:
    """The path of redis-server. Raises Unavailable where it is not installed."""
    path = shutil.which("redis-server")
    if path is None:
        raise Unavailable("redis-server is not installed: install it, for example with `apt-get install redis-server`.")
    return path


def find_python() -> Path:
    """A Python 3.12 or 3.13 that can make virtual environments: this one, one on PATH, or one of pyenv's.

    Raises Unavailable if there is none.
    """
    for version in PYTHONS:
        for candidate in _candidates(version):
            program = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
            asked = subprocess.run([candidate, "-c", program], capture_output=True, text=True)
            # A pyenv shim is on PATH even where its version is not selected; it then exits with 127.
            if asked.returncode == 0 and asked.stdout.strip() == version:
                return candidate
    raise Unavailable(
        f"ndif needs Python {' or '.join(PYTHONS)}, found neither on PATH nor among pyenv's versions: install one."
    )


def _candidates(version: str) -> Iterator[Path]:
    if version == f"{sys.version_info[0]}.{sys.version_info[1]}":
        yield Path(sys.executable)
    on_path = shutil.which(f"python{version}")
    if on_path is not None:
        yield Path(on_path)
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}"))


def requirements() -> list[str]:
    """What is installed beside the server, at the client's own releases."""
    pinned = [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in _SHARED]
    return [*pinned, "ndif[api,ray]==0.1.2", "moto[server,s3]>=5.2,<6"]


def environment() -> Path:
    """The directory of the server's virtual environment; made on the first call, which takes minutes.

    It lies in the directory that IOI_MAMBA_NDIF_CACHE names, by default `ioi-mamba` in the user's cache directory.
    pip's own settings decide from where: torch's ordinary build is the CUDA one (5.5 GB), which runs on a CPU too.
    Raises Unavailable if there is no suitable Python or the installation fails.
    """
    python = find_python()
    wanted = requirements()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ioi-mamba"
    cache = Path(os.environ.get(CACHE_VARIABLE) or cache).expanduser().resolve()
    cache.mkdir(parents=True, exist_ok=True)
    venv = cache / "-".join(["ndif", *(item.replace("==", "-") for item in wanted[: len(_SHARED)])])
    complete = venv / "requirements.txt"
    with _locked(cache / f"{venv.name}.lock"):
        if complete.is_file() and complete.read_text().split() == wanted:
            return venv
        log = cache / f"{venv.name}.log"
        shutil.rmtree(venv, ignore_errors=True)
        with log.open("w") as out:
            for command in (
                [python, "-m", "venv", venv],
                [venv / "bin/python", "-m", "pip", "install", "--progress-bar=off", *wanted],
            ):
                if subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL).returncode:
                    raise Unavailable(f"The server's packages could not be installed: see {log}.")
        complete.write_text("\n".join(wanted) + "\n")
    return venv


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One installation at a time; a second process waits for the first."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
