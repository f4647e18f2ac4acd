"""Other libraries on a model of the same sizes and the same prompts: `python -m bench.peers PEER --venv DIR`.

DIR is a virtual environment of its own with what the peer needs:

    mamba-lens           mamba-lens==0.0.4 "transformer-lens<2" typeguard transformers==4.44.2 "numpy<2" "pyarrow<18"
                         "pandas<2.3" "datasets<3"
    transformer-lens     transformer-lens==4.3.0 "torch<2.14"

The sweep: the peer patches the layer input (of a Mamba-2, what its norm reads) by hooks, a pass a cell, at some of the
cells, since each costs the same; ours sweeps all, because its passes share what they start from. With mamba-lens also
EAP-IG(5) over edges and positions as its hooks allow: corrupted outputs kept, then five forward and backward passes in
which layer inputs are interpolated. With transformer-lens also what its hooks inside the mixer can do: each is written,
and what that does to the logits is told. Each side's seconds are divided by plain passes of the stock model in its own
process, because the two cannot share one.
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

from ioi_mamba.circuits.attribution import Options, attributions
from ioi_mamba.errors import InputError

from . import shapes, timing
from .ratios import Bench

# What runs in the other environment, with nothing of this package, prints its ratios as JSON. Seconds do not depend on the
# weights, so those of mamba-lens are random and only the sizes are the same.
MAMBA_LENS = """
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
sweep = sum(patched) / sum(plains)

n = sizes.n_layers
sources = ["hook_embed", *(f"blocks.{l}.hook_out_proj" for l in range(n))]
sinks = [*(f"blocks.{l}.hook_layer_input" for l in range(n)), f"blocks.{n - 1}.hook_resid_post"]
hooked.requires_grad_(False)
stock.requires_grad_(False)

def forward_backward():
    started = clock()
    embedded = stock.backbone.embeddings(clean).requires_grad_()
    torch.autograd.grad(stock(inputs_embeds=embedded, use_cache=False).logits[:, -1].sum(), embedded)
    return clock() - started

def attribution(steps=5):
    started = clock()
    with torch.no_grad():
        _, cache = hooked.run_with_cache(corrupted, names_filter=sources)
    scores = {}
    for alpha in torch.linspace(0, 1, steps).tolist():
        outputs, inputs = {}, {}
        def keep(x, hook):
            outputs[hook.name] = x = x if x.requires_grad else x.requires_grad_()
            return x
        def sink(x, hook):
            for name in sources[: sinks.index(hook.name) + 1]:
                x = x + alpha * (cache[name] - outputs[name])
            inputs[hook.name] = x
            return x
        hooks = [(name, keep) for name in sources] + [(name, sink) for name in sinks]
        logits = hooked.run_with_hooks(clean, fwd_hooks=hooks)
        gradients = torch.autograd.grad(logits[:, -1].sum(), [inputs[name] for name in sinks])
        with torch.no_grad():
            for j, gradient in enumerate(gradients):
                for name in sources[: j + 1]:
                    product = (gradient * (cache[name] - outputs[name])).sum(-1) / steps
                    scores[name, j] = scores.get((name, j), 0) + product
    return clock() - started

forward_backward(); attribution(2)
plains, attributed = [], []
for _ in range(2):
    plains.append(forward_backward())
    attributed.append(attribution())
print(json.dumps([[sweep, sum(attributed) / sum(plains)]]))
"""

TRANSFORMER_LENS = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM
from transformer_lens.model_bridge import TransformerBridge
torch.set_num_threads(1)
directory, tokens_file, cells = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
clean, corrupted = torch.load(tokens_file)
stock = AutoModelForCausalLM.from_pretrained(directory).eval()
bridged = AutoModelForCausalLM.from_pretrained(directory).eval()
bridge = TransformerBridge.boot_transformers(directory, hf_model=bridged, device="cpu", dtype=torch.float32)
clock = time.process_time
def plain():
    started = clock()
    with torch.no_grad():
        stock(clean, use_cache=False)
    return clock() - started
names = sorted({f"blocks.{l}.norm.hook_in" for l, _ in cells})
with torch.no_grad():
    _, cache = bridge.run_with_cache(corrupted, names_filter=lambda name: name in names)
    def cell(l, p):
        name = f"blocks.{l}.norm.hook_in"
        def hook(x, hook):
            x = x.clone()
            x[:, p] = cache[name][:, p]
            return x
        started = clock()
        bridge.run_with_hooks(clean, fwd_hooks=[(name, hook)])
        return clock() - started
    plain(); cell(*cells[0])
    plains, patched = [], []
    for l, p in cells:
        plains.append(plain())
        patched.append(cell(l, p))
    layer = cells[len(cells) // 2][0]
    inside = [name for name in bridge.hook_dict if name.startswith(f"blocks.{layer}.mixer.")]
    before, written = bridge(clean[:1]), {}
    for name in inside:
        ran = []
        def noise(x, hook):
            ran.append(True)
            return x + x.std() * torch.randn_like(x)
        try:
            after = bridge.run_with_hooks(clean[:1], fwd_hooks=[(name, noise)])
            written[name.partition("mixer.")[2]] = float((after - before).abs().max()) if ran else None
        except Exception as error:
            written[name.partition("mixer.")[2]] = type(error).__name__
print(json.dumps([[sum(patched) / sum(plains)], written]))
"""

PEERS = {"mamba-lens": ("MambaLens 0.0.4", MAMBA_LENS), "transformer-lens": ("TransformerLens 4.3", TRANSFORMER_LENS)}
HEADS = ("sweep over layers and positions, plain forwards a cell", "EAP-IG(5) of edges, plain forward + backward")


def ours(model, shape: str, n_pairs: int, gradients: bool) -> list[float]:
    """The same ratios with this package, on the same pairs."""
    bench = Bench(model, shape, n_pairs=n_pairs)
    plain, sweep, warm, _ = bench.sweep()
    found = [timing.measure(plain, sweep, warm=warm, seconds=1, most=1).ratio]
    if not gradients:
        return found

    def work(tick) -> float:
        attributions(model, bench.pairs, Options(positions=True))
        return 1

    return [*found, timing.measure(bench.forward_backward(bench.pairs), work, seconds=1, most=2).ratio]


def _in_words(written: dict[str, float | str | None]) -> str:
    """What noise at each of a peer's hooks inside a mixer does to the logits."""
    moved = [f"`{name}` ({change:.2g})" for name, change in written.items() if isinstance(change, float) and change > 0]
    still = [f"`{name}`" for name, change in written.items() if change == 0]
    never = [f"`{name}`" for name, change in written.items() if change is None]
    failed = [f"`{name}` ({change})" for name, change in written.items() if isinstance(change, str)]
    told = {"moves the logits": moved, "does not": still, "is never called": never, "fails": failed}
    return "; ".join(f"{what} at {', '.join(names)}" for what, names in told.items() if names)


def main() -> None:
    timing.prepare()
    parser = argparse.ArgumentParser(description="Another library beside this package.")
    parser.add_argument("peer", choices=list(PEERS), nargs="?", default="mamba-lens")
    parser.add_argument("--venv", type=Path, required=True, help="the environment with the peer")
    parser.add_argument("--shape", default="mamba-130m", choices=list(shapes.SHAPES))
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--cells", type=int, default=42, help="about how many cells the peer patches (default: 42)")
    arguments = parser.parse_args()
    name, script = PEERS[arguments.peer]
    python = arguments.venv / "bin" / "python"
    if not python.is_file():
        raise InputError(f"{python} is not there: give --venv an environment with {arguments.peer}.")
    with shapes.opened(arguments.shape) as model, TemporaryDirectory() as directory:
        pairs = shapes.pairs_for(model, arguments.pairs)
        n = model.config.num_hidden_layers
        cells = [(l, p) for l in range(0, n, max(1, n // 6)) for p in range(1, shapes.POSITIONS, 3)]  # noqa: E741
        cells = cells[:: max(1, len(cells) // arguments.cells)]
        weights = AutoModelForCausalLM.from_config(model.config)
        weights.load_state_dict(model._module.state_dict())
        weights.save_pretrained(directory)
        tokens = Path(directory) / "tokens.pt"
        torch.save((pairs.clean, pairs.corrupted), tokens)
        command = [str(python), "-c", script, directory, str(tokens), json.dumps(cells)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.returncode)
        theirs, *written = json.loads(done.stdout.splitlines()[-1])
        found = ours(model, arguments.shape, arguments.pairs, gradients=len(theirs) > 1)
    heads = HEADS[: len(theirs)]
    row = lambda label, numbers: f"| {label} | {' | '.join(f'{number:.2f}' for number in numbers)} |"
    lines = [
        f"| | {' | '.join(heads)} |",
        "|---|" + "---|" * len(heads),
        row(f"{name}, hooks ({len(cells)} cells, each a pass)", theirs),
        row("this package (all cells)", found),
    ]
    lines += [f"\nNoise of one standard deviation inside a mixer, by {name}: {_in_words(each)}." for each in written]
    print("\n".join(lines))
    about = f"{timing.machine()}. {time.strftime('%Y-%m-%d')}, load {timing.load()}. `python -m bench.peers {arguments.peer}`, "
    about += f"{arguments.shape}, {arguments.pairs} pairs."
    timing.write_section(f"Peers: {name}", about + "\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
