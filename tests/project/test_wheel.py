"""The wheel, installed beside a project that has an `analyses` package of its own."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A directory as pip leaves it after installing the wheel."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as names:
        top = {name.split("/")[0] for name in names.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"ioi_mamba"}
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", str(folder / "site"), str(wheel)],
        check=True,
        capture_output=True,
    )
    return folder / "site"


def run(site, project, *command):
    return subprocess.run(
        [sys.executable, *command],
        cwd=project,
        capture_output=True,
        text=True,
        env={**__import__("os").environ, "PYTHONPATH": str(site)},
    )


def test_beside_a_project_with_its_own_analyses_package_everything_works(site, tiny_mamba_dir, tmp_path):
    (tmp_path / "analyses").mkdir()
    (tmp_path / "analyses" / "__init__.py").write_text("raise ImportError('not ours')\n")
    arguments = ["run", "state-similarity", "--model", str(tiny_mamba_dir), "--option", "layer=0", "--out", "out"]
    arguments += ["--option", "prompt=5 17 18 9 3", "--n-pairs", "1", "--task", str(tmp_path / "task.py")]
    (tmp_path / "task.py").write_text(
        "import ioi_mamba as im\n"
        "def generate(tokenizer, n_pairs, seed):\n"
        "    return im.Pairs.from_tokens([[0, 5, 6]], [[0, 7, 6]], [8], [9])\n"
        "ANY = im.Task('any', 'Anything', 'a token', generate)\n"
    )
    done = run(site, tmp_path, "-m", "ioi_mamba", *arguments)
    assert done.returncode == 0, done.stderr
    code = "import ioi_mamba as im; print(im.__file__); print(list(im.open_results('out')))"
    done = run(site, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    where, found = done.stdout.splitlines()
    assert Path(where).is_relative_to(site)
    assert found == "['state-similarity']"


def test_the_wheel_has_every_module_and_file_of_the_package(site):
    here = {path.relative_to(ROOT / "ioi_mamba") for path in (ROOT / "ioi_mamba").rglob("*.*")}
    here |= {Path("analyses") / path.relative_to(ROOT / "analyses") for path in (ROOT / "analyses").rglob("*.py")}
    there = {path.relative_to(site / "ioi_mamba") for path in (site / "ioi_mamba").rglob("*.*")}
    kept = lambda paths: {path for path in paths if "__pycache__" not in path.parts}
    assert kept(there) == kept(here)
    assert (site / "ioi_mamba" / "py.typed").is_file()
