"""MambaLens on a model of the same sizes and the same prompts: `python -m bench.peers --venv DIR`.

DIR is a virtual environment of its own with `mamba-lens==0.0.4`, `transformer-lens<2`, `typeguard`, `transformers==4.44.2`,
`numpy<2`, `pyarrow<18`, `pandas<2.3` and `datasets<3`. MambaLens patches `hook_layer_input` by batched hooks, a pass
a cell, at some of the cells: each costs the same. Ours sweeps all, because its passes share what they start from. Each side's seconds are divided by plain forwards of the stock model in its
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

# Runs in the other environment, with nothing of this package; prints one ratio. Seconds do not depend on the weights,
# so theirs are random and only the sizes are the same.
THEIRS = """
import json, sys, time, torch
from types import SimpleNamespace
from mamba_lens.HookedMamba import HookedMamba, MambaCfg
from transformers import MambaForCausalLM
torch.set_num_threads(1)
directory, tokens_file, cells = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
clean, corrupted = torch.load(tokens_file)
stock = MambaForCausalLM.from_pretrained(directory).eval()
sizes = MambaCfg(stock.config.hidden_size, stock.config.num_hidden_layers, stock.config.vocab_size, device="cpu")
hooked = HookedMamba(sizes, tokenizer=SimpleNamespace(pad_token=" ", eos_token=" "))
for name, parameter in hooked.named_parameters():
    parameter.data.normal_(std=0.02)
    if name.endswith("A_log"):
        parameter.data.add_(torch.arange(1.0, 17.0).log())
names = sorted({f"blocks.{l}.hook_layer_input" for l, _ in cells})
clock = time.process_time
def plain():
    started = clock()
    with torch.no_grad():
        stock(clean, use_cache=False)
    return clock() - started
with torch.no_grad():
    _, cache = hooked.run_with_cache(corrupted, names_filter=names)
    def cell(l, p):
        def hook(x, hook):
            x[:, p] = cache[hook.name][:, p]
            return x
        started = clock()
        hooked.run_with_hooks(clean, fwd_hooks=[(f"blocks.{l}.hook_layer_input", hook)])
        return clock() - started
    plain(); cell(*cells[0])
    plains, patched = [], []
    for l, p in cells:
        plains.append(plain())
        patched.append(cell(l, p))
print(json.dumps(sum(patched) / sum(plains)))
"""


def ours(model, pairs) -> float:
    own = shapes.stock(model)

    def plain():
        with torch.no_grad():
            own(pairs.clean, use_cache=False)

    def work(tick) -> float:
        return resample_sweep(model, pairs, "layer_input", progress=tick)[..., 0].numel() / len(pairs)

    warm = lambda: resample_sweep(model, pairs, "layer_input", positions=[shapes.POSITIONS - 1])
    return timing.measure(plain, work, warm=warm, seconds=1, most=1).ratio


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
        found = ours(model, pairs)
    lines = [
        "| sweep over layers and positions | plain forwards a cell |",
        "|---|---|",
        f"| MambaLens 0.0.4, batched hooks ({len(cells)} cells, each a pass) | {theirs:.2f} |",
        f"| this package (all cells) | {found:.2f} |",
    ]
    print("\n".join(lines))
    about = f"{timing.machine()}. {time.strftime('%Y-%m-%d')}, load {timing.load()}. `python -m bench.peers`, "
    about += f"{arguments.shape}, {arguments.pairs} pairs."
    timing.write_section("Peers", about + "\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
