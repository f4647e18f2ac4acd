"""A study killed at random moments and taken up again is the undisturbed one, and nothing in it is computed twice."""

import json
import random
import signal
import time

import pandas as pd
import processes
import pytest
from conftest import VOCAB, save_mamba

import ioi_mamba as im
from ioi_mamba.model.opening import _token_ids_tokenizer
from ioi_mamba.results.stored import finished
from ioi_mamba.results.study import FILE

EXPERIMENTS = ("layer-removal", "conv-shift", "output-ablation")
SEEDS = (1, 2, 3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tiny_mamba_dir, pairs_file):
    """What a study says of two small random models."""
    other = tmp_path_factory.mktemp("another-mamba")
    save_mamba(other, vocab_size=VOCAB, n_layers=3)
    _token_ids_tokenizer(VOCAB).save_pretrained(other)
    return {"model": [str(tiny_mamba_dir), str(other)], "pairs": str(pairs_file), "option": {"steps": 1, "layer": 1}}


@pytest.fixture(scope="module")
def trained():
    """What a study says of two small trained models."""
    return {"model": ["mini", "mini-mamba2"], "n-pairs": 2, "option": {"steps": 1, "layer": 1}}


def manifests(out):
    """By cell and experiment, what is finished; a manifest here vouches for its table's bytes."""
    cells = [entry["directory"] for entry in json.loads((out / FILE).read_text())["cells"]] if out.exists() else []
    found = {(cell, name): finished(out / cell, name) for cell in cells for name in EXPERIMENTS}
    return {key: manifest for key, manifest in found.items() if manifest is not None}


@pytest.mark.parametrize(
    ("about", "kills"), [("tiny", 2), pytest.param("trained", 10, marks=pytest.mark.slow)], indirect=["about"]
)
def test_a_study_killed_at_any_moment_ends_as_if_it_had_not_been(about, kills, tmp_path, tried):
    path, plain, out = tmp_path / "study.yaml", tmp_path / "plain", tmp_path / "killed"
    path.write_text(json.dumps(about | {"experiments": list(EXPERIMENTS), "seed": list(SEEDS), "device": "cpu"}))
    assert processes.Command("--version").end() == 0  # the first one starts the server that the others fork from
    began = time.monotonic()
    undisturbed = processes.Command("run", path, "--out", plain)
    assert undisturbed.end(within=900) == 0, undisturbed.printed
    seconds = time.monotonic() - began
    wanted = manifests(plain)
    assert len(wanted) == 2 * len(SEEDS) * len(EXPERIMENTS)

    rng, left, kept, begun = random.Random(kills), kills, {}, 0
    while left:
        command = processes.Command("run", path, "--out", out)
        begun += 1
        time.sleep(rng.uniform(0, 1.5 * seconds / kills))
        command.signal(signal.SIGKILL)
        left -= command.end() == -signal.SIGKILL
        now = manifests(out) if (out / FILE).exists() else {}
        assert {key: now[key] for key in kept} == kept  # with the times at which they were made: none was made again
        kept = now
    last = processes.Command("run", path, "--out", out)
    assert last.end(within=900) == 0, last.printed
    done = manifests(out)
    assert {key: done[key] for key in kept} == kept
    assert last.printed.count("finished before, kept") == len(kept)
    assert done.keys() == wanted.keys()
    for cell, name in wanted:
        assert (out / cell / f"{name}.parquet").read_bytes() == (plain / cell / f"{name}.parquet").read_bytes()
    pd.testing.assert_frame_equal(im.open_study(out), im.open_study(plain))
    assert (out / "index.html").read_text() == (plain / "index.html").read_text()
    print(f"{kills} kills in {begun} starts; {len(kept)} of {len(done)} tables were done before the last start")
    tried("kill -9 of a study at a random moment", kills)


@pytest.fixture
def about(request):
    return request.getfixturevalue(request.param)
