"""Work shared out on clusters of Ray that others start: many nodes, Slurm's job, a submitted job. All on loopback."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import psutil
import pytest

import ioi_mamba as im
from ioi_mamba.errors import InputError
from ioi_mamba.remote.workers import Workers
from ioi_mamba.results.stored import read_manifest
from ioi_mamba.study import runs

pytestmark = pytest.mark.ray
if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed", allow_module_level=True)

CHUNKS = 3
DOCS = Path(__file__).parents[2] / "docs"
# Else Ray puts the machine's own address in the place of 127.0.0.1, and reports how it is used.
ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def local_table(reads_names, tmp_path_factory):
    """The bytes of the table that layer-ablation makes here of three pairs in three chunks."""
    out = tmp_path_factory.mktemp("local")
    model = im.open_model(str(reads_names), device="cpu")
    runs.run_study(model, ["layer-ablation"], out, n_pairs=3, chunks=CHUNKS, progress=False)
    return (out / "layer-ablation.parquet").read_bytes()


def test_eight_nodes_complete_a_study(reads_names, tmp_path):
    from ray.cluster_utils import Cluster

    study = {"experiments": ["layer-ablation", "state-similarity"], "model": [str(reads_names), "mini"], "seed": [1, 2]}
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


def test_the_script_for_slurm_makes_the_local_table(reads_names, local_table, tmp_path, port, alone):
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
        MODEL=str(reads_names),
        OUT=str(tmp_path / "shared"),
    )
    assert (tmp_path / "shared" / "layer-ablation.parquet").read_bytes() == local_table


def test_a_submitted_job_makes_the_local_table(reads_names, local_table, tmp_path, port, alone):
    if importlib.util.find_spec("opencensus") is None:
        pytest.skip("ray[default] is not installed: it has `ray job`")
    node = {**ON_LOOPBACK, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    start = ["ray", "start", "--head", "--node-ip-address", "127.0.0.1", "--num-cpus", "2"]
    run_here([*start, "--port", str(port), "--dashboard-host", "127.0.0.1", "--dashboard-port", "0"], **node)
    try:
        work = ["ioi-mamba", "run", "layer-ablation", "--model", str(reads_names), "--n-pairs", "3", "--device", "cpu"]
        work += ["--backend", "ray", "--address", "auto", "--workers", "2", "--chunks", "3", "--resume"]
        said = run_here(
            ["ray", "job", "submit", "--", *work, "--out", str(tmp_path / "shared")],
            **node,
            RAY_ADDRESS=f"127.0.0.1:{port}",
        )
    finally:
        run_here(["ray", "stop"])
    assert "succeeded" in said
    assert (tmp_path / "shared" / "layer-ablation.parquet").read_bytes() == local_table


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "127.0.0.1:here"])
def test_an_address_where_no_cluster_is_is_one_sentence(address, port, tmp_path):
    address = address.format(port=port)
    with pytest.raises(InputError, match=f"No Ray cluster at --address {address}: start one with `ray start`"):
        im.open_model("mini", device="cpu", backend="ray", workers=Workers(address=address))


def test_a_cluster_that_asks_for_its_token_is_one_sentence(port, alone):
    node = {**ON_LOOPBACK, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    start = ["ray", "start", "--head", "--node-ip-address", "127.0.0.1", "--num-cpus", "1", "--include-dashboard=false"]
    run_here([*start, "--port", str(port)], **node)
    try:
        with pytest.raises(InputError, match="asks for its token: set RAY_AUTH_MODE=token"):
            im.open_model("mini", device="cpu", backend="ray", workers=Workers(address=f"127.0.0.1:{port}"))
    finally:
        run_here(["ray", "stop"])
