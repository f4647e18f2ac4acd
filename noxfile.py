"""The versions that pyproject.toml allows, and newer ones, tested: `nox` and `nox -s newest`.

`nox` tests the least and the newest that are allowed and writes docs/compatibility.md; `nox -s newest` tries the newest
releases of all, allowed or not; `nox -s lock` tests constraints.txt in an environment that has nothing else.

One environment of its own whose packages are changed from set to set; what was installed and what came of it is read
from there. Of torch each set has the newest that is allowed: an older one would be downloaded anew for every set.
"""

import json
import re
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PAGE = ROOT / "docs/compatibility.md"
BEGIN, END = "<!-- begin: written by noxfile.py -->", "<!-- end -->"
# What holds in every family, sites and edits against a plain reference, passes resumed midway, gradients, opening, tables and pages.
FILES = [
    "contract",
    "sites",
    "models",
    "interventions",
    "mixer",
    "sweep",
    "attribution",
    "circuit_analyses",
    "report",
    "study",
]
SHOWN = ["torch", "nnsight", "transformers", "tokenizers", "safetensors", "pandas", "pyarrow", "altair"]
SHOWN += ["vl-convert-python", "jinja2", "tqdm", "numpy"]
VERSIONS = (
    "import importlib.metadata, json, platform, sys; "
    "print(json.dumps({'python': platform.python_version()} | {p: importlib.metadata.version(p) for p in sys.argv[1:]}))"
)

LOCK = ("--constraint", str(ROOT / "constraints.txt"))

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["compatibility"]
nox.options.reuse_existing_virtualenvs = True


def project():
    """What pyproject.toml says of the project."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def bounds():
    """Package -> (the least version, the whole requirement), as pyproject.toml has them."""
    lines = project()["dependencies"]
    return {name: (least, f"{name}>={least}{rest}") for name, least, rest in (_parts(line) for line in lines)}


def _parts(requirement):
    return re.fullmatch(r"([\w-]+)>=([\d.]+)(.*)", requirement).groups()


def sets():
    """Name -> requirements: the least of all, the newest of all, and each of nnsight and transformers alone at its least."""
    newest = {name: requirement for name, (_, requirement) in bounds().items()}
    # "0.8" is the release 0.8.0, and so for every floor.
    least = newest | {name: f"{name}=={version}" for name, (version, _) in bounds().items() if name != "torch"}
    alone = {name: newest | {name: least[name]} for name in ("nnsight", "transformers")}
    found = {"the least of every package": least}
    found |= {f"the least {name}, else the newest": packages for name, packages in alone.items()}
    return found | {"the newest of every package": newest}


@nox.session
def newest(session):
    """Try the newest release of everything, without the lock and without upper ends: what fails says what to mend or to bound.

    Nothing here is promised: a release may have come out since pyproject.toml was written.
    """
    names = list(bounds())
    extras = project()["optional-dependencies"]
    lines = [line for line in (*extras["dev"], *extras["docs"]) if not line.startswith("ioi-mamba")]
    tools = [re.match(r"[\w-]+(\[\w+\])?", line)[0] for line in lines]
    session.install("--upgrade", "--upgrade-strategy", "eager", *names, *tools)
    session.install("--no-deps", "--editable", ".")
    # Names the releases that pyproject.toml does not allow yet.
    session.run("ioi-mamba", "doctor", success_codes=[0, 1])
    session.run("python", "-m", "pytest", "-p", "no:cacheprovider", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def lock(session):
    """Install what constraints.txt says and nothing else, and run the tests: what `make test` does, apart from .venv."""
    session.install(*LOCK, "--build-constraint", str(ROOT / "constraints.txt"), "--editable", ".[dev]")
    session.run("python", "-m", "pip", "check")
    session.run("ioi-mamba", "doctor")
    session.run("python", "-m", "pytest", "-p", "no:cacheprovider", *session.posargs)


@nox.session
def compatibility(session):
    """Test every set of versions; a set that fails is told in the page, and fails the session in the end."""
    session.install("pytest", "hypothesis", "websocket-client")
    rows, failed = [], []
    for name, packages in sets().items():
        session.install("--upgrade", "--upgrade-strategy", "eager", *packages.values())
        session.run("python", "-m", "pip", "check")
        versions = json.loads(session.run("python", "-c", VERSIONS, *SHOWN, silent=True))
        result = Path(session.create_tmp()) / "result.xml"
        tests = [str(path) for each in FILES for path in ROOT.glob(f"tests/*/test_{each}.py")]
        session.run(
            *("python", "-m", "pytest", f"--junitxml={result}", "-p", "no:cacheprovider", *tests),
            env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            success_codes=[0, 1],
        )
        (suite,) = ElementTree.parse(result).getroot().iter("testsuite")
        counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
        broken = counts["failures"] + counts["errors"]
        rows.append((name, counts["tests"] - broken - counts["skipped"], broken, versions))
        failed += [name] * bool(broken)
    _write(rows)
    if failed:
        session.error(f"failed with {'; '.join(failed)}")


def _write(rows):
    lines = ["| packages | " + " | ".join(name for name, *_ in rows) + " |", "|---|" + "---|" * len(rows)]
    for what in ("python", *SHOWN):
        lines.append(f"| {what} | " + " | ".join(versions[what] for *_, versions in rows) + " |")
    lines.append("| **tests passed** | " + " | ".join(f"{passed:,}" for _, passed, *_ in rows) + " |")
    lines.append("| **tests failed** | " + " | ".join(f"{broken:,}" for _, _, broken, _ in rows) + " |")
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.split(END)[1]}")
