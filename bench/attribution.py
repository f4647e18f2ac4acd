"""How near scores by gradient are to exact patching, on the three trained models: `python -m bench.attribution`.

Of each method and kind of item: the correlation r of its scores with exact effects, and Spearman's rank correlation, over
items, each score the mean over the same prompts; 95 % intervals by resampling the prompts. Processor seconds are those of
one process with one thread. Then the circuits of the first k items by relp and by EAP-IG(5), on other prompts.
"""

from __future__ import annotations

import time

import torch
from scipy import stats

import ioi_mamba as im
from ioi_mamba.circuits.attribution import attributions
from ioi_mamba.circuits.flow import flow_scores
from ioi_mamba.circuits.methods import Options
from ioi_mamba.circuits.scoring import Evaluator
from ioi_mamba.circuits.variants import RELP
from ioi_mamba.files import EMBEDDED
from ioi_mamba.model.families import layers_with
from ioi_mamba.passes.intervals import mean_interval
from ioi_mamba.tasks import ioi

from . import timing

N_PAIRS, RESAMPLES = 24, 200
N_HELD_OUT, SIZES = 40, (3, 6, 10, 16, 24, 36)
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
    kinds, exact = attributions(model, pairs, Options("exact", parts=True))
    is_part = torch.tensor([part is not None for *_, part in kinds])
    rows = []
    for label, options in METHODS.items():
        started = time.process_time()
        _, scores = attributions(model, pairs, options)
        seconds = time.process_time() - started
        for what, chosen in (("edges", ~is_part), ("parts", is_part)):
            cells = agreement(scores[chosen, 0], exact[chosen, 0])
            rows.append(f"| {name} | {what}, {int(chosen.sum())} | {label} | {cells} | {seconds:.2f} |")
    layers = layers_with(model, "h")
    alone = flow_scores(model, pairs, layers, False, "exact").flatten(0, 3)
    started = time.process_time()
    scores = flow_scores(model, pairs, layers, False, "eap").flatten(0, 3)
    seconds = time.process_time() - started
    there = alone.abs().sum(1) > 0
    cells = agreement(scores[there], alone[there])
    return [*rows, f"| {name} | flows, {int(there.sum())} | EAP | {cells} | {seconds:.2f} |"]


def circuits_of(name: str) -> list[str]:
    """What relp's circuits keep beyond those of EAP-IG(5) of the same sizes, on held-out prompts."""
    model = im.open_model(name, device="cpu")
    pairs, other = (
        ioi.generate(model.tokenizer, N_HELD_OUT, seed, templates=ioi.ALIGNED_TEMPLATES, symmetric=True)
        for seed in (27, 28)
    )
    relp, eap_ig = (im.attribute(model, pairs, parts=True, variant=variant) for variant in ("relp", "paper"))
    judge = Evaluator(model, other, relp.universe)
    rows = []
    for k in SIZES:
        sets = [found.circuit(k).patched() for found in (relp, eap_ig)]
        kept = judge.scores(sets)["normalized_logit_diff"]
        difference = kept[0] - kept[1]
        low, high = mean_interval(difference[None], judge.clusters)
        means = " | ".join(f"{value:.3f}" for value in kept.mean(1))
        rows.append(
            f"| {name} | {k} of {relp.universe.size()} | {means} | {difference.mean():+.3f} ({low[0]:+.3f} to {high[0]:+.3f}) |"
        )
    return rows


def main() -> None:
    timing.prepare()
    lines = ["| model | items | method | r | rank correlation | seconds |", "|---|---|---|---|---|---|"]
    for name in EMBEDDED:
        lines += rows_of(name)
        print("\n".join(lines[-11:]), flush=True)
    about = f"{timing.machine()}. {time.strftime('%Y-%m-%d')}, load {timing.load()}. `python -m bench.attribution`: "
    about += f"{N_PAIRS} prompts of the aligned templates, {RESAMPLES} resamples."
    head = ["| model | items kept | relp | EAP-IG(5) | difference (95 %) |", "|---|---|---|---|---|"]
    circuits = [*head, *(row for name in EMBEDDED for row in circuits_of(name))]
    print("\n".join(circuits))
    told = f"Normalized logit diff of circuits on {2 * N_HELD_OUT} other prompts, chosen on as many."
    parts = [about, "\n".join(lines), told, "\n".join(circuits)]
    timing.write_section("Attribution beside exact patching", "\n\n".join(parts))


if __name__ == "__main__":
    main()
