"""Work shared out by a real Ray on loopback: tables are the local ones, whatever happens to the workers."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
from conftest import save_mamba
from transformers import AutoTokenizer

import ioi_mamba as im
from ioi_mamba import analyses
from ioi_mamba.errors import InputError
from ioi_mamba.files import MINI
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
DOCS = Path(__file__).parents[2] / "docs"
# Else Ray puts the machine's own address in the place of 127.0.0.1, and reports how it is used.
ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A random Mamba of two layers with the vocabulary of the embedded model."""
    path = tmp_path_factory.mktemp("reads-names")
    tokenizer = AutoTokenizer.from_pretrained(str(MINI))
    save_mamba(path, vocab_size=len(tokenizer), n_layers=2)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def local(directory):
    return im.open_model(str(directory), device="cpu")


@pytest.fixture(scope="module")
def shared(directory):
    """The same model on two workers of a Ray that is started here."""
    model = open_model(str(directory), device="cpu", backend="ray", workers=Workers(count=2))
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


def test_two_workers_make_the_local_table_and_leave_nothing_also_if_one_is_killed(directory, local, tmp_path):
    before = children()
    model = open_model(str(directory), device="cpu", backend="ray", workers=Workers(count=2))
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
    with pytest.raises(InputError, match="not finite"):
        im.run(shared, tokens, {"hook_embed": float("nan")})
    want = im.read(local, tokens, ["blocks.1.hook_h"])["blocks.1.hook_h"]
    assert (im.read(shared, tokens, ["blocks.1.hook_h"])["blocks.1.hook_h"] == want).all()


def program(directory, out, *more):
    command = [sys.executable, "-m", "ioi_mamba", "run", "layer-ablation", "--model", str(directory), "--out", str(out)]
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
def test_an_interrupted_run_leaves_no_process_and_is_taken_up(directory, local, tmp_path, end):
    out = tmp_path / "out"
    command = program(directory, out)
    while not list((out / "chunks").glob("*.chunk")):
        assert command.poll() is None, command.stderr.read()
        time.sleep(0.02)
    started = psutil.Process(command.pid).children(recursive=True)
    assert any(each.name() == "raylet" for each in started)
    command.send_signal(end)
    command.communicate(timeout=60)
    assert command.returncode == (130 if end == signal.SIGINT else -signal.SIGKILL)
    _, alive = psutil.wait_procs(started, timeout=30)
    assert [each.name() for each in alive] == []
    kept = len(list((out / "chunks").glob("*.chunk")))
    again = program(directory, out, "--resume")
    said = again.communicate(timeout=300)[1]
    assert again.returncode == 0, said
    chunks = read_manifest(out / "layer-ablation.json")["chunks"]
    assert chunks["kept"] == kept > 0


@pytest.mark.ray
def test_eight_nodes_complete_a_study(directory, tmp_path):
    from ray.cluster_utils import Cluster

    study = {"experiments": ["layer-ablation", "state-similarity"], "model": [str(directory), "mini"], "seed": [1, 2]}
    study |= {"n-pairs": 3, "chunks": CHUNKS, "device": "cpu", "threads": 1, "option": {"layer": 1}}
    options = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    try:
        for _ in range(7):
            cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
        eight = {"backend": "ray", "address": cluster.address, "workers": 8}
        carry_out(tmp_path / "shared.yaml", study | eight, tmp_path / "shared")
    finally:
        cluster.shutdown()
    carry_out(tmp_path / "local.yaml", study, tmp_path / "local")
    pd.testing.assert_frame_equal(im.open_study(tmp_path / "shared"), im.open_study(tmp_path / "local"))
    tables = sorted(path.relative_to(tmp_path / "local") for path in (tmp_path / "local").glob("*/*.parquet"))
    assert len(tables) == 2 * 2 * 2
    for table in tables:
        assert (tmp_path / "shared" / table).read_bytes() == (tmp_path / "local" / table).read_bytes()
        manifests = [read_manifest((tmp_path / where / table).with_suffix(".json")) for where in ("shared", "local")]
        assert [each["backend"] for each in manifests] == ["ray", "local"]


def carry_out(path, study, out):
    path.write_text(json.dumps(study))
    run_here([sys.executable, "-m", "ioi_mamba", "run", str(path), "--out", str(out), "--quiet"])


def run_here(arguments, **changes):
    """Run a command to its end. Ray's own commands are found beside Python's."""
    path = os.pathsep.join([*changes.pop("PATH", []), str(Path(sys.executable).parent), os.environ["PATH"]])
    threads = {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        arguments, env=os.environ | threads | changes | {"PATH": path}, text=True, capture_output=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rays():
    """The names of Ray's own processes on this machine."""
    return [each.name() for each in psutil.process_iter() if each.name() in ("raylet", "gcs_server")]


@pytest.fixture
def alone():
    """No other Ray on this machine: its commands `stop` and `symmetric-run` end or refuse whatever there is."""
    if rays():
        pytest.skip("another Ray runs on this machine")
    yield
    assert not rays()


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.ray
def test_the_script_for_slurm_makes_the_local_table(directory, local, tmp_path, port, alone):
    """On one node, this machine: Slurm's two commands are stood in for, the cluster is Ray's own."""
    script = (DOCS / "slurm.sh").read_text().replace("6379", str(port))
    script = script.replace("run all", "run layer-ablation --n-pairs 3 --device cpu --workers 2 --chunks 3")
    for name, does in {"scontrol": "echo 127.0.0.1", "srun": 'exec "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_PER_TASK": "2"}
    run_here(
        ["bash", "-c", script],
        **slurm,
        **ON_LOOPBACK,
        PATH=[str(tmp_path)],
        MODEL=str(directory),
        OUT=str(tmp_path / "shared"),
    )
    assert (tmp_path / "shared" / "layer-ablation.parquet").read_bytes() == run(
        local, "layer-ablation", tmp_path / "local"
    )


@pytest.mark.ray
def test_a_submitted_job_makes_the_local_table(directory, local, tmp_path, port, alone):
    if importlib.util.find_spec("opencensus") is None:
        pytest.skip("ray[default] is not installed: it has `ray job`")
    node = {**ON_LOOPBACK, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    start = ["ray", "start", "--head", "--node-ip-address", "127.0.0.1", "--num-cpus", "2"]
    run_here([*start, "--port", str(port), "--dashboard-host", "127.0.0.1", "--dashboard-port", "0"], **node)
    try:
        work = ["ioi-mamba", "run", "layer-ablation", "--model", str(directory), "--n-pairs", "3", "--device", "cpu"]
        work += ["--backend", "ray", "--address", "auto", "--workers", "2", "--chunks", "3", "--resume"]
        said = run_here(
            ["ray", "job", "submit", "--", *work, "--out", str(tmp_path / "shared")],
            **node,
            RAY_ADDRESS=f"127.0.0.1:{port}",
        )
    finally:
        run_here(["ray", "stop"])
    assert "succeeded" in said
    assert (tmp_path / "shared" / "layer-ablation.parquet").read_bytes() == run(
        local, "layer-ablation", tmp_path / "local"
    )
