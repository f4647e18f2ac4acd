"""What threads bring on this machine as it is, and how the pool should wait: `python -m bench.threads`.

Wall time of a sweep with each number of threads, waiting passively (asleep) or actively (spinning), in units of one
thread in the same round. Each is a process of its own, since OpenMP reads its settings once. Run it on an idle machine
and on a busy one; the load is printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

from . import timing

POLICIES = ("PASSIVE", "ACTIVE")


def child(shape: str, layers: int | None) -> None:
    from ioi_mamba.passes.sweep import resample_sweep

    from . import shapes

    with shapes.opened(shape, layers=layers) as model:
        pairs = shapes.pairs_for(model, 4)
        resample_sweep(model, pairs, "layer_input", positions=[18])
        began = time.perf_counter()
        resample_sweep(model, pairs, "layer_input", positions=[2, 10])
        print(time.perf_counter() - began)


def seconds(shape: str, layers: int | None, threads: int, policy: str) -> float:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": policy}
    command = [sys.executable, "-m", "bench.threads", "--child", shape, *(["--layers", str(layers)] if layers else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    from ioi_mamba.model.threads import cores

    parser = argparse.ArgumentParser(description="Wall time by threads and by how they wait.")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3, help="each measures everything once (default: 3)")
    parser.add_argument("--no-write", action="store_true", help="leave RESULTS.md as it is")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.layers)
        return
    lines = ["| sweep of | threads | waiting | wall time in that of one thread, median (range) |", "|---|---|---|---|"]
    for shape, layers in (("mini", None), ("mamba-130m", 4)):
        found: dict[tuple[int, str], list[float]] = {}
        for _ in range(arguments.rounds):
            one = seconds(shape, layers, 1, "PASSIVE")
            for threads in sorted({2, cores()} - {1}):
                for policy in POLICIES:
                    found.setdefault((threads, policy), []).append(seconds(shape, layers, threads, policy) / one)
        name = shape if layers is None else f"{shape}, {layers} layers"
        lines += [
            f"| {name} | {n} | {policy.lower()} | {statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f}) |"
            for (n, policy), r in found.items()
        ]
    print("\n".join(lines), f"\nload {timing.load()}, {cores()} cores")
    if not arguments.no_write:
        about = f"{timing.machine()}. {time.strftime('%Y-%m-%d')}, load {timing.load()}. `python -m bench.threads`."
        timing.write_section("Threads", about + "\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
