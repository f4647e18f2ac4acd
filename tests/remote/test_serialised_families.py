"""What is serialised gives the same tables as what runs here, for the families of the trained relatives of `mini`."""

import pytest

import ioi_mamba as im
from ioi_mamba import analyses
from ioi_mamba.files import EMBEDDED
from ioi_mamba.tasks import ioi


@pytest.mark.parametrize("name", [name for name in EMBEDDED if name != "mini"])
@pytest.mark.parametrize("experiment", ["layer-ablation", "state-ablation", "output-ablation"])
def test_tables_are_those_of_a_run_here(name, experiment):
    here, sent = (im.open_model(name, device="cpu", backend=backend) for backend in ("local", "local-serialized"))
    pairs, run = ioi.generate(here.tokenizer, 2, 3), analyses.load(experiment)
    assert run(here, pairs).equals(run(sent, pairs))
