"""The same run on imitated processors: to the byte on one of them, but for rounding from one to another."""

import platform
import sys

import pandas as pd
import pytest
import torch
from conditioning import assert_same_effects, logit_rounding, widest
from conftest import write_pairs
from processors import PROCESSORS, on

import ioi_mamba as im

HERE = ""
TOKENS = [[7, 9, 11, 5, 6], [3, 9, 12, 4, 6], [5, 10, 11, 3, 6]]
LOGITS = """
import sys, torch, ioi_mamba as im
torch.set_num_threads(1)
model = im.open_model("mini", device="cpu")
pairs = im.ioi.generate(model.tokenizer, 2, seed=27, templates=im.ioi.ALIGNED_TEMPLATES, symmetric=True)
torch.save([im.run(model, pairs.clean, {}) for _ in range(2)], sys.argv[1])
"""

x86_only = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="the variables are those of libraries for x86 processors"
)


@x86_only
def test_imitated_processors_round_otherwise_and_by_no_more_than_the_tolerance(mini, tmp_path):
    logits = {}
    for k, name in enumerate([HERE, *PROCESSORS]):
        done = on(name, [sys.executable, "-c", LOGITS, tmp_path / str(k)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        logits[name], again = torch.load(tmp_path / str(k))
        assert torch.equal(logits[name], again), name
    # If this fails, a library has dropped its variable and nothing is imitated any more.
    assert len({value.numpy().tobytes() for value in logits.values()}) >= 2
    pairs = im.ioi.generate(mini.tokenizer, 2, seed=27, templates=im.ioi.ALIGNED_TEMPLATES, symmetric=True)
    rounding = logit_rounding(mini, pairs.clean)
    for name, value in logits.items():
        torch.testing.assert_close(value, logits[HERE], rtol=0, atol=rounding, msg=lambda text, name=name: name + text)


@x86_only
@pytest.mark.slow
def test_a_run_is_the_same_to_the_byte_on_each_processor_and_but_for_rounding_on_another(
    tiny_mamba, tiny_mamba_dir, tmp_path, tried
):
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, [(row, [row[0] + 1, *row[1:]], row[0], row[0] + 1) for row in TOKENS])
    pairs = widest(tiny_mamba, im.Pairs.from_jsonl(path, tiny_mamba.tokenizer))
    answers = zip(TOKENS, pairs.answer.tolist(), pairs.wrong.tolist(), strict=True)
    write_pairs(path, [(row, [row[0] + 1, *row[1:]], answer, wrong) for row, answer, wrong in answers])
    names = ("layer-ablation", "layer-removal")
    command = [sys.executable, "-m", "ioi_mamba", "run", *names, "--model", tiny_mamba_dir, "--pairs", path]
    tables = {}
    for k, processor in enumerate([HERE, *PROCESSORS]):
        outs = [tmp_path / f"{k}{run}" for run in "ab"]
        for out in outs:
            done = on(processor, [*command, "--device", "cpu", "--out", out], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        for name in names:
            first, second = ((out / f"{name}.parquet").read_bytes() for out in outs)
            assert first == second, (processor, name)
        tables[processor] = pd.read_parquet(outs[0] / "layer-ablation.parquet")
        assert_same_effects(tables[processor], tables[HERE], tiny_mamba, pairs)
    tried("a run repeated on an imitated processor, byte for byte; on another, but for rounding", 2 * len(tables))
