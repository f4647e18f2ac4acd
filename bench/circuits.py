"""What exact search costs beside attribution: wall times on `mini`, and their ratio.

    python bench/circuits.py [--model M] [--n-pairs N] [--threshold T]

For two universes, edges with parts and (edge, position) items, prints the seconds of ACDC and of
attribution on the same prompts, the ratio, and how many items both keep. Seconds depend on the machine, so they stand in
no table of an experiment; how faithful the circuits are is in `circuit-search`.
"""

from __future__ import annotations

import argparse
import time

import torch

import ioi_mamba as im
from analyses import _circuits


def timed(work):
    """The result of work() and the seconds it took."""
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description="Wall times of exact search and of attribution.")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--n-pairs", type=int, default=10)
    parser.add_argument("--threshold", type=float, default=1e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = im.open_model(arguments.model)
    pairs = _circuits.default_pairs(model.tokenizer, arguments.n_pairs, 27)
    im.attribute(model, pairs[:2])  # the first trace prepares the model
    print(f"{arguments.model}, {len(pairs)} prompts, threshold {arguments.threshold:g}")
    for what, options in (("edges and parts", {"parts": True}), ("edges at positions", {"positions": True})):
        search = {"parts": options.get("parts", False), "positions": options.get("positions", False)}
        found, exact = timed(lambda search=search: im.acdc(model, pairs, threshold=arguments.threshold, **search))
        print(
            f"{what}: ACDC {exact:.1f} s, {found.attrs['tests']} tests, {found['kept'].sum()} of {len(found)} items kept"
        )
        for name, more in (("EAP-IG, 5 steps", {}), ("EAP-IG, 3 steps", {"steps": 3}), ("EAP", {"method": "eap"})):
            _, seconds = timed(lambda options=options, more=more: im.attribute(model, pairs, **options, **more))
            print(f"  {name}: {seconds:.2f} s, 1/{exact / seconds:.0f} of the search")


if __name__ == "__main__":
    main()
