"""What the circuit experiments share: their pairs, and how a ranked table becomes a circuit with its scores."""

from __future__ import annotations

import pandas as pd

from ioi_mamba.faithfulness import Evaluator, size_curve, smallest
from ioi_mamba.graph import Circuit, Universe
from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import Pairs


def default_pairs(tokenizer, n_pairs: int | None, seed: int) -> Pairs:
    """200 pairs of all five corruptions and the three aligned templates (400 evaluated prompts)."""
    return ioi.generate(tokenizer, n_pairs or 200, seed, templates=ioi.ALIGNED_TEMPLATES)


def selected(
    model, pairs: Pairs, held_out: Pairs | None, ranking: pd.DataFrame, universe: Universe, target: float
) -> tuple[Circuit, dict[str, float]]:
    """The smallest circuit of the ranked items with accuracy > target on `pairs`, and its scores.

    Scores: size, train_accuracy, and on `held_out` (on `pairs` where there are none) accuracy, normalized_logit_diff, n.
    """
    train = Evaluator(model, pairs, universe)
    circuit, tried = smallest(train, ranking, target)
    evaluated = Evaluator(model, held_out, universe) if held_out is not None else train
    scores = size_curve(evaluated, ranking, [len(circuit)]).iloc[0]
    return circuit, {
        "size": len(circuit),
        "train_accuracy": float(tried.loc[tried["size"] == len(circuit), "accuracy"].iloc[0]),
        "accuracy": float(scores["accuracy"]),
        "normalized_logit_diff": float(scores["normalized_logit_diff"]),
        "n": len(held_out if held_out is not None else pairs),
    }


def how_it_does(first: pd.Series, n_items: int, items: str) -> list[str]:
    """Two sentences from a row with the scores of `selected`."""
    return [
        f"{first['size']} of {n_items} {items} are enough for {first['train_accuracy']:.1%} accuracy "
        "on the pairs they were chosen on.",
        f"On {first['n']} prompts the circuit has accuracy {first['accuracy']:.1%} and normalized logit diff "
        f"{first['normalized_logit_diff']:.3f}.",
    ]
