"""constraints.txt anew: the newest release allowed of everything that the commands of README.md, CI and docs install.

`make lock` calls it; it needs Python 3.11 and a package index, and nothing that the old file may have broken. With
`--check` (.ci/run) it holds the environment it runs in against the file instead. Pip reads the file by `-c`. It has
neither hashes nor local version parts (the "+cpu" of torch), which would tie it to one build.
"""

import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "constraints.txt"
# Beside the project and its development tools: pip, and what builds the project.
WANTED = [f"{ROOT}[dev]", "pip", "hatchling", "editables"]
HEADER = """\
# Written by `make lock` with Python {python} on {system}: the releases that `make`, .ci/run and `nox` install, by `pip -c`.
# The CUDA libraries of a torch built for a GPU are not here: torch bounds them itself.
"""


def newest():
    """Name -> version of everything that `WANTED` would install into an empty environment."""
    with tempfile.TemporaryDirectory() as place:
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        pip = [f"{place}/bin/python", "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "--upgrade", "pip"], check=True)
        report = Path(place) / "report.json"
        subprocess.run([*pip, "--dry-run", "--ignore-installed", "--report", report, *WANTED], check=True)
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return {_key(item["name"]): item["version"].split("+")[0] for item in found if item["name"] != "ioi-mamba"}


def unlocked():
    """The distributions of this environment that the file does not have, or has in another release."""
    locked = dict(line.split("==") for line in LOCK.read_text().split() if "==" in line)
    here = {_key(each.name): each.version.split("+")[0] for each in importlib.metadata.distributions()}
    # A torch built for a GPU brings these, within its own bounds; and venv its own setuptools.
    theirs = ("ioi-mamba", "setuptools", "nvidia-", "cuda-", "triton")
    return {f"{name}=={version}" for name, version in here.items() if not name.startswith(theirs)} - {
        f"{_key(name)}=={version}" for name, version in locked.items()
    }


def _key(name):
    return name.lower().replace("_", "-").replace(".", "-")


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        others = sorted(unlocked())
        sys.exit(f"Not as constraints.txt has it: {', '.join(others)}. Run `make lock`." if others else 0)
    header = HEADER.format(python=platform.python_version(), system=platform.system())
    LOCK.write_text(header + "".join(f"{name}=={version}\n" for name, version in sorted(newest().items())))
