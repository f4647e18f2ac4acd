"""The estimate of memory and the refusal that rests on it; and that no pass leaves tensors behind."""

import gc
import warnings
from pathlib import Path

import golden
import pytest
import torch

import ioi_mamba as im
from ioi_mamba.circuits.graph import universe_of
from ioi_mamba.circuits.scoring import Evaluator
from ioi_mamba.errors import InputError
from ioi_mamba.model import memory
from ioi_mamba.model.memory import PASSES, check_fits, needed_mib, row_mib, rows_per_pass
from ioi_mamba.passes.sweep import resample_sweep
from ioi_mamba.study import runs


@pytest.mark.parametrize("kind", PASSES)
def test_rows_of_a_pass_shrink_with_its_length_and_are_never_none(kind):
    model = golden.model()
    assert rows_per_pass(model, 20, kind) > rows_per_pass(model, 200, kind) > 1
    assert rows_per_pass(model, 20, kind, budget_mib=0) == 1
    rows = rows_per_pass(model, 20, kind, budget_mib=100)
    assert rows * row_mib(model, 20, kind) <= 100 < (rows + 1) * row_mib(model, 20, kind)


@pytest.mark.parametrize("kind", PASSES)
def test_an_estimate_grows_with_pairs_and_positions(kind):
    model = golden.model()
    assert needed_mib(model, 1, 20, kind) < needed_mib(model, 40, 20, kind) < needed_mib(model, 40, 200, kind)


@pytest.mark.parametrize("kind", PASSES)
def test_a_refusal_names_the_most_pairs_that_fit(monkeypatch, kind):
    model = golden.model()
    monkeypatch.setattr(memory, "available_mib", lambda _: needed_mib(model, 7, 50, kind))
    check_fits(model, 7, 50, kind, "an experiment")
    with pytest.raises(InputError, match=r"an experiment with 8 pairs of 50 tokens .* use --n-pairs 7\."):
        check_fits(model, 8, 50, kind, "an experiment")


def test_where_no_number_of_pairs_fits_the_refusal_says_so(monkeypatch):
    monkeypatch.setattr(memory, "available_mib", lambda _: 0.001)
    with pytest.raises(InputError, match="use shorter prompts"):
        check_fits(golden.model(), 8, 50, "sweep", "an experiment")


def test_where_memory_cannot_be_asked_for_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "available_mib", lambda _: None)
    check_fits(golden.model(), 10**9, 50, "sweep", "an experiment")


@pytest.mark.skipif(not Path("/proc/meminfo").is_file(), reason="memory is read from Linux")
def test_what_is_free_is_less_than_what_the_machine_has():
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) for line in lines if line.startswith("MemTotal")) / 1024
    assert 0 < memory.available_mib(golden.model()) < total


def test_a_study_refuses_before_it_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "available_mib", lambda _: 0.001)
    with pytest.raises(InputError, match="layer-ablation with 4 pairs"):
        runs.run_study(golden.model(), ["layer-ablation"], tmp_path, pairs=golden.random_pairs("golden"))
    assert list(tmp_path.iterdir()) == []


WORK = {
    "run": lambda model, pairs: im.run(model, pairs.clean, {"blocks.1.hook_y": lambda y: y * 0}),
    "sweep": lambda model, pairs: resample_sweep(model, pairs, "h", layers=[1], positions=[2, 5]),
    "attribution": lambda model, pairs: im.attribute(model, pairs, positions=True, parts=True).table,
    "edges": lambda model, pairs: Evaluator(model, pairs, universe_of(model, parts=True)).exact_effects(
        universe_of(model, parts=True).items()
    ),
}


def live_tensors():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())


@pytest.mark.parametrize("name", WORK)
def test_what_a_pass_held_is_gone_with_it_and_does_not_wait_for_the_garbage_collector(name):
    model, pairs = golden.model(), golden.random_pairs("golden")
    WORK[name](model, pairs)
    gc.collect()
    gc.disable()
    try:
        before = live_tensors()
        for _ in range(3):
            WORK[name](model, pairs)
        assert live_tensors() == before
    finally:
        gc.enable()


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="memory is read from Linux")
def test_a_hundred_traces_do_not_make_the_process_grow():
    model, pairs = golden.model(), golden.random_pairs("golden")
    resident = []
    for k in range(120):
        im.run(model, pairs.clean, {"blocks.1.hook_h.3": lambda h: h * 0})
        if k % 20 == 19:
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20)
    # MiB; one pass' activations here are more than 1 MiB, so a leak of each would add 100.
    assert resident[-1] - resident[0] < 10
