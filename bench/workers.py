"""What a second worker brings: wall time of layer-ablation by two workers in that by one: `python -m bench.workers`.

Random weights in the shape of mamba-130m. Workers are up, and have done something, before anything is timed; rounds
alternate. On a busy machine the least of several rounds says most; the load is printed.
"""

from __future__ import annotations

import argparse
import time

import torch

from ioi_mamba import analyses
from ioi_mamba.model.opening import open_model
from ioi_mamba.remote.workers import Workers

from . import shapes, timing


def seconds(model, pairs) -> float:
    began = time.perf_counter()
    analyses.load("layer-ablation")(model, pairs)
    return time.perf_counter() - began


def opened(directory: str, count: int):
    return open_model(directory, device="cpu", backend="ray", workers=Workers(count=count))


def main() -> None:
    parser = argparse.ArgumentParser(description="Wall time of layer-ablation by two workers in that by one.")
    parser.add_argument("--shape", default="mamba-130m", choices=[name for name in shapes.SHAPES if "2-" not in name])
    parser.add_argument("--layers", type=int, help="another number of layers")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--positions", type=int, default=6, help="tokens of a prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-write", action="store_true", help="leave RESULTS.md as it is")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with shapes.saved(arguments.shape, layers=arguments.layers) as directory:
        # A process is connected to one Ray at a time, so each count is opened anew in each round.
        found = {1: [], 2: []}
        for _ in range(arguments.rounds):
            for count, times in found.items():
                model = opened(directory, count)
                try:
                    pairs = shapes.pairs_for(model, arguments.pairs, arguments.positions)
                    model.jobs.chunks = 8
                    seconds(model, pairs[: 2 * count])  # the first passes of a worker take longer
                    times.append(seconds(model, pairs))
                finally:
                    model.jobs.close()
                print(f"{count} workers: {times[-1]:.1f} s, load {timing.load()}", flush=True)
    ratios = [two / one for one, two in zip(found[1], found[2], strict=True)]
    listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    line = f"Two workers take {min(ratios):.2f} of the wall time of one (rounds: {listed})."
    print(line)
    if not arguments.no_write:
        about = f"{timing.machine()}. {time.strftime('%Y-%m-%d')}, load {timing.load()}. `python -m bench.workers`; "
        about += f"{arguments.shape}, {arguments.pairs} pairs of {arguments.positions} tokens, one thread a worker."
        timing.write_section("Workers", f"{about}\n\n{line}")


if __name__ == "__main__":
    main()
