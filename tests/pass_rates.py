"""How often a perfect rerun of the paper passes each claim, and a wrong model fails it: `python -m tests.pass_rates`.

A perfect rerun has the paper's model and other prompts of the same kind. The published number is itself one draw, so
that each simulation draws twice: a truth that could have given the published number, and a rerun of that truth. Counts
k of n give a truth from Beta(k + 1/2, n - k + 1/2) and a rerun from a binomial; means give a normal distribution twice.
Means over prompts have standard errors 1.25 times those of independent prompts, because the two directions of a pair
are not independent. What the wrong model does is said beside its rate. The table is written into docs/statistics.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pandas as pd

from ioi_mamba import claims, paper

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/statistics.md"
BEGIN, END = "<!-- begin: written by tests/pass_rates.py -->", "<!-- end -->"
DRAWS = 400
DESIGN = 1.25
N_NOTEBOOK, N_RERUN, N_CIRCUIT_PROMPTS, N_CIRCUITS = 20, 80, 400, 20
ORDINARY, NEEDED = 6, 2
"""Beta distributions of the answer's probability over prompts: a + b for the whole model and most layers, and without a
layer that is needed. With the published means they give about the published accuracies."""


@dataclass(frozen=True)
class Simulation:
    """draw(rng, is_wrong): what `claims.measure` would give of one rerun, or of one run of a wrong model."""

    draw: Callable[[np.random.Generator, bool], claims.Value]
    rerun: str
    wrong: str


@cache
def steering() -> pd.DataFrame:
    return paper.table("name-steering")


@cache
def steps() -> pd.DataFrame:
    return paper.table("cross-talk-steps")


@cache
def by_layer() -> pd.DataFrame:
    return paper.table("cross-talk")


def truth_of(rng, hits, n):
    return rng.beta(np.asarray(hits) + 0.5, np.asarray(n) - np.asarray(hits) + 0.5)


def steered(rng, is_wrong: bool, claim: str, wrong: Callable[[pd.DataFrame], np.ndarray]) -> claims.Value:
    cells = steering()
    rate = truth_of(rng, cells["successes"], cells["n"])
    if is_wrong:
        where = wrong(cells)
        rate = np.where(np.isnan(where), rate, where)
    table = cells.assign(success=rng.binomial(cells["n"], rate) / cells["n"], layer=39, offset=1)
    return claims.measure(claim, table.drop(columns="successes"), 39)


def block(value: float, far: bool):
    """Slots 1 to 3 with averages from 4 and 5 (far), or from 1 to 3, at another share."""

    def wrong(cells: pd.DataFrame) -> np.ndarray:
        own = (cells["slot"] <= 3) & ((cells["source_slot"] > 3) == far)
        return np.where(own, value, np.nan)

    return wrong


def cross_talk(rng, rate_by_layer: np.ndarray) -> pd.DataFrame:
    """Circuits that have each layer with its rate, as a table of the experiment."""
    rows = []
    for circuit in range(N_CIRCUITS):
        layers = np.flatnonzero(rng.random(len(rate_by_layer)) < rate_by_layer)
        rows += [("t", str(circuit), k + 1, int(layer)) for k, layer in enumerate(layers)]
    table = pd.DataFrame(rows, columns=["template", "corruption", "step", "layer"])
    return table.assign(chosen=True, in_circuit=True, reached=True, n=N_CIRCUIT_PROMPTS)


def memberships(rng, is_wrong: bool, claim: str) -> claims.Value:
    published = by_layer()
    counts = published["circuits"].to_numpy()
    rate = truth_of(rng, counts, N_CIRCUITS)
    if is_wrong:
        rate = rate[rng.permutation(len(rate))]
    return claims.measure(claim, cross_talk(rng, rate), 39)


def circuits_with(rng, is_wrong: bool, published: int, wrong: float) -> claims.Value:
    rate = wrong if is_wrong else truth_of(rng, published, N_CIRCUITS)
    return claims.share(int(rng.binomial(N_CIRCUITS, rate)), N_CIRCUITS)._replace(n=N_CIRCUIT_PROMPTS)


def mean_over_circuits(rng, is_wrong: bool, values: Callable[[], np.ndarray], wrong: float) -> claims.Value:
    published = values()
    sd, n = published.std(ddof=1), len(published)
    truth = wrong if is_wrong else rng.normal(published.mean(), sd / n**0.5)
    return claims.spread(pd.Series(rng.normal(truth, sd, n)))._replace(n=N_CIRCUIT_PROMPTS)


def first_gains() -> np.ndarray:
    return steps().query("step == 1")["accuracy"].to_numpy()


def sizes() -> np.ndarray:
    return steps().groupby(["template", "corruption"]).size().to_numpy().astype(float)


def removal(rng, is_wrong: bool, claim: str) -> claims.Value:
    """Probabilities without each layer: a sample of the notebook's size is the truth's, one of the default's the rerun's.

    The wrong model has its layers in another order, and a lower probability with all of them in place.
    """
    means = paper.table("layer-removal")["probability_figure"].to_numpy()
    means = np.append(means, 0.83)
    spread = np.where(means < 0.5, NEEDED, ORDINARY)
    if is_wrong:
        order = np.append(rng.permutation(len(means) - 1), len(means) - 1)
        means, spread = means[order], spread[order]
        means[-1] *= 0.8
    sd = np.sqrt(means * (1 - means) / (spread + 1))
    # Prompts that are hard are hard without any layer, so that most of the error is common to all layers.
    common, own = rng.normal(size=2), rng.normal(size=(2, len(means)))
    noise = np.where(spread == ORDINARY, 0.9 * common[:, None] + (1 - 0.9**2) ** 0.5 * own, own)
    errors = DESIGN * sd / np.array([[N_NOTEBOOK], [N_RERUN]]) ** 0.5
    found = (means + (noise * errors).sum(0)).clip(0, 1)
    rows = [("none", None, found[-1])] + [("single", layer, value) for layer, value in enumerate(found[:-1])]
    table = pd.DataFrame(rows, columns=["mode", "layer", "probability"]).assign(n=N_RERUN)
    return claims.measure(claim, table.astype({"layer": "Int64"}), 39)


def whole_accuracy(rng, is_wrong: bool) -> claims.Value:
    rate = (
        0.7 if is_wrong else float(truth_of(rng, 0.96 * N_CIRCUIT_PROMPTS / DESIGN**2, N_CIRCUIT_PROMPTS / DESIGN**2))
    )
    return claims.share(int(rng.binomial(N_RERUN, rate)), N_RERUN)._replace(n=N_RERUN)


def lines(rng, is_wrong: bool, n_prompts: int = 3) -> claims.Value:
    """Three prompts cannot tell the published .6 from chance (5 of 17): that is undecided."""
    n = 5 * n_prompts
    rate = 0.05 if is_wrong else truth_of(rng, 3, 5)
    return claims.share(int(rng.binomial(n, rate)), n)._replace(n=n_prompts)


def score(rng, is_wrong: bool, published: float, sd: float, wrong: float) -> claims.Value:
    """A mean over 400 prompts with the interval its table has."""
    error = DESIGN * sd / N_CIRCUIT_PROMPTS**0.5
    truth = wrong if is_wrong else rng.normal(published, error)
    return claims.around(rng.normal(truth, error), 1.96 * error)._replace(n=N_CIRCUIT_PROMPTS)


def circuit_accuracy(published: float, wrong: float = 0.7) -> Simulation:
    draw = partial(score, published=published, sd=(published * (1 - published)) ** 0.5, wrong=wrong)
    return Simulation(draw, "binomial, 400 prompts", f"{wrong:g}")


def circuit_score(published: float, accuracy: float, wrong: float = 0.7) -> Simulation:
    """A prompt whose answer is lost has a normalized logit diff below 1/2; their share gives the standard deviation."""
    sd = (published - 0.5) / NormalDist().inv_cdf(accuracy)
    return Simulation(partial(score, published=published, sd=sd, wrong=wrong), "normal, 400 prompts", f"{wrong:g}")


def steer(claim: str, wrong: Callable[[pd.DataFrame], np.ndarray], said: str) -> Simulation:
    return Simulation(partial(steered, claim=claim, wrong=wrong), "binomials, 101 prompts a cell", said)


def circuits(published: int, wrong: float) -> Simulation:
    draw = partial(circuits_with, published=published, wrong=wrong)
    return Simulation(draw, "binomial, 20 circuits", f"in {wrong:g} of circuits")


def removed(claim: str) -> Simulation:
    said = "layers in another order, .66 with all in place"
    return Simulation(partial(removal, claim=claim), "normal, 80 prompts, published 20", said)


SIMULATIONS = {
    "model_accuracy": Simulation(whole_accuracy, "binomial, 80 prompts", "0.7"),
    **{
        claim: removed(claim)
        for claim in (
            "zero_ablation_baseline",
            "zero_ablation_0",
            "zero_ablation_39",
            "zero_ablation_others",
            "zero_ablation_worst",
        )
    },
    "ct_39_always": circuits(20, 0.4),
    "ct_15_always": circuits(20, 0.4),
    "ct_39_first": circuits(20, 0.4),
    "ct_39_gain": Simulation(
        partial(mean_over_circuits, values=first_gains, wrong=0.4), "normal over the 20 published", "0.4"
    ),
    "ct_layer0": circuits(3, 0.85),
    "ct_proportions": Simulation(
        partial(memberships, claim="ct_proportions"), "binomial a layer, 20 circuits", "layers in another order"
    ),
    "ct_spearman": Simulation(
        partial(memberships, claim="ct_spearman"), "binomial a layer, 20 circuits", "layers in another order"
    ),
    "ct_size": Simulation(
        partial(mean_over_circuits, values=sizes, wrong=18), "normal over the 20 published", "18 layers"
    ),
    "ct_stop": circuits(20, 0.4),
    "cos_lines": Simulation(lines, "binomial, 3 prompts of 5 names", "0.05, far below chance"),
    "steer_sub_add": steer("steer_sub_add", block(0.85, far=False), "0.85 in the block"),
    "steer_sub_add_cross": steer("steer_sub_add_cross", block(0.98, far=True), "0.98 in the block"),
    "steer_sub_add_cells": steer("steer_sub_add_cells", block(0.98, far=True), "0.98 from slots 4 and 5"),
    "steer_replace": steer("steer_replace", block(0.85, far=False), "0.85 in the block"),
    "steer_replace_cross": steer("steer_replace_cross", block(0.98, far=True), "0.98 in the block"),
    "steer_replace_cells": steer("steer_replace_cells", block(0.98, far=True), "0.98 from slots 4 and 5"),
    "eap_train_accuracy": circuit_accuracy(0.852),
    "eap_accuracy": circuit_accuracy(0.879),
    "eap_nld": circuit_score(0.836, 0.879),
    "acdc_accuracy": circuit_accuracy(0.882),
    "acdc_nld": circuit_score(0.84, 0.882),
}
WHY_NOT = {
    "ra_": "one pair, or a figure of suspect magnitudes, is all that was published",
    "conv_": "of effects only a figure was published, and not how they vary over prompts",
    "h_": "the paper gives no number",
    "outproj_": "the paper gives no number",
    "half_": "the published log is of other prompts",
    "prune_": "how the loss varies over prompts was not published",
    "cos_cells": "judged on its own prompt",
    "eap_first": "scores were read off figures, and how they vary over prompts was not published",
    "acdc_": "one search was published",
}
"""Why a claim is not simulated, by how its name begins; one that needs the published prompts is exact on these."""


def rates(claim: str, draws: int = DRAWS, seed: int = 0) -> dict[str, float]:
    """Shares of reruns that hold, and that hold or are undecided; of runs of the wrong model that do not hold."""
    simulation = SIMULATIONS[claim]
    known = paper.table("claims").set_index("id", drop=False).loc[claim]
    rng = np.random.default_rng(seed)
    # The near block, which the far one requires, holds in all but a negligible share of both.
    verdicts = {
        is_wrong: [claims.judge(known, simulation.draw(rng, is_wrong), claims.HOLDS)[0] for _ in range(draws)]
        for is_wrong in (False, True)
    }
    passed = [verdict in (claims.HOLDS, claims.UNDECIDED) for verdict in verdicts[False]]
    return {
        "holds": verdicts[False].count(claims.HOLDS) / draws,
        "passes": sum(passed) / draws,
        "wrong fails": verdicts[True].count(claims.FAILS) / draws,
    }


def not_simulated() -> dict[str, str]:
    """By claim: why no rerun of it is drawn."""
    table = paper.table("claims").query("analysis != ''")
    found = {}
    for claim in table[~table["id"].isin(SIMULATIONS)].itertuples():
        reasons = [why for start, why in WHY_NOT.items() if claim.id.startswith(start)]
        found[claim.id] = "judged on the published prompts alone" if claim.prompts else reasons[0]
    return found


def page_part(draws: int = DRAWS) -> str:
    """The table and the list of what is not in it, as Markdown."""
    lines = [
        "| claim | a perfect rerun is drawn from | holds | holds or undecided | the wrong model | does not hold |",
        "|---|---|---|---|---|---|",
    ]
    for claim, simulation in SIMULATIONS.items():
        found = rates(claim, draws)
        lines.append(
            f"| `{claim}` | {simulation.rerun} | {found['holds']:.3f} | {found['passes']:.3f} | {simulation.wrong} | "
            f"{found['wrong fails']:.3f} |"
        )
    reasons: dict[str, list[str]] = {}
    for claim, why in not_simulated().items():
        reasons.setdefault(why, []).append(f"`{claim}`")
    missing = [f"* {why}: {', '.join(names)}." for why, names in reasons.items()]
    return "\n".join(
        [
            f"Written by `python -m tests.pass_rates`, {draws:,} draws a claim.",
            "",
            *lines,
            "",
            "Not simulated:",
            "",
            *missing,
        ]
    )


def main() -> None:
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    PAGE.write_text(f"{head}{BEGIN}\n\n{page_part()}\n\n{END}{tail}", encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    main()
