"""Every experiment on a real NDIF server equals the local one; and what a user is told when the server fails.

The servers run on loopback (tests/ndif_server). They are started once, so the tests that break one have their own.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nnsight
import pandas as pd
import pytest
import torch
from ndif_server.fixtures import started

import ioi_mamba as im
from ioi_mamba import analyses
from ioi_mamba.circuits.attribution import attribute
from ioi_mamba.circuits.faithfulness import rank_correlation
from ioi_mamba.cli import main
from ioi_mamba.errors import InputError, ServerError
from ioi_mamba.experiments.needs import Need
from ioi_mamba.model import compiled_scan
from ioi_mamba.passes.probe import probe
from ioi_mamba.remote import client
from ioi_mamba.study import runs
from ioi_mamba.tasks import ioi

pytestmark = pytest.mark.remote

PAIRS = {"name-steering": 50, "cross-talk": 1}  # of each experiment; the others 2
OPTIONS = {"edge-attribution": {"exact_prompts": 2}, "circuit-search": {"compare_prompts": 0}}
OPTIONS["features"] = {"size": 32, "active": 4, "training_steps": 20, "exact_prompts": 2}
GRADIENTS = (
    "edge-attribution",
    "circuit-search",
    "positional-attribution",
    "circuit-stability",
    "token-flow",
    "decoding",
    "features",
)
KEY = "this-key-must-not-be-written-anywhere"


@pytest.fixture(scope="module", autouse=True)
def scan_of_a_server():
    """Both sides take the loop of torch, as tables are compared bit for bit."""
    compiled_scan.unload()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(compiled_scan.SWITCH, "0")
        yield
    compiled_scan.unload()


@pytest.fixture(scope="module")
def local():
    return im.open_model("mini", device="cpu")


@pytest.fixture(scope="module")
def remote(ndif_server):
    return im.open_model("mini", backend="ndif", host=ndif_server.url)


@pytest.fixture(scope="module")
def sandboxed(sandboxed_ndif_server):
    return im.open_model("mini", backend="ndif", host=sandboxed_ndif_server.url)


@pytest.fixture(scope="module")
def fragile(request):
    """A server to break, whose jobs may run for 20 s."""
    with started(request, execution_timeout=20.0) as server:
        yield server


@pytest.fixture
def few_pairs(local):
    return ioi.generate(local.tokenizer, 2, 27, templates=ioi.ALIGNED_TEMPLATES, symmetric=True)


def result(model, name, local, **options):
    """An experiment's table with few pairs, the same ones for every model."""
    module = analyses.load(name)
    pairs = module.draw(local.tokenizer, PAIRS.get(name, 2), 27, ioi.TASK)
    pairs = pairs[:16] if name == "cross-talk" else pairs
    if Need.HELD_OUT in module.needs:
        options["held_out"] = module.draw(local.tokenizer, PAIRS.get(name, 2), 28, ioi.TASK)
    return module(model, pairs, **OPTIONS.get(name, {}), **options)


@pytest.fixture(scope="module")
def coarse(request):
    """A server that holds its models in bfloat16, as a hosted one does by default."""
    with started(request, dtype="bfloat16") as server:
        yield im.open_model("mini", backend="ndif", host=server.url)


# A dictionary that is trained on values that differ in a bit is another one.
@pytest.mark.parametrize("name", [name for name in analyses.ORDER if name != "features"])
def test_an_experiment_on_a_server_that_holds_bfloat16_equals_the_local_one_in_bfloat16(coarse, local, name):
    """What is chosen may differ by a rounding; rows that both have are compared."""
    got = result(coarse, name, local)
    want = result(im.open_model("mini", device="cpu", dtype="bfloat16"), name, local)
    column = next(c for c in ("effect", "similarity", "success", "score", "probability", "contribution") if c in want)
    keys = [c for c in ("template", "corruption", "mode", "step", "layer", "slice", "position", "method") if c in want]
    keys += [
        c
        for c in (
            "what",
            "path",
            "slot",
            "source_slot",
            "way",
            "prompt",
            "measure",
            "row",
            "column",
            "source",
            "target",
            "part",
            "ablation",
            "side",
            "node",
        )
        if c in want
    ]
    one, other = (table.dropna(subset=[column])[[*keys, column]].fillna(-1) for table in (got, want))
    both = one.merge(other.drop_duplicates(keys), on=keys, suffixes=("", "_local"))
    assert len(both) >= 0.8 * len(one)
    assert (both[column] - both[f"{column}_local"]).astype(float).abs().max() <= 16 * 2**-7


@pytest.mark.parametrize("name", analyses.ORDER)
def test_an_experiment_equals_its_local_table_in_few_requests(remote, local, name):
    before = len(remote.jobs.records)
    got, want = result(remote, name, local), result(local, name, local)
    requests = remote.jobs.records[before:]
    # Here a circuit's pass goes on from the one before it, there each request begins anew: equal, but for rounding.
    close = {"rtol": 1e-5, "atol": 1e-6} if name in GRADIENTS else {"check_exact": True}
    pd.testing.assert_frame_equal(got, want, **close)
    rounds = int(want.loc[want["measure"] == "tests", "value"].iloc[0]) if name == "circuit-search" else 0
    assert 1 <= len(requests) <= 10 + rounds
    assert sum(request["bytes_down"] for request in requests) <= 2**20 or name in (*GRADIENTS, "name-steering")


@pytest.mark.parametrize("name", analyses.ORDER)
@pytest.mark.parametrize("family", ["mamba2", "hybrid"])
def test_an_experiment_on_another_family_equals_its_local_table(ndif_server, family, name):
    here = im.open_model(f"mini-{family}", device="cpu")
    if (why := analyses.load(name).unavailable(here)) is not None:
        pytest.skip(why)
    there = im.open_model(f"mini-{family}", backend="ndif", host=ndif_server.url)
    got, want = result(there, name, here), result(here, name, here)
    close = {"rtol": 1e-5, "atol": 1e-6} if name in GRADIENTS else {"check_exact": True}
    pd.testing.assert_frame_equal(got, want, **close)


def test_flows_are_scored_and_patched_there_as_here(ndif_server):
    here = im.open_model("mini-mamba2", device="cpu")
    there = im.open_model("mini-mamba2", backend="ndif", host=ndif_server.url)
    pairs = ioi.generate(here.tokenizer, 2, 27, templates=ioi.ALIGNED_TEMPLATES)
    flows = [(1, 3, 7), (2, 4, 4, 1)]
    assert torch.equal(im.patch_flow(there, pairs, flows), im.patch_flow(here, pairs, flows))
    for method in ("eap", "exact"):
        got, want = (im.token_flow(model, pairs[:1], layers=[2], method=method) for model in (there, here))
        pd.testing.assert_frame_equal(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["layer-ablation", "layer-removal", "cross-talk", "state-ablation", "name-steering"])
def test_a_sandbox_gives_the_same_tables(sandboxed, local, name):
    options = {"layer": 6, "offset": 0, "per_cell": 4} if name == "name-steering" else {}
    got, want = (result(model, name, local, **options) for model in (sandboxed, local))
    pd.testing.assert_frame_equal(got, want, check_exact=True)


def test_without_gradients_each_item_is_patched_instead_and_ranks_much_the_same(sandboxed, local, few_pairs, tmp_path):
    assert not probe(sandboxed)["gradients"]
    with pytest.raises(ServerError, match=r"no gradients .* exact"):
        attribute(sandboxed, few_pairs)
    runs.run_study(sandboxed, ["edge-attribution"], tmp_path, pairs=few_pairs, progress=False)
    table = pd.read_parquet(tmp_path / "edge-attribution.parquet")
    assert set(table.loc[table["what"] == "item", "method"]) == {"exact"}
    assert "No gradients here" in (tmp_path / "index.html").read_text()
    items = table[(table["what"] == "item") & table["part"].isna()].set_index(["source", "target"])
    scores = attribute(local, few_pairs).table.set_index(["source", "target"])["score"]
    both = [torch.tensor(column.loc[scores.index].abs().to_numpy()) for column in (items["score"], scores)]
    correlation = float(rank_correlation(*both))
    print(f"Spearman of the fallback with local EAP-IG over {len(scores)} edges: {correlation:.3f}")
    assert correlation > 0.7


def test_reads_runs_and_a_users_own_block_work_there_as_here(remote, local, few_pairs):
    names = ["blocks.3.hook_h", "blocks.2.hook_conv_slice.-1", "blocks.5.hook_B_bar"]
    there, here = (im.read(model, few_pairs.clean, names) for model in (remote, local))
    assert all(torch.equal(there[name], here[name]) for name in names)
    edit = {"blocks.6.hook_h.9": lambda h: 0.5 * h}
    assert torch.equal(im.run(remote, few_pairs.clean, edit), im.run(local, few_pairs.clean, edit))
    tokens = few_pairs.clean
    with remote.trace(tokens, remote=True, use_cache=False):
        with im.mixer(remote, 6) as m:
            m.B_bar[:, 4] = 0
        there = remote.lm_head.output.save()
    with local.trace(tokens, use_cache=False):
        with im.mixer(local, 6) as m:
            m.B_bar[:, 4] = 0
        here = local.lm_head.output.save()
    assert torch.equal(there, here)
    assert not torch.equal(here, im.run(local, tokens, {}))
    prompt = local.tokenizer.decode(tokens[0, 1:])
    assert im.steer(remote, prompt, {"n1": "Mary"}) == im.steer(local, prompt, {"n1": "Mary"})


def test_what_a_job_finds_wrong_with_its_input_is_the_same_sentence(remote, local, few_pairs):
    edits = {"blocks.3.hook_h.5": torch.full((len(few_pairs), 256, 8), float("nan"))}
    messages = []
    for model in (remote, local):
        with pytest.raises(InputError) as error:
            im.run(model, few_pairs.clean, edits)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_limits_are_checked_before_sending_and_before_reading(remote, few_pairs):
    try:
        remote.jobs.limit(max_upload_mib=0.001)
        with pytest.raises(InputError, match="--max-upload"):
            im.run(remote, few_pairs.clean, {})
        remote.jobs.limit(max_download_mib=0.001)
        with pytest.raises(InputError, match="--max-download"):
            im.run(remote, few_pairs.clean, {})
    finally:
        remote.jobs.limit()


def test_a_run_says_what_it_asked_of_the_server_and_keeps_no_secret(ndif_server, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", KEY)
    arguments = ["run", "layer-ablation", "--n-pairs", "2", "--backend", "ndif", "--host", ndif_server.url]
    assert main.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    manifest = json.loads((tmp_path / "out" / "layer-ablation.json").read_text())
    assert manifest["backend"] == "ndif"
    assert manifest["requests"]["count"] == 1
    assert 0 < manifest["requests"]["bytes_down"] < 2**20
    page = (tmp_path / "out" / "index.html").read_text()
    assert "1 request" in page
    assert not (tmp_path / "out" / "chunks").exists()
    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    output = "".join(capfd.readouterr()).encode()
    assert not any(KEY.encode() in text for text in [*written, output])


def test_submitted_requests_are_collected_later(ndif_server, tmp_path, capsys):
    arguments = ["run", "layer-ablation", "output-ablation", "--n-pairs", "2", "--out", str(tmp_path)]
    arguments += ["--backend", "ndif", "--host", ndif_server.url]
    assert main.main([*arguments, "--submit"]) == 0
    told = re.findall(r"(\w+-ablation): ([\w-]+)", capsys.readouterr().out)
    assert [name for name, _ in told] == ["layer-ablation", "output-ablation"]
    assert not (tmp_path / "layer-ablation.parquet").exists()
    # Both begin with what the unpatched model does on the same pairs, which is one request.
    (handed_over,) = (tmp_path / "chunks").glob("*.job")
    assert {job for _, job in told} == {handed_over.read_text()}
    assert main.main([*arguments, "--collect"]) == 0
    local = im.open_model("mini", device="cpu")
    runs.run_study(local, ["layer-ablation"], tmp_path / "local", n_pairs=2, progress=False)
    got, want = (pd.read_parquet(path / "layer-ablation.parquet") for path in (tmp_path, tmp_path / "local"))
    pd.testing.assert_frame_equal(got, want, check_exact=True)
    assert not (tmp_path / "chunks").exists()


def test_the_doctor_says_what_the_server_allows(ndif_server, capsys):
    assert main.main(["doctor", "--backend", "ndif", "--host", ndif_server.url]) == 0
    said = capsys.readouterr().out
    for line in (
        "answers",
        "server's nnsight",
        "server's dtype",
        "gradients          allowed",
        "weights            SHA-256",
    ):
        assert line in said


def sentence(arguments: list[str], capsys) -> str:
    """What the command line says when it ends with 3."""
    assert (
        main.main(["run", "output-ablation", "--n-pairs", "2", "--backend", "ndif", "--retries", "0", *arguments]) == 3
    )
    said = capsys.readouterr().err.strip().splitlines()[-1]
    print(said)
    assert said.startswith("ioi-mamba: ")
    assert "Traceback" not in said
    return said


def test_no_server_is_one_sentence(tmp_path, capsys):
    said = sentence(["--host", "http://127.0.0.1:9", "--out", str(tmp_path / "out")], capsys)
    assert "No answer from the server at http://127.0.0.1:9" in said
    assert not (tmp_path / "out").exists()


def test_a_model_that_the_server_cannot_load_is_one_sentence(ndif_server, tmp_path, tiny_mamba_dir, capsys):
    gone = tmp_path / "gone"
    gone.mkdir()
    for file in Path(tiny_mamba_dir).iterdir():
        (gone / file.name).write_bytes(file.read_bytes())
    model = im.open_model(str(gone), backend="ndif", host=ndif_server.url)
    for file in gone.iterdir():
        file.unlink()
    with pytest.raises(ServerError, match=r"cannot (deploy this model|find)"):
        im.read(model, torch.tensor([[1, 2]]), ["hook_embed"])


def test_a_job_over_the_time_limit_is_one_sentence(fragile, local):
    model = im.open_model("mini", backend="ndif", host=fragile.url)
    with pytest.raises(ServerError, match=r"stopped the job.*timeout"):
        im.run(model, torch.tensor([[1, 2]]), {"hook_embed": _slow})


def _slow(x):
    while True:
        x = x + 0


def test_a_restarted_model_process_is_waited_for(fragile, local, few_pairs):
    model = im.open_model("mini", backend="ndif", host=fragile.url)
    names = ["blocks.6.hook_y"]
    want = im.read(local, few_pairs.clean, names)[names[0]]
    assert torch.equal(im.read(model, few_pairs.clean, names)[names[0]], want)
    fragile.kill("model")
    model.jobs.limit(retries=8)
    assert torch.equal(im.read(model, few_pairs.clean, names)[names[0]], want)


def test_a_run_goes_on_after_the_server_comes_back_and_computes_nothing_twice(fragile, tmp_path, monkeypatch):
    model = im.open_model("mini", backend="ndif", host=fragile.url)
    model.jobs.limit(retries=0)
    sent = []
    once = client._Request._waited_for

    def counted(request, model):
        if len(sent) == 4:  # the probe's two and conv-shift's first two
            fragile.kill("api")
        out = once(request, model)
        sent.append(request.ticket)
        return out

    monkeypatch.setattr(client._Request, "_waited_for", counted)
    with pytest.raises(ServerError, match="No answer"):
        runs.run_study(model, ["conv-shift"], tmp_path, n_pairs=2, options={"layer": 6}, progress=False)
    kept = {path.stem for path in (tmp_path / "chunks").glob("*.chunk")}
    assert len(kept) == 2
    fragile.restart("api")
    model.jobs.limit(retries=8)
    finished = len(sent)
    monkeypatch.setattr(client._Request, "_waited_for", lambda r, m: sent.append(r.ticket) or once(r, m))
    runs.run_study(model, ["conv-shift"], tmp_path, n_pairs=2, options={"layer": 6}, resume=True, progress=False)
    assert not kept & {path.stem for path in sent[finished:] if path is not None}
    here = im.open_model("mini", device="cpu")
    runs.run_study(here, ["conv-shift"], tmp_path / "local", n_pairs=2, options={"layer": 6}, progress=False)
    assert (tmp_path / "conv-shift.parquet").read_bytes() == (tmp_path / "local" / "conv-shift.parquet").read_bytes()


def test_without_the_object_store_small_results_still_come(fragile, few_pairs):
    model = im.open_model("mini", backend="ndif", host=fragile.url)
    fragile.kill("object store")
    try:
        assert im.read(model, few_pairs.clean, ["hook_embed"])["hook_embed"].shape[0] == len(few_pairs)
        model.jobs.limit(retries=0)
        tokens = torch.randint(1, 800, (60, 20), generator=torch.Generator().manual_seed(0))
        with pytest.raises(ServerError):  # more than 8 MiB goes by the store
            im.read(model, tokens, [f"blocks.{i}.hook_h" for i in range(2)])
    finally:
        fragile.restart("object store")


def test_an_interrupted_client_ends_with_130(ndif_server, tmp_path):
    command = [sys.executable, "-m", "ioi_mamba", "run", "cross-talk", "--n-pairs", "20", "--out", str(tmp_path)]
    run = subprocess.Popen([*command, "--backend", "ndif", "--host", ndif_server.url], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "chunks").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(run.pid, signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert b"interrupted" in errors
    assert list((tmp_path / "chunks").glob("*.chunk"))


def test_several_requests_in_flight_give_the_local_table(ndif_server, local, tmp_path, monkeypatch):
    """Each chunk is a request of its own, and so many of them are at the server at a time."""
    model, most = im.open_model("mini", backend="ndif", host=ndif_server.url), []
    model.jobs.in_flight = 2
    step, out = client._Request.step, set()

    def counted(request, model):
        result = step(request, model)
        (out.discard if result is not None else out.add)(id(request))
        most.append(len(out))
        return result

    monkeypatch.setattr(client._Request, "step", counted)
    given = {"n_pairs": 4, "chunks": 4, "progress": False}
    runs.run_study(model, ["layer-ablation"], tmp_path / "shared", **given)
    runs.run_study(local, ["layer-ablation"], tmp_path / "local", **given)
    assert max(most) == 2
    tables = [(tmp_path / where / "layer-ablation.parquet").read_bytes() for where in ("shared", "local")]
    assert tables[0] == tables[1]
    manifest = json.loads((tmp_path / "shared" / "layer-ablation.json").read_text())
    assert manifest["requests"]["count"] == manifest["chunks"]["computed"] > 4
