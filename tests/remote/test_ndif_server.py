"""The test server itself: what it starts, what it serves, how its parts fail, and that it leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import conftest  # noqa: F401  sets the environment before transformers is imported
import nnsight
import pytest
import torch
from ndif_server import Server, ServerFailed, Unavailable, install, processes
from ndif_server.fixtures import started
from ndif_server.processes import alive
from nnsight import TransformersModel
from nnsight.modeling import huggingface

from ioi_mamba.files import MINI
from ioi_mamba.model.mamba.calls import SCAN_OP

MINI = str(MINI)
PROMPT = "Then, Mark, Leah and Erik went to the store. Mark and Leah gave a necklace to"
SLEEPER = "import sys, time; print('up', flush=True); time.sleep(600)"


@pytest.fixture
def client(monkeypatch):
    """mini without weights, as a client holds it, and a call that points nnsight at a server."""
    monkeypatch.setitem(huggingface._ID_CACHE, MINI, MINI)  # else nnsight asks the hub for the id's spelling
    monkeypatch.setattr(nnsight.CONFIG.APP, "REMOTE_LOGGING", False)

    def of(server: Server) -> TransformersModel:
        monkeypatch.setattr(nnsight.CONFIG.API, "HOST", server.url)
        return TransformersModel(MINI, task="text-generation", tokenizer=MINI)

    return of


@pytest.fixture(scope="module")
def fragile(request):
    """A server to break, whose jobs may run for 5 s."""
    with started(request, execution_timeout=5.0) as server:
        yield server


def remote_logits(model):
    with model.trace(PROMPT, use_cache=False, remote=True):
        logits = model.output.logits.save()
    return logits


def gradient_and_process(model):
    """A logit's gradient with respect to the first layer's output, and the id of the process that ran the request."""
    with model.trace(PROMPT, use_cache=False, remote=True):
        x = model.backbone.layers[0].output
        x.requires_grad_(True)
        loss = model.output.logits[0, -1, 0]
        with loss.backward():
            gradient = x.grad.save()
        pid = torch.tensor(os.getpid()).save()
    return gradient, int(pid)


def logits_when_back(model, seconds=90):
    """Logits of the first trace that the server answers: after a crash it refuses some for a while."""
    end = time.monotonic() + seconds
    while True:
        try:
            return remote_logits(model)
        except Exception:
            if time.monotonic() > end:
                raise
            time.sleep(1)


def process(directory: Path | None = None) -> subprocess.Popen:
    """A sleeping process, marked as one of a server's if a directory is given."""
    marked = {processes.MARK: str(directory.resolve())} if directory else {}
    sleeper = subprocess.Popen([sys.executable, "-c", SLEEPER], env=os.environ | marked, stdout=subprocess.PIPE)
    assert sleeper.stdout is not None
    sleeper.stdout.readline()
    return sleeper


def listening(pids) -> set[str]:
    """The local addresses, in the kernel's hexadecimal, on which these processes accept connections."""
    inodes = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.add(os.readlink(entry))
            except FileNotFoundError:
                continue
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes}


# What it does with processes, ports and a machine that lacks something: no server needed.


def test_stop_all_ends_the_marked_processes_and_no_other(tmp_path):
    ours, others, unmarked = process(tmp_path), process(tmp_path / "other"), process()
    try:
        assert list(processes.found(tmp_path)) == [ours.pid]
        processes.stop_all(tmp_path)
        assert processes.found(tmp_path) == {}
        assert not alive(ours.pid)
        assert alive(others.pid)
        assert alive(unmarked.pid)
    finally:
        for sleeper in (ours, others, unmarked):
            sleeper.kill()
            sleeper.communicate()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_guard_stops_the_server_of_a_process_that_was_killed(tmp_path, end):
    sleeper = process(tmp_path)
    program = "import sys, time; from ndif_server import processes; from pathlib import Path\n"
    program += "processes.start_guard(Path(sys.argv[1])); print('up', flush=True); time.sleep(600)"
    owner = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    try:
        assert owner.stdout is not None
        owner.stdout.readline()
        assert alive(sleeper.pid)
        owner.send_signal(end)
        owner.wait()
        assert processes.wait_for(lambda: not alive(sleeper.pid), 20)
    finally:
        for each in (owner, sleeper):
            each.kill()
            each.communicate()


def test_free_ports_are_free_and_differ():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", next(iter(processes.free_ports(["one"]).values()))))
        taken.listen()
        ports = processes.free_ports(map(str, range(50)))
        assert len(set(ports.values())) == 50
        assert taken.getsockname()[1] not in ports.values()
        assert not processes._is_free(taken.getsockname()[1])


def test_without_redis_or_a_python_the_reason_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setattr(install, "PYTHONS", ("3.99",))
    with pytest.raises(Unavailable, match="redis-server is not installed"):
        install.redis_server()
    with pytest.raises(Unavailable, match=r"ndif needs Python 3\.99"):
        install.find_python()


def test_a_python_that_is_no_python_is_passed_over_for_one_of_pyenvs(monkeypatch, tmp_path):
    version = "3.98"
    shim = tmp_path / f"python{version}"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    real = tmp_path / "versions" / f"{version}.1" / "bin" / f"python{version}"
    real.parent.mkdir(parents=True)
    real.write_text(f"#!/bin/sh\necho {version}\n")
    real.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setattr(install, "PYTHONS", (version,))
    assert install.find_python() == real


def test_the_server_gets_the_clients_releases():
    assert f"torch=={torch.__version__.split('+')[0]}" in install.requirements()


# The real thing.


@pytest.mark.remote
def test_a_remote_trace_gives_the_local_bits(ndif_server, client, mini):
    model = client(ndif_server)
    with torch.no_grad(), mini.trace(PROMPT, use_cache=False):
        local = mini.output.logits.save()
    assert torch.equal(remote_logits(model), local)


@pytest.mark.remote
def test_a_trusted_request_runs_in_the_models_process_and_takes_gradients(ndif_server, client):
    model = client(ndif_server)
    gradient, pid = gradient_and_process(model)
    assert gradient.abs().sum() > 0
    assert pid in ndif_server.model_actors()


@pytest.mark.remote
def test_the_server_listens_on_loopback_only(ndif_server, client):
    remote_logits(client(ndif_server))
    addresses = listening(ndif_server.running())
    assert addresses
    assert addresses <= {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


@pytest.mark.remote
def test_the_server_can_import_nothing_of_this_repository(ndif_server, client):
    model = client(ndif_server)
    with model.trace(PROMPT, use_cache=False, remote=True):
        import importlib.util

        ours = [importlib.util.find_spec(name) is not None for name in ("ioi_mamba", "analyses", "tests")]
        seen = torch.tensor(ours).save()
    assert not seen.any()


@pytest.mark.remote
def test_a_sandboxed_request_reads_an_operation_in_a_process_of_its_own(sandboxed_ndif_server, client, mini):
    model = client(sandboxed_ndif_server)
    with torch.no_grad(), mini.trace(PROMPT, use_cache=False):
        operation = getattr(mini.backbone.layers[2].mixer.source, SCAN_OP)
        args, _ = operation.inputs
        local = args[1].save()
    with model.trace(PROMPT, use_cache=False, remote=True):
        operation = getattr(model.backbone.layers[2].mixer.source, SCAN_OP)
        args, _ = operation.inputs
        remote = args[1].save()
        pid = torch.tensor(os.getpid()).save()
    assert torch.equal(remote, local)
    assert sandboxed_ndif_server.model_actors()
    assert int(pid) not in sandboxed_ndif_server.model_actors()


@pytest.mark.remote
def test_a_sandboxed_request_gets_no_gradient(sandboxed_ndif_server, client):
    model = client(sandboxed_ndif_server)
    with pytest.raises(Exception, match="OutOfOrderError"):
        gradient_and_process(model)


@pytest.mark.remote
def test_a_killed_api_refuses_and_comes_back_on_its_port(fragile, client):
    model = client(fragile)
    before, url = remote_logits(model), fragile.url
    fragile.kill("api")
    with pytest.raises(ConnectionRefusedError):
        remote_logits(model)
    fragile.restart("api")
    assert fragile.url == url
    assert torch.equal(logits_when_back(model), before)


@pytest.mark.remote
def test_a_killed_model_actor_is_replaced(fragile, client):
    model = client(fragile)
    before, actors = logits_when_back(model), fragile.model_actors()
    fragile.restart("model")
    assert fragile.model_actors()
    assert not actors & fragile.model_actors()
    assert torch.equal(logits_when_back(model), before)


@pytest.mark.remote
def test_without_the_object_store_large_results_fail_until_it_is_back(fragile, client):
    model = client(fragile)
    small = logits_when_back(model)

    def large():
        with model.trace(PROMPT, use_cache=False, remote=True):
            numbers = torch.rand(3, 1 << 20).save()  # 12 MiB; up to 8 travel without the store
        return numbers

    assert large().shape == (3, 1 << 20)
    fragile.kill("object store")
    with pytest.raises(Exception, match=r"(?i)endpoint|connect|submitting"):
        large()
    assert torch.equal(logits_when_back(model), small)
    fragile.restart("object store")
    assert large().shape == (3, 1 << 20)


@pytest.mark.remote
def test_a_job_over_the_execution_timeout_is_ended(fragile, client):
    model = client(fragile)
    logits_when_back(model)

    def endless():
        with model.trace(PROMPT, use_cache=False, remote=True):
            time.sleep(30)
            model.output.logits.save()

    with pytest.raises(Exception, match=r"exceeded the execution timeout of 5\.0s"):
        endless()


@pytest.mark.remote
def test_a_killed_server_leaves_nothing_and_restarts_on_its_port(fragile, client):
    model = client(fragile)
    before, url = logits_when_back(model), fragile.url
    pids = list(fragile.running())
    fragile.kill("everything")
    assert fragile.running() == {}
    assert not any(alive(pid) for pid in pids)
    assert not processes.short_name(fragile.directory).is_symlink()
    with pytest.raises(ConnectionRefusedError):
        remote_logits(model)
    with pytest.raises(ServerFailed, match="send a trace first"):
        fragile.kill("model")
    fragile.restart("everything")
    assert fragile.url == url
    with pytest.raises(Unavailable, match="is running"):
        Server(fragile.directory).start()
    assert torch.equal(logits_when_back(model), before)
