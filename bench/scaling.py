"""How cost grows with layers, positions, pairs and edges, and what a mamba-2.8b would take: `python -m bench.scaling`.

Slopes are those of log cost against log size (1 = proportional), from seconds at sizes that double. The calculation
for mamba-2.8b counts multiplications and the bytes of `ioi_mamba.model.memory`; nothing of it was run.
"""

from __future__ import annotations

import argparse
import heapq
import math
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

from transformers import MambaConfig

import ioi_mamba as im
from ioi_mamba.circuits.attribution import Options, attributions
from ioi_mamba.circuits.graph import universe_of
from ioi_mamba.circuits.scoring import Evaluator
from ioi_mamba.model.memory import PASSES, row_mib, rows_per_pass
from ioi_mamba.passes.sweep import LAYERS_OF_A_CHUNK, resample_sweep

from . import shapes, timing

WIDTH = "small"
RATE = 1e13
"""Multiply-adds a second of one GPU in float32: an assumption, for hours to be read off; efficiency does not depend on it."""
BOUNDS = (
    "What bounds it: the longest chunk, which nobody can share (the lowest layers of one pair); passes of one row, whose "
    "time is that of launching some 30 kernels a layer where the multiply-adds take less; the weights, 11 GiB to each "
    "worker, which 64 read from one file system; not the results, half a MiB a pair."
)
LAYERS, POSITIONS, PAIRS, EDGES = (4, 8, 16), (10, 20, 40, 80), (8, 16, 32, 64), (8, 16, 32, 64)


def sweep(model, pairs) -> None:
    resample_sweep(model, pairs, "layer_input")


def gradients(model, pairs) -> None:
    attributions(model, pairs, Options(positions=True, parts=True))


def plain(model, pairs) -> None:
    im.run(model, pairs.clean, {})


def edge_tests(model, pairs, n: int) -> None:
    items = universe_of(model, parts=True).items()
    Evaluator(model, pairs, universe_of(model, parts=True)).exact_effects((items * n)[:n])


def slope(sizes, seconds) -> float:
    """Of the straight line through the points of log seconds against log size."""
    x, y = [math.log(v) for v in sizes], [math.log(v) for v in seconds]
    mx, my = statistics.mean(x), statistics.mean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def row(what: str, along: str, sizes, runs: dict[int, Callable[[], object]], repeats: int) -> str:
    """A line of the table; sizes are measured in turn, and the median of the repeats is kept."""
    found = {size: [] for size in sizes}
    for k in range(repeats + 1):
        for size in sizes:
            seconds = timing.seconds_of(runs[size])
            if k:  # the first round warms up
                found[size].append(seconds)
    seconds = [statistics.median(found[size]) for size in sizes]
    listed = ", ".join(f"{size}: {1000 * s:.0f}" for size, s in zip(sizes, seconds, strict=True))
    return f"| {what} | {along} | {listed} | {slope(sizes, seconds):.2f} |"


def measured(repeats: int) -> list[str]:
    lines = []
    works = {"plain pass": plain, "EAP-IG(5) with parts": gradients, "layer x position sweep": sweep}
    for what, work in works.items():
        runs = {}
        for n in LAYERS:
            with shapes.opened(WIDTH, layers=n) as model:
                runs[n] = lambda model=model, work=work: work(model, shapes.pairs_for(model, 8))
        lines.append(row(what, "layers", LAYERS, runs, repeats))
    with shapes.opened(WIDTH) as model:
        for what, work in works.items():
            runs = {n: lambda n=n, work=work: work(model, shapes.pairs_for(model, 8, n)) for n in POSITIONS}
            lines.append(row(what, "positions", POSITIONS, runs, repeats))
            runs = {n: lambda n=n, work=work: work(model, shapes.pairs_for(model, n)) for n in PAIRS}
            lines.append(row(what, "pairs", PAIRS, runs, repeats))
        runs = {n: lambda n=n: edge_tests(model, shapes.pairs_for(model, 8), n) for n in EDGES}
        lines.append(row("exact edge tests", "edges", EDGES, runs, repeats))
    return lines


def calculated(n_layers: int, width: int, vocab: int, positions: int, pairs: int) -> list[str]:
    """What experiments on a model of these sizes take: multiply-adds, and MiB in a pass."""
    E, R, N, K = 2 * width, -(-width // 16), 16, 4
    layer = 3 * width * E + E * (R + 2 * N) + R * E + E * (K + 4 * N)
    forward = positions * n_layers * layer + width * vocab  # logits at the last position only
    items = (n_layers + 1) * (n_layers + 2) // 2 + n_layers * (K + 2)
    # Layer l and position p leave (n - l) / n of the layers and (L - p) / L of the positions.
    share = (n_layers + 1) / (2 * n_layers) * (positions + 1) / (2 * positions)
    edges = sum((l + 1 + K + 2) * (n_layers - l) for l in range(n_layers)) / n_layers + n_layers + 1  # noqa: E741
    costs = {
        "a plain pass of all pairs": 1,
        "layer x position sweep, all cells": n_layers * positions * share,
        "EAP-IG(5) with parts": 2 + 4 * 3,
        "exact search, every edge and part once": edges,
        "the same, plain": items,
    }
    lines = [f"| {what} | {c:,.0f} | {c * pairs * forward / 1e15:,.1f} |" for what, c in costs.items()]
    config = MambaConfig(hidden_size=width, num_hidden_layers=n_layers, vocab_size=vocab)
    lines += ["", "| pass | MiB a pair | pairs in 1 GiB | in 8 GiB |", "|---|---|---|---|"]
    for kind in PASSES:
        model = SimpleNamespace(config=config, device="cpu")
        fits = [rows_per_pass(model, positions, kind, budget) for budget in (1024, 8192)]
        lines.append(f"| {kind} | {row_mib(model, positions, kind):,.0f} | {fits[0]} | {fits[1]} |")
    return lines


def shared_out(n_layers: int, width: int, positions: int, pairs: int, rate: float) -> list[str]:
    """The layer x position sweep by so many workers: the share of their time that is used, and hours.

    Chunks go, in order, to whichever worker is free; a chunk costs its passes and, once more, the rolling of its pairs'
    states. rate: multiply-adds a second of a worker, which is assumed.
    """
    E, R, N, K = 2 * width, -(-width // 16), 16, 4
    layer = 3 * width * E + E * (R + 2 * N) + R * E + E * (K + 4 * N)
    lines = []
    for workers, wanted in ((1, 16), (8, 32), (64, 16), (64, 64), (64, 256), (128, 512)):
        rows = max(1, -(-pairs // min(wanted, pairs)))
        n_chunks = -(-pairs // rows)
        groups = max(1, min(wanted // n_chunks, n_layers // LAYERS_OF_A_CHUNK))
        costs = []
        for first in range(0, pairs, rows):
            own = min(rows, pairs - first)
            for k in range(groups):
                cut = range(k * n_layers // groups, (k + 1) * n_layers // groups)
                passes = sum(n_layers - each for each in cut) * positions * (positions + 1) / 2
                rolled = 3 * n_layers * positions  # both prompts, and the clean run that passes start from
                costs.append(own * layer * (passes + rolled))
        free = [0.0] * workers
        for cost in costs:
            heapq.heapreplace(free, free[0] + cost / rate)
        used = sum(costs) / rate / workers / max(free)
        repeated = 1 - (sum(costs) - (groups - 1) * pairs * layer * 3 * n_layers * positions) / sum(costs)
        lines.append(f"| {workers} | {wanted} | {len(costs)} | {max(free) / 3600:,.1f} | {used:.0%} | {repeated:.2%} |")
    return lines


def main() -> None:
    timing.prepare()
    parser = argparse.ArgumentParser(description="Slopes of cost, and a calculation for a large model.")
    parser.add_argument("--repeats", type=int, default=3, help="of each size, after one to warm up (default: 3)")
    parser.add_argument("--no-write", action="store_true", help="leave RESULTS.md as it is")
    arguments = parser.parse_args()
    lines = ["| work | along | milliseconds at each size | slope |", "|---|---|---|---|", *measured(arguments.repeats)]
    lines += [
        "",
        "mamba-2.8b (64 layers, D 2560), 1,000 tokens, 80 pairs, by calculation, in float32; the weights take "
        f"{4 * (64 * (3 * 2560 * 5120 + 5120 * 192 + 160 * 5120) + 50280 * 2560) / 2**30:.1f} GiB:",
        "",
        "| experiment | plain passes of all pairs | 10^15 multiply-adds |",
        "|---|---|---|",
        *calculated(64, 2560, 50280, 1000, 80),
        "",
        f"The sweep of it shared out, by calculation; a worker is assumed to do {RATE:.0e} multiply-adds a second:",
        "",
        "| workers | chunks asked for | chunks | hours | of the workers' time used | work done twice |",
        "|---|---|---|---|---|---|",
        *shared_out(64, 2560, 1000, 80, RATE),
        "",
        BOUNDS,
    ]
    print("\n".join(lines))
    if not arguments.no_write:
        about = f"{timing.machine()}. {time.strftime('%Y-%m-%d')}, load {timing.load()}. `python -m bench.scaling`; "
        about += "4 layers of width 64, 8 pairs of 20 tokens unless that is what varies."
        timing.write_section("Scaling", about + "\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
