"""How near scores by gradient are to exact patching, on the three trained models: `python -m bench.attribution`.

Of each method and kind of item: the correlation r of its scores with exact effects, and Spearman's rank correlation, over
items, each score the mean over the same prompts; of some methods also for means and zeros in place of resampling; 95 % intervals by resampling the prompts. Processor seconds are those of
one process with one thread. Then the circuits of the first k items by relp and by EAP-IG(5), on other prompts: chosen on the
same prompts, and at equal cost.
"""

from __future__ import annotations

import time

import torch
from scipy import stats

import ioi_mamba as im
from ioi_mamba.circuits.attribution import Attribution, attributions
from ioi_mamba.circuits.flow import flow_scores
from ioi_mamba.circuits.methods import Options
from ioi_mamba.circuits.scoring import Evaluator
from ioi_mamba.circuits.variants import RELP
from ioi_mamba.files import EMBEDDED
from ioi_mamba.model.families import layers_with
from ioi_mamba.passes.intervals import mean_interval
from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import Pairs

from . import timing

N_PAIRS, RESAMPLES = 24, 200
N_HELD_OUT, SIZES = 40, (3, 6, 10, 16, 24, 36)
PASSES = 4
KINDS = ("resample", "mean", "zero")
OF_OTHER_KINDS = ("EAP", "EAP-IG(5)", "relp")
METHODS = {
    "EAP": Options("eap", parts=True),
    "EAP-IG(5)": Options("eap-ig", steps=5, parts=True),
    "EAP-IG(10)": Options("eap-ig", steps=10, parts=True),
    "relp": Options(variant="relp", parts=True),
    "relp, with half": Options(variant=RELP._replace(rules=(*RELP.rules, "half")), parts=True),
}


def agreement(scores: torch.Tensor, exact: torch.Tensor) -> str:
    """r and rank correlation of the means of [item, pair], with intervals, as two cells of a table."""
    generator = torch.Generator().manual_seed(1)
    draws = [torch.arange(N_PAIRS), *torch.randint(N_PAIRS, (RESAMPLES, N_PAIRS), generator=generator)]
    found = torch.tensor(
        [
            [float(of(scores[:, rows].mean(1), exact[:, rows].mean(1))[0]) for of in (stats.pearsonr, stats.spearmanr)]
            for rows in draws
        ]
    )
    low, high = found[1:].nanquantile(torch.tensor([0.025, 0.975]), dim=0)
    return " | ".join(f"{found[0, k]:.3f} ({low[k]:.3f} to {high[k]:.3f})" for k in range(2))


def rows_of(name: str) -> list[str]:
    model = im.open_model(name, device="cpu")
    pairs = ioi.generate(model.tokenizer, N_PAIRS, 27, templates=ioi.ALIGNED_TEMPLATES)
    rows = []
    for ablation in KINDS:
        kinds, exact = attributions(model, pairs, Options("exact", parts=True, ablation=ablation))
        is_part = torch.tensor([part is not None for *_, part in kinds])
        for label in METHODS if ablation == "resample" else OF_OTHER_KINDS:
            started = time.process_time()
            _, scores = attributions(model, pairs, METHODS[label]._replace(ablation=ablation))
            seconds = time.process_time() - started
            of = label if ablation == "resample" else f"{label}, by {ablation}"
            for what, chosen in (("edges", ~is_part), ("parts", is_part)):
                cells = agreement(scores[chosen, 0], exact[chosen, 0])
                rows.append(f"| {name} | {what}, {int(chosen.sum())} | {of} | {cells} | {seconds:.2f} |")
    layers = layers_with(model, "h")
    alone = flow_scores(model, pairs, layers, False, "exact").flatten(0, 3)
    started = time.process_time()
    scores = flow_scores(model, pairs, layers, False, "eap").flatten(0, 3)
    seconds = time.process_time() - started
    there = alone.abs().sum(1) > 0
    cells = agreement(scores[there], alone[there])
    return [*rows, f"| {name} | flows, {int(there.sum())} | EAP | {cells} | {seconds:.2f} |"]


def chosen_by(model, pairs: Pairs, variant: str, fewer: int = 1) -> tuple[Attribution, float]:
    """Scores from one in `fewer` of these symmetric pairs, both directions of each, and processor seconds."""
    half = len(pairs) // 2
    rows = [row + side for side in (0, half) for row in range(0, half, fewer)]
    started = time.process_time()
    found = im.attribute(model, pairs[rows], parts=True, variant=variant)
    return found, time.process_time() - started


def circuits_of(name: str) -> list[str]:
    """What relp's circuits keep beyond those of EAP-IG(5) of the same sizes, on held-out prompts.

    EAP-IG(5) makes PASSES passes with gradients a prompt and relp one: at equal cost relp sees so many times the prompts.
    """
    model = im.open_model(name, device="cpu")
    pairs, other = (
        ioi.generate(model.tokenizer, N_HELD_OUT, seed, templates=ioi.ALIGNED_TEMPLATES, symmetric=True)
        for seed in (27, 28)
    )
    im.attribute(model, pairs[:2], parts=True)  # the first trace prepares the model
    eap_ig, seconds = chosen_by(model, pairs, "paper", PASSES)
    same, of_same = chosen_by(model, pairs, "relp", PASSES)
    more, of_more = chosen_by(model, pairs, "relp")
    judge = Evaluator(model, other, more.universe)
    rows = []
    for k in SIZES:
        sets = [found.circuit(k).patched() for found in (eap_ig, same, more)]
        kept = judge.scores(sets)["normalized_logit_diff"]
        differences = kept[1:] - kept[0]
        low, high = mean_interval(differences, judge.clusters)
        told = [f"{d.mean():+.3f} ({a:+.3f} to {b:+.3f})" for d, a, b in zip(differences, low, high, strict=True)]
        values = [f"{value:.3f}" for value in kept.mean(1)]
        cells = " | ".join([values[0], values[1], told[0], values[2], told[1]])
        rows.append(f"| {name} | {k} of {more.universe.size()} | {cells} |")
    cost = (
        f"{name}: {seconds:.2f} s, relp on the same prompts {of_same:.2f} s, on {PASSES} times as many {of_more:.2f} s."
    )
    return [*rows, cost]


def main() -> None:
    timing.prepare()
    lines = ["| model | items | method | r | rank correlation | seconds |", "|---|---|---|---|---|---|"]
    for name in EMBEDDED:
        lines += (rows := rows_of(name))
        print("\n".join(rows), flush=True)
    about = f"{timing.machine()}. {time.strftime('%Y-%m-%d')}, load {timing.load()}. `python -m bench.attribution`: "
    about += f"{N_PAIRS} prompts of the aligned templates, {RESAMPLES} resamples."
    columns = "EAP-IG(5) | relp, same prompts | difference (95 %) | relp, equal cost | difference (95 %)"
    found = [circuits_of(name) for name in EMBEDDED]
    head = [f"| model | items kept | {columns} |", "|---|---|---|---|---|---|---|"]
    circuits = [*head, *(row for rows in found for row in rows[:-1])]
    print("\n".join(circuits))
    few = 2 * N_HELD_OUT // PASSES
    told = f"Normalized logit diff of circuits on {2 * N_HELD_OUT} other prompts, chosen by EAP-IG(5) on {few}; by relp on the "
    told += f"same, and at equal cost on {PASSES} times as many. EAP-IG(5) on {' '.join(rows[-1] for rows in found)}"
    parts = [about, "\n".join(lines), told, "\n".join(circuits)]
    timing.write_section("Attribution beside exact patching", "\n\n".join(parts))


if __name__ == "__main__":
    main()
