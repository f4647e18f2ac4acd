"""MambaLens on the same weights and prompts, interleaved with ours: `python -m bench.peers --venv DIR`.

DIR is a virtual environment of its own with `mamba-lens==0.0.4`, `transformer-lens<2`, `transformers==4.44.2`,
`numpy<2`, `pyarrow<18`, `pandas<2.3` and `datasets<3`. MambaLens patches `hook_layer_input` at some cells by batched
hooks, a pass a cell, as its notebooks do. Each side's seconds are divided by plain forwards of the stock model in its
own process (its own transformers), because the two cannot share one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM

from ioi_mamba.errors import InputError
from ioi_mamba.sweep import resample_sweep

from . import shapes, timing

# Runs in the other environment, with nothing of this package; prints one ratio.
THEIRS = """
import json, sys, time, torch
from mamba_lens import HookedMamba
from transformers import AutoTokenizer, MambaForCausalLM
torch.set_num_threads(1)
directory, tokens_file, cells = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
clean, corrupted = torch.load(tokens_file)
stock = MambaForCausalLM.from_pretrained(directory)
hooked = HookedMamba.from_pretrained(directory, hf_model=stock, tokenizer=None, device="cpu")
names = sorted({f"blocks.{l}.hook_layer_input" for l, _ in cells})
clock = time.process_time
def plain():
    started = clock()
    with torch.no_grad():
        stock(clean, use_cache=False)
    return clock() - started
with torch.no_grad():
    _, cache = hooked.run_with_cache(corrupted, names_filter=lambda n: n in names, fast_ssm=True)
    def cell(l, p):
        def hook(x, hook):
            x[:, p] = cache[hook.name][:, p]
            return x
        started = clock()
        hooked.run_with_hooks(clean, fwd_hooks=[(f"blocks.{l}.hook_layer_input", hook)], fast_ssm=True)
        return clock() - started
    plain(); cell(*cells[0])
    plains, patched = [], []
    for l, p in cells:
        plains.append(plain())
        patched.append(cell(l, p))
print(json.dumps(sum(patched) / sum(plains)))
"""


def ours(model, pairs, cells) -> float:
    layers, positions = sorted({l for l, _ in cells}), sorted({p for _, p in cells})  # noqa: E741
    own = shapes.stock(model)

    def plain():
        with torch.no_grad():
            own(pairs.clean, use_cache=False)

    def work(tick) -> float:
        resample_sweep(model, pairs, "layer_input", layers=layers, positions=positions, progress=tick)
        return len(layers) * len(positions)

    return timing.measure(plain, work, seconds=1, most=1).ratio


def main() -> None:
    timing.prepare()
    parser = argparse.ArgumentParser(description="MambaLens beside this package.")
    parser.add_argument("--venv", type=Path, required=True, help="the environment with mamba-lens")
    parser.add_argument("--shape", default="mamba-130m", choices=list(shapes.SHAPES))
    parser.add_argument("--pairs", type=int, default=4)
    arguments = parser.parse_args()
    python = arguments.venv / "bin" / "python"
    if not python.is_file():
        raise InputError(f"{python} is not there: give --venv an environment with mamba-lens.")
    with shapes.opened(arguments.shape) as model, TemporaryDirectory() as directory:
        pairs = shapes.pairs_for(model, arguments.pairs)
        n = model.config.num_hidden_layers
        cells = [(l, p) for l in range(0, n, max(1, n // 6)) for p in range(1, shapes.POSITIONS, 3)]  # noqa: E741
        weights = AutoModelForCausalLM.from_config(model.config)
        weights.load_state_dict(model._module.state_dict())
        weights.save_pretrained(directory)
        tokens = Path(directory) / "tokens.pt"
        torch.save((pairs.clean, pairs.corrupted), tokens)
        command = [str(python), "-c", THEIRS, directory, str(tokens), json.dumps(cells)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.returncode)
        theirs = json.loads(done.stdout.splitlines()[-1])
        found = ours(model, pairs, cells)
    lines = [
        "| sweep over the same cells | plain forwards a cell |",
        "|---|---|",
        f"| MambaLens 0.0.4, batched hooks | {theirs:.2f} |",
        f"| this package | {found:.2f} |",
    ]
    print("\n".join(lines))
    about = f"{timing.machine()}. {time.strftime('%Y-%m-%d')}, load {timing.load()}. `python -m bench.peers`, "
    about += f"{arguments.shape}, {len(cells)} cells, {arguments.pairs} pairs."
    timing.write_section("Peers", about + "\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
