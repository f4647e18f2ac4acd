"""What exact search costs beside attribution, on `mini`: `python -m bench.circuits [--model M] [--n-pairs N]`.

For two universes, edges with parts and (edge, position) items: processor seconds of ACDC and of attribution on the same
prompts, their ratio, and how many items the search keeps. How faithful the circuits are is in `circuit-search`.
"""

from __future__ import annotations

import argparse
import time

import ioi_mamba as im
from ioi_mamba.analyses import _circuits

from . import timing

HEAD = "| items | prompts | tests | kept | ACDC, s | EAP-IG(5), s | EAP-IG(5) | EAP-IG(3) | EAP |\n|---|---|---|---|---|---|---|---|---|"
UNIVERSES = {"edges and parts": {"parts": True}, "edges at positions": {"parts": False, "positions": True}}
ATTRIBUTIONS = ({"steps": 5}, {"steps": 3}, {"method": "eap"})


def line_of(model, pairs, what: str, threshold: float) -> str:
    """One row: the search, and each attribution as a share of its seconds."""
    options, found = UNIVERSES[what], []
    exact = timing.seconds_of(lambda: found.append(im.acdc(model, pairs, threshold=threshold, **options).table))
    table = found[0]
    first, *others = (
        timing.seconds_of(lambda more=more: im.attribute(model, pairs, **options, **more).table)
        for more in ATTRIBUTIONS
    )
    shares = " | ".join(f"1/{exact / seconds:.1f}" for seconds in (first, *others))
    return (
        f"| {what} | {len(pairs)} | {table.attrs['tests']} | {table['kept'].sum()} of {len(table)} | {exact:.1f} | "
        f"{first:.2f} | {shares} |"
    )


def main() -> None:
    timing.prepare()
    parser = argparse.ArgumentParser(description="Seconds of exact search and of attribution.")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--n-pairs", type=int, action="append", help="default: 5 and 30 (two prompts a pair)")
    parser.add_argument("--threshold", type=float, default=1e-3)
    parser.add_argument("--no-write", action="store_true", help="leave RESULTS.md as it is")
    arguments = parser.parse_args()
    model = im.open_model(arguments.model)
    print(HEAD, flush=True)
    lines = []
    for n_pairs in arguments.n_pairs or (5, 30):
        pairs = _circuits.default_pairs(model.tokenizer, n_pairs, 27)
        im.attribute(model, pairs[:2])  # the first trace prepares the model
        for what in UNIVERSES:
            lines.append(line_of(model, pairs, what, arguments.threshold))
            print(lines[-1], flush=True)
    if not arguments.no_write:
        about = (
            f"{timing.machine()}. {time.strftime('%Y-%m-%d')}, load {timing.load()}. `python -m bench.circuits`, "
            f"{arguments.model}, threshold {arguments.threshold:g}; attributions as shares of the search's seconds."
        )
        timing.write_section("Search and attribution", f"{about}\n\n{HEAD}\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
