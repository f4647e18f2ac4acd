"""Work inside of an experiment that was cut off: what was finished is not computed again, and nobody else gets it."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest
import torch
from conftest import tiny_mamba_dir  # noqa: F401
from processes import Command, small_chunks

import ioi_mamba as im
from ioi_mamba import analyses
from ioi_mamba.model import jobs, memory
from ioi_mamba.passes.ablations import ABLATIONS
from ioi_mamba.passes.sweep import swept_logit_diffs
from ioi_mamba.remote.store import Scratch, Store
from ioi_mamba.results.stored import read_manifest
from ioi_mamba.study import runs
from ioi_mamba.tasks import ioi

FEW = {"compare_prompts": 0, "exact_prompts": 2, "part_prompts": 2, "steps": 2, "threshold": 0.9, "target": 0}
INSIDE = (
    "layer-ablation",
    "layer-removal",
    "circuit-search",
    "token-flow",
)  # a sweep, a greedy search, an exact one, gradients


def options(name):
    known = analyses.load(name).options.__dataclass_fields__
    return [word for key, value in FEW.items() if key in known for word in ("--option", f"{key}={value}")]


def command(name, directory, out, *more, dies=None):
    arguments = ["run", name, "--model", directory, "--n-pairs", "4", "--device", "cpu", *options(name), "--out", out]
    return Command(*arguments, *more, dies=dies, set_up=small_chunks)


@pytest.mark.parametrize("name", INSIDE)
def test_chunks_that_were_finished_before_a_kill_are_not_computed_again(name, reads_names, tmp_path, tried):
    whole = command(name, reads_names, tmp_path / "whole")
    assert whole.end() == 0, whole.printed
    n_chunks = read_manifest(tmp_path / "whole" / f"{name}.json")["chunks"]
    assert n_chunks["computed"] >= 4
    out, done = tmp_path / "cut", 0
    for finished in (2, 1):  # killed twice, the second time after one more
        killed = command(name, reads_names, out, "--resume", dies=(finished, "after", ".chunk"))
        assert killed.end() == -signal.SIGKILL, killed.printed
        done += finished
        assert len(list((out / "chunks").glob("*.chunk"))) == done
    resumed = command(name, reads_names, out, "--resume")
    assert resumed.end() == 0, resumed.printed
    chunks = read_manifest(out / f"{name}.json")["chunks"]
    # What an experiment asks for twice is kept in an undisturbed run too.
    assert chunks == n_chunks | {"kept": n_chunks["kept"] + done, "computed": n_chunks["computed"] - done}
    assert (out / f"{name}.parquet").read_bytes() == (tmp_path / "whole" / f"{name}.parquet").read_bytes()
    assert not (out / "chunks").exists()
    tried("kill -9 inside of an experiment", 2)


@pytest.fixture
def five_chunks(monkeypatch):
    monkeypatch.setattr(memory, "BUSY", 0)
    monkeypatch.setattr(memory, "TOKENS", 0)
    monkeypatch.setattr(memory, "CHUNKS", 5)


@pytest.fixture
def small(tiny_mamba):
    return tiny_mamba


def taken(model, directory, pairs, weights="a", **options):
    """How many chunks of a sweep came from the store; those of the first call of this fill it."""
    with jobs.keeping(model, Store(directory, {"weights_sha256": weights})) as here:
        swept_logit_diffs(model, pairs, "layer_input", **options)
        return here.kept


def test_a_run_of_other_pairs_options_or_weights_takes_none_of_anothers_chunks(mini, five_chunks, tmp_path):
    pairs, other = (ioi.generate(mini.tokenizer, 5, seed, templates=ioi.ALIGNED_TEMPLATES) for seed in (27, 28))
    pairs, other = (each.layouts()[0] for each in (pairs, other))
    few = {"layers": [6], "positions": [3, 9]}
    assert taken(mini, tmp_path, pairs, **few) == 0
    everything = taken(mini, tmp_path, pairs, **few)
    assert everything == len(list(tmp_path.glob("*.chunk"))) > 5
    # The plain passes of these pairs, which they have in common; the sweep itself is another.
    plain = everything - 5
    assert taken(mini, tmp_path, pairs, layers=[5], positions=[3, 9]) == plain
    assert taken(mini, tmp_path, pairs, layers=[6], positions=[3, 8]) == plain
    assert taken(mini, tmp_path, pairs, **few, ablation="zero") == plain
    assert taken(mini, tmp_path, pairs, **few, resume=False) == plain
    assert taken(mini, tmp_path, other, **few) == 0
    assert taken(mini, tmp_path, pairs, weights="b", **few) == 0
    swapped = replace(pairs, answer=pairs.wrong, wrong=pairs.answer)
    assert taken(mini, tmp_path, swapped, **few) == 0


def test_a_chunk_that_is_not_as_it_was_written_is_computed_again(mini, five_chunks, tmp_path):
    pairs = ioi.generate(mini.tokenizer, 5, 27, templates=ioi.ALIGNED_TEMPLATES).layouts()[0]
    few = {"layers": [6], "positions": [3, 9]}
    want = swept_logit_diffs(mini, pairs, "layer_input", **few)
    taken(mini, tmp_path, pairs, **few)
    files = sorted(tmp_path.glob("*.chunk"))
    for path, broken in zip(files, (lambda b: b[:-1] + b"!", lambda b: b[: len(b) // 2], lambda b: b""), strict=False):
        path.write_bytes(broken(path.read_bytes()))
    with jobs.keeping(mini, Store(tmp_path, {"weights_sha256": "a"})) as here:
        got = swept_logit_diffs(mini, pairs, "layer_input", **few)
    assert (here.computed, here.kept) == (3, len(files) - 3)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_the_name_of_a_chunk_is_its_content(tmp_path):
    store, pairs = Store(tmp_path, {}), im.Pairs.from_tokens([[0, 1]], [[0, 2]], [1], [2])
    whole = (pairs, "h", [1, 2], {"a": torch.zeros(2)}, ABLATIONS["zero"], Scratch())
    name = store.key(swept_logit_diffs, whole)
    assert name == store.key(swept_logit_diffs, (*whole[:5], Scratch({"kept": torch.ones(9)})))
    others = [
        (im.Pairs.from_tokens([[0, 1]], [[0, 3]], [1], [2]), *whole[1:]),
        (pairs, "y", *whole[2:]),
        (*whole[:2], [1, 3], *whole[3:]),
        (*whole[:3], {"b": torch.zeros(2)}, *whole[4:]),
        (*whole[:3], {"a": torch.zeros(2, dtype=torch.float64)}, *whole[4:]),
        (*whole[:3], {"a": torch.zeros(1, 2)}, *whole[4:]),
        (*whole[:4], ABLATIONS["mean"], whole[5]),
    ]
    names = {store.key(swept_logit_diffs, each) for each in others}
    names |= {store.key(runs.run_study, whole), Store(tmp_path, {"dtype": "float64"}).key(swept_logit_diffs, whole)}
    assert name not in names
    assert len(names) == len(others) + 2


def test_a_function_made_in_another_has_no_name_and_is_not_kept(tmp_path):
    def local():
        return None

    store = Store(tmp_path, {})
    assert store.key(swept_logit_diffs, (local,)) is None
    store.put(None, torch.zeros(1))
    assert store.get(None) is None
    assert not list(tmp_path.iterdir())
