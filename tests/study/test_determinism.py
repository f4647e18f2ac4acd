"""The same inputs give the same tables, and nothing of the user's own process is changed."""

import os
import random
import subprocess
import sys

import numpy as np
import pandas as pd
import processes
import torch
from conditioning import assert_same_effects, logit_rounding, widest

import ioi_mamba as im
from ioi_mamba.analyses import edge_attribution, layer_ablation, layer_removal, name_steering
from ioi_mamba.study.runs import run_study
from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import Pairs

DOCUMENTED = {"USE_HUB_KERNELS", "TORCHINDUCTOR_CACHE_DIR"}  # ours, as `models.open_model` says; and torch's own
NAMES = ["layer-removal", "layer-ablation", "edge-attribution"]


def pairs(n=3):
    tokens = torch.arange(1, 1 + 5 * n).reshape(n, 5)
    answer = torch.arange(n) + 20
    return Pairs(clean=tokens, corrupted=tokens.flip(1), answer=answer, wrong=answer + 7)


def test_two_processes_write_the_same_bytes(tiny_mamba_dir, pairs_file, tmp_path, tried):
    flags = ["--model", tiny_mamba_dir, "--pairs", pairs_file, "--device", "cpu"]
    for out in "ab":
        command = processes.Command("run", *NAMES[:2], *flags, "--out", tmp_path / out)
        assert command.end() == 0, command.printed
    for name in NAMES[:2]:
        assert (tmp_path / f"a/{name}.parquet").read_bytes() == (tmp_path / f"b/{name}.parquet").read_bytes()
    tried("the same table from two processes, byte for byte", 2)


def test_a_run_repeated_in_one_process_writes_the_same_bytes(tiny_mamba, tmp_path, tried):
    for out in "ab":
        run_study(tiny_mamba, NAMES[:2], tmp_path / out, pairs=pairs(), progress=False)
    for name in NAMES[:2]:
        assert (tmp_path / f"a/{name}.parquet").read_bytes() == (tmp_path / f"b/{name}.parquet").read_bytes()
    tried("the same table twice from one process, byte for byte", 2)


def test_a_second_thread_changes_tables_by_no_more_than_rounding(tiny_mamba, tried):
    tables, given = [], widest(tiny_mamba, pairs())
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            tables.append(
                (layer_ablation.EXPERIMENT(tiny_mamba, given), layer_removal.EXPERIMENT(tiny_mamba, given, steps=1))
            )
    finally:
        torch.set_num_threads(1)
    (effects, removed), (other_effects, other_removed) = tables
    assert_same_effects(other_effects, effects, tiny_mamba, given)
    # A probability moves by less than the difference of logits that it is taken from.
    rounding = 2 * logit_rounding(tiny_mamba, given.clean)
    pd.testing.assert_frame_equal(removed, other_removed, atol=rounding, rtol=0)
    tried("one thread and two, but for rounding", 2)


def test_running_touches_no_global_generator_variable_or_default(tiny_mamba_dir, tmp_path, tried):
    def now():
        return {
            "torch": torch.get_rng_state().tolist(),
            "random": random.getstate(),
            "numpy": str(np.random.get_state()),  # noqa: NPY002  the global one is what is watched
            "environment": {
                key: value for key, value in os.environ.items() if key not in DOCUMENTED | {"PYTEST_CURRENT_TEST"}
            },
            "dtype": torch.get_default_dtype(),
            "device": torch.get_default_device(),
            "gradients": torch.is_grad_enabled(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "threads": torch.get_num_threads(),
            "directory": os.getcwd(),
        }

    before = now()
    model = im.open_model(str(tiny_mamba_dir), device="cpu")
    assert before == now()
    run_study(model, NAMES[:2], tmp_path, pairs=pairs(), progress=False)
    im.attribute(model, pairs(), parts=True, steps=2)
    im.run(model, pairs().clean, {"blocks.1.hook_B_bar": lambda x: x * 0})
    mini = im.open_model("mini", device="cpu")
    for module in (name_steering, edge_attribution):
        module.EXPERIMENT.draw(mini.tokenizer, 2, 27, ioi.TASK)
    assert before == now()
    tried("global state after opening, running and drawing", 10)


def test_importing_changes_no_variable_generator_or_default(tried):
    code = (
        "import os, random, signal, torch, numpy as np, transformers, nnsight, pandas\n"
        "now = lambda: (dict(os.environ), random.getstate(), torch.get_rng_state().tolist(), str(np.random.get_state()),"
        " torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_device(),"
        " torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(), os.getcwd(),"
        " signal.getsignal(signal.SIGINT))\n"
        "before = now()\n"
        "import ioi_mamba.cli.main, ioi_mamba.cli.commands.run, ioi_mamba.study.perform, ioi_mamba.report.pages\n"
        "from ioi_mamba import analyses\n"
        "[analyses.load(name) for name in analyses.available()]\n"
        "assert now() == before\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        # The tests set the variables that are ours themselves: the child must not have them beforehand.
        env={key: value for key, value in os.environ.items() if key not in DOCUMENTED}
        | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    tried("global state after importing", 12)
