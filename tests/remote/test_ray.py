"""Work shared out by a real Ray on loopback: tables are the local ones, whatever happens to the workers."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

import ioi_mamba as im
from ioi_mamba import analyses
from ioi_mamba.errors import InputError
from ioi_mamba.model.opening import open_model
from ioi_mamba.passes.sweep import resample_sweep
from ioi_mamba.remote.workers import Workers
from ioi_mamba.results.stored import read_manifest
from ioi_mamba.study import runs
from ioi_mamba.tasks import ioi

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed", allow_module_level=True)

FEW = {"compare_prompts": 0, "exact_prompts": 2, "part_prompts": 2, "steps": 2, "threshold": 0.9, "target": 0}
FEW |= {"per_cell": 2}
CHUNKS = 3


@pytest.fixture(scope="module")
def local(reads_names):
    return im.open_model(str(reads_names), device="cpu")


@pytest.fixture(scope="module")
def shared(reads_names):
    """The same model on two workers of a Ray that is started here."""
    model = open_model(str(reads_names), device="cpu", backend="ray", workers=Workers(count=2))
    try:
        yield model
    finally:
        model.jobs.close()


def run(model, name, out, **options):
    known = analyses.load(name).options.__dataclass_fields__
    chosen = {key: value for key, value in FEW.items() if key in known}
    chosen |= {"layer": 1} if "layer" in known else {}
    runs.run_study(model, [name], out, n_pairs=3, options=chosen, chunks=CHUNKS, progress=False, **options)
    return (out / f"{name}.parquet").read_bytes()


def children():
    return {each.pid for each in psutil.Process().children(recursive=True)}


def test_two_workers_make_the_local_table_and_leave_nothing_also_if_one_is_killed(reads_names, local, tmp_path):
    before = children()
    model = open_model(str(reads_names), device="cpu", backend="ray", workers=Workers(count=2))
    try:
        import ray  # not before, so that it is told to stay on loopback when it is imported

        first, heard = set(model.jobs.pids), []
        assert [node["NodeManagerAddress"] for node in ray.nodes()] == ["127.0.0.1"]

        def kill_one():
            while not list((tmp_path / "shared" / "chunks").glob("*.chunk")):
                time.sleep(0.01)
            os.kill(model.jobs.pids[0], signal.SIGKILL)

        killer = threading.Thread(target=kill_one)
        killer.start()
        got = run(model, "layer-ablation", tmp_path / "shared")
        killer.join()
        resample_sweep(model, few_pairs(local), "y", positions=[3], progress=lambda *call: heard.append(call))
    finally:
        model.jobs.close()
    assert got == run(local, "layer-ablation", tmp_path / "local")
    manifests = [read_manifest(tmp_path / where / "layer-ablation.json") for where in ("shared", "local")]
    assert [each["backend"] for each in manifests] == ["ray", "local"]
    assert manifests[0]["chunks"] == manifests[1]["chunks"]
    assert manifests[0]["chunks"]["wanted"] == CHUNKS
    assert model.jobs.replaced == 1
    assert not first <= set(model.jobs.pids)
    assert heard[-1][0] == heard[-1][1]
    # multiprocessing's own helpers may have come meanwhile; of Ray nothing is left.
    assert not {psutil.Process(pid).name() for pid in children() - before if psutil.pid_exists(pid)} & {
        "raylet",
        "gcs_server",
    }


def few_pairs(model):
    return ioi.generate(model.tokenizer, 3, 27, templates=ioi.ALIGNED_TEMPLATES).layouts()[0]


@pytest.mark.ray
@pytest.mark.parametrize("name", analyses.ORDER)
def test_every_experiment_by_two_workers_is_the_local_one(shared, local, name, tmp_path):
    assert run(shared, name, tmp_path / "shared") == run(local, name, tmp_path / "local")


@pytest.mark.ray
def test_what_a_worker_finds_wrong_is_said_as_if_it_had_been_found_here(shared, local):
    tokens = few_pairs(local).clean
    with pytest.raises(InputError, match="did you mean"):
        im.read(shared, tokens, ["blocks.0.hook_yy"])
    with pytest.raises(InputError, match="NaN or infinity"):
        im.run(shared, tokens, {"hook_embed": float("nan")})
    want = im.read(local, tokens, ["blocks.1.hook_h"])["blocks.1.hook_h"]
    assert (im.read(shared, tokens, ["blocks.1.hook_h"])["blocks.1.hook_h"] == want).all()


def program(reads_names, out, *more):
    command = [
        sys.executable,
        "-m",
        "ioi_mamba",
        "run",
        "layer-ablation",
        "--model",
        str(reads_names),
        "--out",
        str(out),
    ]
    command += ["--backend", "ray", "--workers", "2", "--device", "cpu", "--n-pairs", "40", "--chunks", "40", *more]
    return subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
        # Whoever started the tests may have had them ignore it, as a shell does with what it runs in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.ray
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_process_and_is_taken_up(reads_names, local, tmp_path, end):
    out = tmp_path / "out"
    command = program(reads_names, out)
    while not list((out / "chunks").glob("*.chunk")):
        assert command.poll() is None, command.stderr.read()
        time.sleep(0.02)
    started = psutil.Process(command.pid).children(recursive=True)
    assert any(each.name() == "raylet" for each in started)
    command.send_signal(end)
    command.communicate(timeout=60)
    assert command.returncode == (130 if end == signal.SIGINT else -signal.SIGKILL)
    # Of a killed run Ray's agents notice by and by that their node is gone.
    _, alive = psutil.wait_procs(started, timeout=30 if end == signal.SIGINT else 150)
    assert [each.name() for each in alive] == []
    kept = len(list((out / "chunks").glob("*.chunk")))
    again = program(reads_names, out, "--resume")
    said = again.communicate(timeout=300)[1]
    assert again.returncode == 0, said
    chunks = read_manifest(out / "layer-ablation.json")["chunks"]
    assert chunks["kept"] == kept > 0
