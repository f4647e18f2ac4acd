"""Can the model do the task at all? Its accuracy on the prompts of a run, before anything is done to it.

Every effect is relative to what the whole model does, so of a model that guesses it means nothing. A run keeps this
accuracy in each manifest; where it is below the bound, a report says so loudly and leaves out what means nothing then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import nnsight
import torch
from torch import Tensor

from ioi_mamba.experiments.experiment import Experiment
from ioi_mamba.experiments.needs import Need
from ioi_mamba.model.jobs import conduct, device_of, each_chunk
from ioi_mamba.passes.metrics import accuracy
from ioi_mamba.passes.sweep import plain_scores
from ioi_mamba.tasks.base import Pairs

MAX_PAIRS = 200
ROWS_OF_LOGITS = 64  # prompts whose logits over the whole vocabulary are asked for at a time
ROWS = 16  # prompts in one pass: their logits are kept whole, 4 MB each at 20 tokens of mamba-370m


def clean_accuracies(model, sets: Sequence[Pairs], bound: float | None = None) -> list[dict[str, Any]]:
    """For each set of pairs, of the unpatched model on its clean prompts, all from one job.

    accuracy: the share of prompts whose answer has the largest logit of its candidates (of answer and wrong where
    there are none), in 0..1; n: how many prompts, at most 200, evenly spaced; guessing: what guessing would have; bound: the
    one given (bound_given), or half way between guessing and 1.
    """
    samples = [pairs[:: -(-len(pairs) // MAX_PAIRS)].without_text() for pairs in sets]
    found = conduct(model, _accuracies, samples)
    scores = []
    for right, pairs in zip(found, samples, strict=True):
        guessing = _guessing(pairs)
        half_way = round((1 + guessing) / 2, 4)
        told = {
            "guessing": round(guessing, 4),
            "bound": half_way if bound is None else bound,
            "bound_given": bound is not None,
        }
        scores.append({"accuracy": float(right.double().mean()), "n": len(right)} | told)
    return scores


def clean_means(model, pairs: Pairs, measures: Callable[[Tensor, Pairs, Any], dict[str, Tensor]]) -> dict[str, float]:
    """Means over pairs of a task's own measures of the unpatched model; `measures` as in `tasks`."""
    parts = [pairs[rows] for rows in torch.arange(len(pairs)).split(ROWS_OF_LOGITS)]
    found = [
        measures(conduct(model, plain_scores, part.without_text(), part.clean), part, model.tokenizer) for part in parts
    ]
    return {name: float(torch.cat([each[name] for each in found]).mean()) for name in found[0]}


TOLD = ("n", "guessing", "bound", "bound_given")
"""What stands beside the measures of a manifest's `clean`."""


def is_below(manifest: Mapping[str, Any]) -> bool:
    """Whether the model of a run cannot do its task; False where a manifest does not say."""
    clean = manifest.get("clean")
    return clean is not None and clean["accuracy"] < clean["bound"]


def means_nothing(experiment: Experiment, manifest: Mapping[str, Any]) -> bool:
    """Whether an experiment measures changes of what a model does, and the model of this run does not do it.

    True below the bound of every experiment that needs a model which is able.
    """
    return is_below(manifest) and Need.ABLE in experiment.needs


def note(manifest: Mapping[str, Any]) -> str:
    """The sentence to show above figures of a model that cannot do the task."""
    clean = manifest["clean"]
    return (
        f"{manifest['model']['id']} cannot do this task: unpatched, it is right in {clean['accuracy']:.0%} of "
        f"{clean['n']} prompts, and guessing would be right in {clean.get('guessing', 2 * clean['bound'] - 1):.0%}. "
        "What the figures show is not how it does the task."
    )


def _guessing(pairs: Pairs) -> float:
    return float((1 / (pairs.choices >= 0).sum(1)).mean())


def _accuracies(model, sets: list[Pairs], *, progress=None) -> list[Tensor]:
    """Float32[pair] of each set, 1 where the answer wins. Any causal language model, so it is traced as one."""
    parts = [torch.arange(len(pairs)).split(ROWS) for pairs in sets]
    chunks = [(pairs[rows],) for pairs, own in zip(sets, parts, strict=True) for rows in own]
    found = torch.cat(each_chunk(model, _accuracy, chunks, progress=progress))
    return list(found.split([len(pairs) for pairs in sets]))


def _accuracy(model, pairs: Pairs, *, progress=None) -> Tensor:
    """Float32[pair] of some prompts."""
    rows = torch.arange(len(pairs))[:, None]
    with torch.no_grad(), model.trace(pairs.clean.to(device_of(model)), use_cache=False):
        logits = model.output.logits
        read = nnsight.save(logits[rows, pairs.read_at.to(logits.device)])
    return accuracy(pairs.scores(read.float().cpu()), pairs.answer, pairs.choices)
