"""Other systems than this one: what of them is asked for at import; and the lock of this one."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
IMPORT_ALL = """
import sys

class NotThere:
    def find_spec(self, name, path=None, target=None):
        if name in {"fcntl", "resource", "termios", "pwd", "grp"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

import torch, nnsight, pandas, altair, vl_convert, transformers.models.mamba.modeling_mamba  # theirs is their own to guard
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, NotThere())

import importlib, pkgutil
import ioi_mamba
for module in pkgutil.walk_packages(ioi_mamba.__path__, "ioi_mamba."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
assert not {"fcntl", "resource"} & set(sys.modules)
from ioi_mamba.results import lock
from ioi_mamba.study import runs
assert lock.fcntl is None and runs.resource is None
print(sum(name.split(".")[0] == "ioi_mamba" for name in sys.modules))
"""


def test_every_module_is_imported_without_what_windows_has_not():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= len([*ROOT.glob("ioi_mamba/*.py"), *ROOT.glob("ioi_mamba/*/*.py")]) - 1


def test_the_lock_has_every_direct_dependency_in_a_release_that_the_project_allows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["dev"], *extras["docs"]]
    wanted = [each for each in map(Requirement, lines) if each.name != "ioi-mamba"]
    locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert [each.name for each in wanted if not each.specifier.contains(locked.get(each.name, "0"))] == []
    assert {"pip", "hatchling", "editables"} <= set(locked)


def test_the_lock_is_of_no_single_build_or_index():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line)] == []
