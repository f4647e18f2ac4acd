"""How often intervals hold what they should, by simulation: `python -m tests.interval_coverage` writes the table of the docs.

A pool of symmetric pairs is evaluated on `mini` once. Sets of pairs are then drawn from it as samples, each gives every
kind of interval, and the share of sets whose interval holds the value of the whole pool is the coverage. Sets are drawn
with replacement, and a pair that is drawn twice is two draws: so they are independent samples of the pool itself, and
its value is known.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import ioi_mamba as im
from ioi_mamba.circuits.attribution import Options, attributions
from ioi_mamba.circuits.faithfulness import areas
from ioi_mamba.circuits.graph import Item, universe_of
from ioi_mamba.circuits.scoring import Evaluator
from ioi_mamba.passes.intervals import (
    Resampled,
    mean_interval,
    resampled_means,
    share_difference_interval,
    share_interval,
)
from ioi_mamba.passes.metrics import effect
from ioi_mamba.passes.sweep import swept_logit_diffs

PAGE = Path(__file__).parent.parent / "docs" / "statistics.md"
BEGIN, END = "<!-- coverage: written by python -m tests.interval_coverage -->", "<!-- end of coverage -->"
SIZES = (0, 3, 8, 45)
"""Of the curve: the first so many edges."""
CELLS = (5, 13, 15)
"""Positions where the input of layer 6 is resampled."""
CORRUPTION = im.ioi.CORRUPTIONS[3]
N_RESAMPLES = 1000


class Pool(NamedTuple):
    """Outcomes of a pool, [row], the second half of the rows being the first half's pairs turned about.

    effects: of resampling, of pairs of one corruption, as tables of effects have them, [row]. right: whether the answer
    still beats the wrong one when resampled at CELLS, [cell, row]. attribution: of one edge, [row]. scores: of the curve's circuits, [size, row] by name. ends: [2, row], of the clean run and with everything patched.
    """

    n_pairs: int
    effects: Tensor
    right: Tensor
    attribution: Tensor
    scores: dict[str, Tensor]
    ends: Tensor


def pool_of(model, n_pairs: int, seed: int) -> Pool:
    """The outcomes of so many pairs, all five corruptions and the aligned templates."""
    pairs = im.ioi.generate(model.tokenizer, n_pairs, seed, templates=im.ioi.ALIGNED_TEMPLATES, symmetric=True)
    few = pairs[:20]
    kinds, per_pair = attributions(model, few, Options("eap"))
    order = per_pair.sum(1).mean(-1).argsort().tolist()
    items = [Item(kinds[k][0], kinds[k][1]) for k in order]
    evaluator = Evaluator(model, pairs, universe_of(model), keep_mib=0)
    scores = evaluator.scores([items[k:] for k in SIZES])
    assert len(evaluator.rows_kept) == len(pairs)
    right = (swept_logit_diffs(model, pairs, "layer_input", layers=[6], positions=CELLS)["patched"][0] > 0).double()
    one = im.ioi.generate(
        model.tokenizer, n_pairs, seed, templates=im.ioi.ALIGNED_TEMPLATES, corruptions=[CORRUPTION], symmetric=True
    )
    effects = effect(**swept_logit_diffs(model, one, "layer_input", layers=[6], positions=CELLS[-1:]))[0, 0]
    _, everywhere = attributions(model, pairs, Options("eap"))
    of_edge = everywhere.sum(1)[order[0]]
    return Pool(n_pairs, effects, right, of_edge, scores, evaluator.ends()[[0, 2]])


def coverages(pool: Pool, n_pairs: int, n_sets: int, seed: int, clustered: bool = True) -> dict[str, tuple[int, int]]:
    """For each kind of interval how many sets hold the pool's value, and of how many.

    clustered: False takes both directions of a pair for independent rows.
    """
    generator = torch.Generator().manual_seed(seed)
    truth = {kind: value for kind, (value, _) in _measured(pool, torch.arange(2 * pool.n_pairs), None).items()}
    held = dict.fromkeys(truth, 0)
    for _ in range(n_sets):
        drawn = torch.randint(pool.n_pairs, (n_pairs,), generator=generator)
        rows = torch.cat([drawn, drawn + pool.n_pairs])
        clusters = torch.arange(n_pairs).repeat(2) if clustered else torch.arange(2 * n_pairs)
        for kind, (_, (low, high)) in _measured(pool, rows, clusters).items():
            held[kind] += float(low) <= truth[kind] <= float(high)
    return {kind: (n, n_sets) for kind, n in held.items()}


def _measured(pool: Pool, rows: Tensor, clusters: Tensor | None) -> dict[str, tuple[float, tuple]]:
    """Of some rows every kind's value, and its interval where clusters are given."""
    found: dict[str, tuple[float, tuple]] = {}

    def add(kind: str, values: Tensor, interval) -> None:
        found[kind] = float(values.double().mean()), interval(values, clusters) if clusters is not None else ()

    nld, right = pool.scores["normalized_logit_diff"][:, rows], pool.right[:, rows]
    add("effect of one corruption (t)", pool.effects[rows], mean_interval)
    add("attribution of an edge (t)", pool.attribution[rows], mean_interval)
    add("normalized logit diff of a circuit (t)", nld[1], mean_interval)
    add("difference of two of them (t)", nld[2] - nld[1], mean_interval)
    add("proportion near .9 (Wilson)", right[0], share_interval)
    add("proportion near .5 (Wilson)", right[1] * right[2], share_interval)
    add("difference of two proportions (Bonett and Price)", right[0] - right[1], share_difference_interval)
    differences, ends = pool.scores["logit_diff"][:, rows], pool.ends[:, rows]
    fractions = [k / SIZES[-1] for k in SIZES]

    def f_of(means: Tensor, of_ends: Tensor) -> Tensor:
        full, empty = of_ends[..., :1], of_ends[..., 1:]
        return (means - empty) / (full - empty)

    f = f_of(differences.double().mean(1), ends.double().mean(1))
    draws = None
    if clusters is not None:
        draws = f_of(*(resampled_means(each, clusters, N_RESAMPLES) for each in (differences, ends)))
    for kind, of in (
        ("f of a circuit (bootstrap)", lambda f: f[..., 1]),
        ("CPR (bootstrap)", lambda f: areas(fractions, f)["cpr"]),
        ("CMD (bootstrap)", lambda f: areas(fractions, f)["cmd"]),
    ):
        interval = ()
        if draws is not None:
            interval = Resampled(of(f)[None], of(draws)[:, None], int(clusters.max()) + 1).interval
        found[kind] = float(of(f)), interval
    return found


def table_of(pool: Pool, sizes: tuple[int, ...], n_sets: int, seed: int = 1) -> str:
    """The table of the docs: kinds of interval by pairs in a set, and as if rows were independent."""
    columns = [coverages(pool, n, n_sets, seed) for n in sizes]
    before = coverages(pool, sizes[-1], n_sets, seed, clustered=False)
    heads = [f"{n} pairs" for n in sizes] + [f"{sizes[-1]} pairs, rows taken as independent"]
    lines = [f"| interval | {' | '.join(heads)} |", f"|---{'|---' * len(heads)}|"]
    for kind in before:
        shares = [column[kind][0] / column[kind][1] for column in (*columns, before)]
        lines.append(f"| {kind} | {' | '.join(f'{share:.1%}' for share in shares)} |")
    return "\n".join(lines)


def main() -> None:
    """Write the table into the page, between its two marks."""
    model = im.open_model("mini", device="cpu")
    n_pool, n_sets = 300, 600
    table = table_of(pool_of(model, n_pool, 2027), (10, 20, 40, 80), n_sets)
    about = f"{n_sets} sets of so many symmetric pairs out of {n_pool}, `mini`, five corruptions; 95 % is wanted."
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{about}\n\n{table}\n\n{END}{after}", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
