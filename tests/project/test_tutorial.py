"""The tutorial notebook runs from top to bottom and shows what its text says."""

import re
import sys
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.py"


def run(folder, host=None):
    """What each cell printed or showed, as text, from a fresh kernel of this Python."""
    jupytext = pytest.importorskip("jupytext")
    nbclient = pytest.importorskip("nbclient")
    specs = pytest.importorskip("jupyter_client.kernelspec")
    pytest.importorskip("ipykernel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TUTORIAL.parent.parent))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.delenv("NDIF_HOST", raising=False)
        if host is not None:
            patch.setenv("NDIF_HOST", host)
        notebook = jupytext.read(TUTORIAL)
        client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
        # Whatever kernels are installed, this Python is the one that has the package's dependencies.
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        client.create_kernel_manager()
        client.km._kernel_spec = specs.KernelSpec(argv=argv, display_name="this", language="python")
        client.execute()
    texts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error"
            texts.append(output.get("text") or output["data"].get("text/plain", ""))
    return "\n".join(texts)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return run(tmp_path_factory.mktemp("notebook"))


def test_it_runs_and_its_numbers_are_the_ones_the_text_speaks_of(outputs):
    effects = re.findall(r"^\d +(\d) +(-?\d\.\d+) +-?\d\.\d+ +-?\d\.\d+$", outputs, re.MULTILINE)
    by_layer = {int(layer): float(effect) for layer, effect in effects}
    found = int(re.search(r"After layer 0, layer (\d) has the largest effects", outputs)[1])
    assert max(by_layer, key=by_layer.get) == found
    assert by_layer[found] > 0.9
    assert re.search(r"as it is: +Leah", outputs)
    assert re.search(r"Leah read as Mary: +Mary", outputs)
    assert float(re.search(r"'normalized_logit_diff': (\S+)}", outputs)[1]) > 0.9
    assert float(re.search(r"largest difference of a score: (\S+)", outputs)[1]) < 1e-5


def test_it_draws_its_charts(outputs):
    assert len(re.findall(r"alt\.\w*Chart\(\.\.\.\)", outputs)) >= 2


@pytest.mark.remote
def test_its_last_section_runs_on_a_server(ndif_server, tmp_path):
    outputs = run(tmp_path, host=ndif_server.url)
    assert float(re.search(r"largest difference of a score: (\S+)", outputs)[1]) < 1e-5
