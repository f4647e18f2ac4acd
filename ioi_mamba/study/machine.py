"""By what a table was made, for its manifest: the command, the code, the machine."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

from ioi_mamba.remote.client import without_secrets
from ioi_mamba.versions import requirements, version, versions

PACKAGE = Path(__file__).parents[1]


def about() -> dict[str, Any]:
    """command: the command line, without keys that stand in addresses; commit: of the code; machine: its CPU and GPUs."""
    return {
        "command": without_secrets(shlex.join(sys.argv)),
        "commit": commit(),
        "machine": {
            "cpu": cpu(),
            "cores": psutil.cpu_count(logical=False),
            "memory_mib": round(psutil.virtual_memory().total / 2**20),
            "gpus": [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())],
        },
    }


def all_versions() -> dict[str, str]:
    """The versions of Python and of every package that a run asks for."""
    return versions() | {wanted.name: version(wanted.name) or "not installed" for wanted in requirements()}


@cache
def commit() -> str | None:
    """The git commit of the code that runs, with "+changes" where files of the package differ from it; None if unknown.

    Of a package that pip fetched from git as pip noted it down, of a checkout as git says.
    """
    try:
        noted = importlib.metadata.distribution("ioi-mamba").read_text("direct_url.json")
        found = json.loads(noted or "{}").get("vcs_info", {}).get("commit_id")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        found = None
    if found is not None:
        return found
    head = _git("rev-parse", "HEAD")
    if head is None or _git("ls-files", "--error-unmatch", "files.py") is None:
        return None  # installed below a repository of something else
    return head + ("+changes" if _git("status", "--porcelain", "--", ".") else "")


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(PACKAGE), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def cpu() -> str:
    """The processor's model as the system names it."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = [
            line.partition(":")[2].strip() for line in information.read_text().splitlines() if "model name" in line
        ]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
