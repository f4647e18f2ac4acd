"""How much memory a computation takes: how many rows go into a pass, and whether an experiment fits at all.

What a row takes stands in the record of a model's family, counted in float32.
"""

from __future__ import annotations

import torch

from ioi_mamba.errors import InputError
from ioi_mamba.model.families import family_of, sizes_of
from ioi_mamba.model.jobs import chunks_wanted, device_of

MIB = 2**20
CHUNKS = 16
"""Of a pass over pairs, unless they would be too small: a run that is cut off loses about a sixteenth of it."""
BUSY = 2e9
"""Multiply-adds of a pass beside which the time for setting it up, milliseconds a layer, does not count on a CPU core."""
TOKENS = 128
"""Of a pass beside which reading the weights does not count: with 20 of them a product takes twice the time a token."""
PASSES = ("sweep", "edges", "parts", "gradients", "part gradients", "flows")
"""Kinds of pass: resumed with rolled states; edges patched, or edges and parts; the same with gradients kept; flows."""


def row_mib(model, n_positions: int, kind: str) -> float:
    """MiB that one more pair of prompts takes in a pass of that kind (of PASSES), all layers together."""
    return 4 * family_of(model).mixer.row_floats(sizes_of(model), n_positions, kind) / MIB


def rows_per_pass(
    model, n_positions: int, kind: str = "sweep", budget_mib: float | None = None, *, more: float = 0
) -> int:
    """How many pairs keep a pass within the budget, by default 1 GiB, or 8 GiB on an accelerator; at least one.

    more: how many numbers a pair takes beyond those of the pass.
    """
    if budget_mib is None:
        budget_mib = 1024 if torch.device(device_of(model)).type == "cpu" else 8192
    return max(1, int(budget_mib / (row_mib(model, n_positions, kind) + 4 * more / MIB)))


def chunk_count(model, n_rows: int) -> int:
    """How many chunks so many pairs are to be cut into, if that is worth the while: as asked for, or 16."""
    return min(n_rows, chunks_wanted(model) or CHUNKS)


def rows_per_chunk(model, n_rows: int, n_positions: int, kind: str = "sweep", *, more: float = 0) -> int:
    """How many of `n_rows` pairs make a chunk, as few as keep a pass busy and at most as many as fit into one.

    A chunk is what a worker gets, and what a run that is cut off loses. The number does not depend on how many workers
    there are, so that results are the same bits whoever computes them, unless a number of chunks is asked for. more: as of
    `rows_per_pass`.
    """
    fits = min(n_rows, rows_per_pass(model, n_positions, kind, more=more))
    rows = -(-n_rows // chunk_count(model, n_rows))
    if chunks_wanted(model) is None:
        on_cpu = torch.device(device_of(model)).type in ("cpu", "meta")
        rows = max(rows, int((BUSY if on_cpu else 100 * BUSY) / pass_work(model, 1, n_positions)))
        rows = max(rows, -(-TOKENS // n_positions))
    return max(1, min(fits, rows))


def pass_work(model, n_rows: int, n_positions: int) -> float:
    """Multiply-adds of a plain pass of so many prompts, without the head."""
    size = sizes_of(model)
    # The weights of a layer, nearly: in and out of a width that is about twice that of the stream.
    return n_rows * 6 * size.letters["D"] ** 2 * size.n_layers * n_positions


def needed_mib(model, n_pairs: int, n_positions: int, kind: str) -> float:
    """MiB that an experiment with passes of that kind takes beside the weights: its largest pass, and its scores."""
    rows = min(n_pairs, rows_per_pass(model, n_positions, kind))
    n_layers, parts = sizes_of(model).n_layers, family_of(model).mixer.parts(sizes_of(model).conv_width)
    per_position = n_layers * 2 if kind == "sweep" else (n_layers + 1) ** 2 + n_layers * len(parts)
    # Scores of every pair, in chunks and put together.
    return rows * row_mib(model, n_positions, kind) + 2 * 4 * n_pairs * n_positions * per_position / MIB


def available_mib(model) -> float | None:
    """MiB that can still be had where the model is, or None where that cannot be found out."""
    device = torch.device(device_of(model))
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / MIB
    if device.type != "cpu":
        return None
    import psutil  # here, since a server that runs passes need not have it

    return psutil.virtual_memory().available / MIB


def check_fits(model, n_pairs: int, n_positions: int, kind: str, name: str) -> None:
    """Raise InputError if the experiment `name` needs more memory than there is, naming what would make it fit."""
    free, need = available_mib(model), needed_mib(model, n_pairs, n_positions, kind)
    if free is None or need <= free:
        return
    fits = [n for n in range(1, n_pairs) if needed_mib(model, n, n_positions, kind) <= free]
    advice = f"use --n-pairs {fits[-1]}" if fits else "use shorter prompts, a smaller model or a machine with more"
    raise InputError(
        f"{name} with {n_pairs} pairs of {n_positions} tokens needs about {need:.0f} MiB of memory and {free:.0f} MiB "
        f"are free: {advice}."
    )
