"""What each experiment's work costs, in plain stock forwards of the same rows: `python -m bench.ratios [SHAPE ...]`.

Shapes: small, mini, mamba-130m, with --large mamba-370m, and by name mamba2-130m and mamba2-370m; all but `mini` have random
weights. Every figure is the median of repeats that alternate with the yardstick, one stock forward without gradients and
cache (for attribution forward and backward with frozen parameters), one thread. Each shape runs in a process of its own; the peak of memory
is the process', weights (held once) and libraries included. Prints the table and writes it into bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch

import ioi_mamba as im
from ioi_mamba.analyses import _circuits, cross_talk
from ioi_mamba.circuits.attribution import Options, attributions
from ioi_mamba.circuits.flow import flow_scores
from ioi_mamba.model.families import block_of, layers_with, sizes_of
from ioi_mamba.passes.sweep import resample_sweep

from . import shapes, timing

DEFAULT = ("small", "mini", "mamba-130m")
PAIRS = {"mamba-370m": 4, "mamba2-130m": 4, "mamba2-370m": 2, "mamba2-370m, 4 layers": 2}
TARGETS = {
    "layer x position sweep": {"mini": 0.20, "mamba-130m": 0.18, "mamba-370m": 0.22, "mamba2-370m": 0.25},
    "layer x position sweep, in own plain passes": {"mamba2-370m": 0.35},
    "EAP, positions and parts": {},
    "relp, positions and parts": {"mini": 1.3, "mamba-130m": 1.3},
    "token flow, all layers": {"mini": 2.0, "mamba-130m": 2.0},
    "EAP-IG(5), positions and parts": {"mamba-130m": 1.3, "mamba2-370m, 4 layers": 2.0},
    "exact edge test": {"mamba-130m": 0.20},
    "greedy cross-talk candidate": {"mamba-130m": 0.30},
    "untouched trace": {"mamba-130m": 1.05},
    "all sites of one layer": {"mamba-130m": 1.10, "mamba2-370m": 1.10},
    "all sites of all layers": {"mamba-130m": 1.1},
    "all sites of all layers, own scan": {"mamba-130m": 1.1},
}


class Bench:
    """One model, and what is measured on it. Every method gives the arguments of `timing.measure`, and a note."""

    def __init__(self, model, shape: str, resume: bool = True, n_pairs: int | None = None):
        self.shape, self.resume = shape, resume
        self.model, self.stock = model, shapes.stock(model)
        self.n_pairs = n_pairs or PAIRS.get(shape, 16)
        self.large = shape not in ("small", "mini")
        self.pairs = shapes.pairs_for(model, self.n_pairs)
        self.few = self.pairs[: 4 if self.large else 16]

    def forward(self, pairs) -> Callable[[], object]:
        def plain():
            with torch.no_grad():
                return self.stock(pairs.clean, use_cache=False).logits

        return plain

    def forward_backward(self, pairs) -> Callable[[], object]:
        def plain():
            embedded = self.stock.get_input_embeddings()(pairs.clean).requires_grad_()
            logits = self.stock(inputs_embeds=embedded, use_cache=False).logits
            return torch.autograd.grad(logits[:, -1].sum(), embedded)

        return plain

    def trace(self):
        def work(tick) -> float:
            with self.model.trace(self.pairs.clean, use_cache=False):
                self.model.output.logits.save()
            return 1

        return self.forward(self.pairs), work, None, f"{self.n_pairs} rows"

    def one_layer(self):
        middle = self.model.config.num_hidden_layers // 2
        return self._read(self.pairs, self._sites(middle))

    def all_layers(self, own_scan: bool = False):
        names = [name for layer in range(self.model.config.num_hidden_layers) for name in self._sites(layer)]
        return self._read(self.few, names, own_scan)

    def _sites(self, layer: int) -> list[str]:
        """Every value of a layer, states all together."""
        slices = [f"conv_slice.{s}" for s in range(1 - sizes_of(self.model).conv_width, 1)]
        sites = [site for site in block_of(self.model, layer).sites if site != "conv_slice"]
        return [f"blocks.{layer}.hook_{site}" for site in (*sites, *slices)]

    def all_layers_own_scan(self):
        return self.all_layers(own_scan=True)

    def _read(self, pairs, names, own_scan: bool = False):
        def work(tick) -> float:
            im.read(self.model, pairs.clean, names, own_scan=own_scan)
            return 1

        return self.forward(pairs), work, None, f"{len(names)} values of {len(pairs)} rows"

    def own_sweep(self):
        _, work, warm, note = self.sweep()
        return (
            lambda: im.run(self.model, self.pairs.clean, own_scan=True),
            work,
            warm,
            f"{note}; unit: our own plain pass",
        )

    def flow(self):
        def work(tick) -> float:
            flow_scores(self.model, self.few, layers_with(self.model, "h"), heads=False, method="eap")
            return 1

        return self.forward_backward(self.few), work, None, f"{len(self.few)} pairs; unit: forward + backward"

    def sweep(self):
        def run(pairs, tick=None) -> float:
            return resample_sweep(self.model, pairs, "layer_input", resume=self.resume, progress=tick)[
                ..., 0
            ].numel() / len(pairs)

        def warm():
            resample_sweep(self.model, self.pairs, "layer_input", positions=[shapes.POSITIONS - 2])

        return self.forward(self.pairs), lambda tick: run(self.pairs, tick), warm, f"all cells, {self.n_pairs} pairs"

    def one_gradient(self):
        return self.attribution(method="eap")

    def relevance(self):
        return self.attribution(variant="relp")

    def attribution(self, **options):
        pairs = shapes.pairs_for(self.model, min(8, PAIRS.get(self.shape, 8)) if self.large else 16)

        def work(tick) -> float:
            attributions(self.model, pairs, Options(positions=True, parts=True, **options))
            return 1

        return self.forward_backward(pairs), work, None, f"{len(pairs)} pairs; unit: forward + backward"

    def edge_tests(self):
        note = {}
        # On mini a search as circuit-search makes it; random weights have no circuit, there items go one by one.
        options = {"recursive": self.shape == "mini"}
        pairs = _circuits.default_pairs(self.model.tokenizer, 8, 27) if self.shape == "mini" else self.pairs

        def work(tick) -> float:
            table = im.acdc(self.model, pairs, threshold=1e-3, progress=tick, resume=self.resume, **options).table
            tests, kept = table.attrs["tests"], table["kept"].sum()
            note["text"] = f"whole search, {len(pairs)} pairs, {len(table)} items, {kept} kept, {tests} tests"
            return tests

        return self.forward(pairs), work, self._warm, lambda: note["text"]

    def candidates(self):
        def work(tick) -> float:
            table = cross_talk.EXPERIMENT(self.model, self.few, threshold=1.0, progress=tick)
            return int((table["step"] > 0).sum())

        return self.forward(self.few), work, self._warm, f"every step to the end, {len(self.few)} pairs"

    def _warm(self):
        im.run(self.model, self.few.clean, {})


WORK = {
    "untouched trace": Bench.trace,
    "all sites of one layer": Bench.one_layer,
    "all sites of all layers": Bench.all_layers,
    "all sites of all layers, own scan": Bench.all_layers_own_scan,
    "EAP-IG(5), positions and parts": Bench.attribution,
    "EAP, positions and parts": Bench.one_gradient,
    "relp, positions and parts": Bench.relevance,
    "greedy cross-talk candidate": Bench.candidates,
    "exact edge test": Bench.edge_tests,
    "layer x position sweep": Bench.sweep,
    "layer x position sweep, in own plain passes": Bench.own_sweep,
    "token flow, all layers": Bench.flow,
}


def rows_of(shape: str, only: list[str], seconds: float, resume: bool) -> Iterator[dict]:
    """One row a measurement."""
    with shapes.opened(shape) as model:
        bench = Bench(model, shape, resume)
        for name, method in WORK.items():
            if only and not any(text in name for text in only):
                continue
            plain, work, warm, note = method(bench)
            found = timing.measure(plain, work, warm=warm, seconds=seconds)
            text = note if isinstance(note, str) else note()
            yield {"what": name, "shape": shape, "note": text, "load": timing.load()} | found._asdict()


def line_of(row: dict) -> str:
    target = TARGETS[row["what"]].get(row["shape"])
    reached = "" if target is None else f"<= {target:.2f}: {'yes' if row['ratio'] <= target else 'NO'}"
    return (
        f"| {row['what']} | {row['shape']} | {row['ratio']:.3f} | {row['low']:.3f}-{row['high']:.3f} ({row['repeats']}) | "
        f"{reached} | {row['plain_seconds'] * 1000:.1f} | {row['peak_mib']:.0f} | {row['load']} | {time.strftime('%Y-%m-%d')}, {timing.processor()} | {row['note']} |"
    )


HEAD = (
    "| what | shape | ratio | lowest-highest (repeats) | target | one unit, ms | peak RSS, MiB | load | date, processor | of |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    timing.prepare()
    parser = argparse.ArgumentParser(description="Costs in plain forwards.")
    parser.add_argument("shape", nargs="*", default=list(DEFAULT), help=f"of {', '.join(('mini', *shapes.SHAPES))}")
    parser.add_argument("--large", action="store_true", help="mamba-370m shape too")
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="measurements with TEXT in the name"
    )
    parser.add_argument("--seconds", type=float, default=20, help="about how long each is repeated (default: 20)")
    parser.add_argument("--no-write", action="store_true", help="leave RESULTS.md as it is")
    parser.add_argument("--no-resume-points", action="store_true", help="sweeps and edge tests the plain way")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        for row in rows_of(arguments.shape[0], arguments.only, arguments.seconds, not arguments.no_resume_points):
            print(json.dumps(row), flush=True)
        return
    print(f"{timing.machine()}\n\n{HEAD}", flush=True)
    lines = []
    for shape in [*arguments.shape, *(["mamba-370m"] if arguments.large else [])]:
        command = [sys.executable, "-m", "bench.ratios", shape, "--child", "--seconds", str(arguments.seconds)]
        command += [word for text in arguments.only for word in ("--only", text)]
        command += ["--no-resume-points"] if arguments.no_resume_points else []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for text in child.stdout:
                lines.append(line_of(json.loads(text)))
                print(lines[-1], flush=True)
        if child.returncode:
            sys.exit(child.returncode)
    if not arguments.no_write:
        about = (
            f"{timing.machine()}. `python -m bench.ratios`: a ratio is to one plain stock forward of the same rows unless "
            "the last column says otherwise; 20 tokens; `load` is the machine's load average when the measurement ended, "
            "1.0 of it this process. A run replaces the rows it measured."
        )
        rows = timing.with_rows_of("Ratios", lines)
        timing.write_section("Ratios", f"{about}\n\n{HEAD}\n" + "\n".join(rows))


if __name__ == "__main__":
    main()
