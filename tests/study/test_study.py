"""A run: what it leaves behind, what it refuses, and how it is taken up again."""

import json
import logging
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import VOCAB

import ioi_mamba as im
from ioi_mamba import files
from ioi_mamba.analyses import layer_removal
from ioi_mamba.errors import InputError
from ioi_mamba.passes.probe import probe
from ioi_mamba.results.stored import read_manifest
from ioi_mamba.study import runs
from ioi_mamba.tasks.base import Pairs
from ioi_mamba.versions import requirements


def pairs(first=1, n_pairs=3):
    tokens = torch.arange(first, first + 5 * n_pairs).reshape(n_pairs, 5) % VOCAB
    answer = torch.arange(n_pairs)
    return Pairs(clean=tokens, corrupted=tokens.flip(1), answer=answer, wrong=answer + 7)


def run(model, out, **changes):
    arguments = {"pairs": pairs(), "progress": False, "options": {"steps": 1}} | changes
    return runs.run_study(model, ["layer-removal"], out, **arguments)


@pytest.fixture
def counted(monkeypatch):
    """How often layer-removal ran."""
    calls = []

    def run(context):
        calls.append(context.options.steps)
        return layer_removal.run(context)

    monkeypatch.setattr(layer_removal, "EXPERIMENT", replace(layer_removal.EXPERIMENT, run=run))
    return calls


def test_the_manifest_says_where_the_table_comes_from(tiny_mamba, tmp_path):
    page = run(tiny_mamba, tmp_path / "deep" / "out", model_id="tiny")
    manifest = json.loads((page.parent / "layer-removal.json").read_text())
    assert manifest["model"]["id"] == "tiny"
    assert manifest["model"]["config"]["num_hidden_layers"] == 4
    assert len(manifest["model"]["weights_sha256"]) == 64
    assert (manifest["pairs_sha256"], manifest["n_pairs"]) == (pairs()[::2].hash(), 2)
    assert manifest["held_out_sha256"] == pairs()[1::2].hash()
    assert manifest["options"] == {"steps": 1, "rows": 128}
    assert (manifest["device"], manifest["dtype"], manifest["kernels"]) == ("cpu", "float32", [])
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["wall_seconds"] > 0
    assert {"torch", *(wanted.name for wanted in requirements())} <= manifest["versions"].keys()
    assert manifest["command"] == shlex.join(sys.argv)
    assert manifest["machine"]["cores"] >= 1
    assert manifest["machine"]["memory_mib"] > manifest["peak_memory_mib"]
    assert len(manifest["machine"]["cpu"]) > 2
    root = Path(runs.__file__).parents[2]
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert (manifest["commit"] or "").removesuffix("+changes") == (head.stdout.strip() if head.returncode == 0 else "")
    assert 50 < manifest["peak_memory_mib"] < 1e6
    assert manifest["rows"] == len(pd.read_parquet(page.parent / "layer-removal.parquet"))


def test_a_system_that_does_not_tell_the_peak_memory_leaves_it_open(tiny_mamba, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "resource", None)
    page = run(tiny_mamba, tmp_path)
    assert read_manifest(tmp_path / "layer-removal.json")["peak_memory_mib"] is None
    assert "Peak memory" not in page.read_text()


def test_own_pairs_are_judged_on_pairs_that_were_not_chosen_on(tiny_mamba, tmp_path):
    given = run(tiny_mamba, tmp_path / "given", held_out=pairs(9))
    manifest = json.loads((given.parent / "layer-removal.json").read_text())
    assert (manifest["pairs_sha256"], manifest["held_out_sha256"]) == (pairs().hash(), pairs(9).hash())
    assert pd.read_parquet(given.parent / "layer-removal.parquet")["valid_accuracy"].notna().any()
    with pytest.raises(InputError, match=r"layer-removal chooses .* two pairs or more"):
        run(tiny_mamba, tmp_path / "one", pairs=pairs(n_pairs=1))
    assert not (tmp_path / "one").exists()


def test_the_weights_hash_sees_every_byte_name_and_dtype(tiny_mamba_dir):
    model = im.open_model(str(tiny_mamba_dir), device="cpu")
    before = probe(model)["weights_sha256"]
    assert before == probe(im.open_model(str(tiny_mamba_dir), device="cpu"))["weights_sha256"]
    weight = model._module.backbone.layers[3].mixer.D.data
    weight[-1] = torch.nextafter(weight[-1], torch.tensor(9.0))
    changed = probe(model)["weights_sha256"]
    assert changed != before
    assert probe(im.open_model(str(tiny_mamba_dir), device="cpu", dtype="bfloat16"))["weights_sha256"] != before


def test_resume_keeps_a_finished_table(tiny_mamba, tmp_path, counted):
    run(tiny_mamba, tmp_path)
    table = (tmp_path / "layer-removal.parquet").read_bytes()
    run(tiny_mamba, tmp_path, resume=True)
    assert counted == [1]
    assert (tmp_path / "layer-removal.parquet").read_bytes() == table
    with pytest.raises(InputError, match="holds a finished table of layer-removal: --resume keeps it"):
        run(tiny_mamba, tmp_path)
    assert counted == [1]
    run(tiny_mamba, tmp_path, overwrite=True)
    assert counted == [1, 1]


def damage(name):
    def do(out):
        path = out / name
        path.write_bytes(path.read_bytes()[:-7])

    return do


@pytest.mark.parametrize(
    "before",
    [
        damage("layer-removal.parquet"),
        damage("layer-removal.json"),
        lambda out: (out / "layer-removal.parquet").unlink(),
    ],
    ids=["table cut off", "manifest cut off", "table gone"],
)
def test_resume_runs_again_what_is_not_whole(tiny_mamba, tmp_path, counted, before):
    run(tiny_mamba, tmp_path)
    before(tmp_path)
    run(tiny_mamba, tmp_path, resume=True)
    assert len(counted) == 2
    assert read_manifest(tmp_path / "layer-removal.json") is not None


def test_no_experiment_at_all_is_refused_before_anything_is_written(tiny_mamba, tmp_path):
    with pytest.raises(InputError, match="No experiment is named: give at least one"):
        runs.run_study(tiny_mamba, [], tmp_path / "out", pairs=pairs(), progress=False)
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_is_refused_before_anything_is_written(tiny_mamba, tmp_path):
    with pytest.raises(InputError, match=r"Unknown option 'stepps'.*layer-removal: steps, rows"):
        run(tiny_mamba, tmp_path / "out", options={"stepps": 1})
    assert not (tmp_path / "out").exists()


def test_tokens_outside_the_vocabulary_are_refused_before_anything_is_written(tiny_mamba, tmp_path):
    foreign = Pairs.from_tokens([[0, VOCAB]], [[0, 1]], [1], [2])
    with pytest.raises(InputError, match=f"token {VOCAB}, and the model's vocabulary has {VOCAB}"):
        run(tiny_mamba, tmp_path / "out", pairs=foreign)
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_nothing_half_written(tiny_mamba, tmp_path, monkeypatch):
    def cut_off(self, path, **_):
        path.write_text("half a tab")
        raise OSError("the disk is full")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", cut_off)
    with pytest.raises(OSError, match="disk is full"):
        run(tiny_mamba, tmp_path)
    # What was computed is there for --resume.
    assert [path.name for path in tmp_path.iterdir()] == ["chunks"]
    assert not list((tmp_path / "chunks").glob(".*"))


def test_a_file_that_is_replaced_stays_whole_when_the_replacement_fails(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("whole")

    def fail():
        with files.written_whole(path) as temporary:
            temporary.write_text("hal")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_held_out_prompts_come_from_the_next_seed(tiny_mamba, tmp_path, monkeypatch):
    asked = []

    def drawn(tokenizer, n_pairs, seed):
        asked.append((n_pairs, seed))
        return pairs(first=seed, n_pairs=n_pairs)

    monkeypatch.setattr(layer_removal, "EXPERIMENT", replace(layer_removal.EXPERIMENT, draws={"ioi": drawn}))
    page = run(tiny_mamba, tmp_path, pairs=None, n_pairs=4, seed=5)
    assert asked == [(4, 5), (4, 6)]
    table = pd.read_parquet(page.parent / "layer-removal.parquet")
    assert table.loc[table["mode"] == "greedy", "valid_accuracy"].notna().all()


def test_progress_is_one_line_an_analysis_on_stderr(tiny_mamba, tmp_path, capsys):
    run(tiny_mamba, tmp_path, progress=True)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "100%" in printed.err


def test_progress_in_a_log_is_told_with_its_rate(caplog, monkeypatch):
    monkeypatch.setattr(runs, "_OFTEN", 0.0)
    with caplog.at_level(logging.DEBUG, "ioi_mamba"), runs._progress_bar("x", False) as advance:
        advance(3, 10)
    assert re.search(r"x: 3 of 10 steps, [\d.e+]+ a second", caplog.messages[0])
    assert caplog.messages[-1].startswith("x: done in ")
