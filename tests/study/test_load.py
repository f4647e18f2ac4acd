"""A long session: 1,000 traces and 50 experiments in one process leave memory and file handles where they were."""

import os
from pathlib import Path

import numpy as np
import processes
import pytest
import torch

import ioi_mamba as im
from ioi_mamba.analyses import layer_ablation, layer_removal
from ioi_mamba.tasks.base import Pairs

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_kib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 1024


def handles():
    return len(os.listdir("/proc/self/fd"))


def slope(sizes):
    """KiB a step, the first tenth left out."""
    kept = sizes[len(sizes) // 10 :]
    return float(np.polyfit(range(len(kept)), kept, 1)[0])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_and_handles_stay_flat_over_traces_and_experiments(tiny_mamba, tried, record_property):
    tokens = torch.arange(1, 16).reshape(3, 5)
    pairs = Pairs(clean=tokens, corrupted=tokens.flip(1), answer=torch.arange(3) + 20, wrong=torch.arange(3) + 27)
    edits = {"blocks.1.hook_h.2": lambda h: h * 0, "blocks.2.hook_conv_slice.-1": lambda x: x * 0.5}
    im.run(tiny_mamba, tokens, edits)
    before, sizes = handles(), []
    for _ in range(1000):
        im.run(tiny_mamba, tokens, edits)
        sizes.append(resident_kib())
    traces = slope(sizes)
    sizes = []
    for k in range(50):
        (layer_ablation.EXPERIMENT if k % 2 else layer_removal.EXPERIMENT)(tiny_mamba, pairs)
        sizes.append(resident_kib())
    experiments = slope(sizes)
    tried("a trace in one process", 1000)
    tried("an experiment in one process", 50)
    record_property("seen", f"memory grew by {traces:.2f} KiB a trace and {experiments:.0f} KiB an experiment")
    assert traces < 8
    assert experiments < 200
    assert handles() <= before + 2


def test_two_processes_read_one_model_directory_at_once(tiny_mamba_dir, pairs_file, tmp_path, tried):
    flags = ["run", "layer-removal", "--model", tiny_mamba_dir, "--pairs", pairs_file, "--device", "cpu"]
    both = [processes.Command(*flags, "--out", tmp_path / out) for out in "ab"]
    for command in both:
        assert command.end() == 0, command.printed
    a, b = ((tmp_path / out / "layer-removal.parquet").read_bytes() for out in "ab")
    assert a == b
    tried("two processes on one model directory", 1)
