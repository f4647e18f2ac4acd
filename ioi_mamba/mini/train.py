"""Train `mini`, measure it on what it has not seen, and write the checkpoint and its model card.

    python -m ioi_mamba.mini.train --out DIR [--steps N] [--seed S] [--workers N] [--resume]

Everything random comes from the seed, so one machine makes the same checkpoint twice, with any number of workers: each
computes the gradients of some parts of a batch on one thread, and the sum over parts is always in the same order. The
state of the run is kept in DIR; `--resume` goes on from it, to the very weights that an uninterrupted run reaches. A
model that misses its thresholds is reported and not written.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, multiprocessing
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import MambaForCausalLM, PreTrainedTokenizerFast

from ioi_mamba.errors import InputError
from ioi_mamba.files import written_whole
from ioi_mamba.mini import measure
from ioi_mamba.mini.card import card
from ioi_mamba.mini.corpus import HELD_OUT_SEED, document, evaluation_sets, held_out_texts, split_answers, vocabulary
from ioi_mamba.mini.model import Recipe, Trained, logits, new_model
from ioi_mamba.mini.tokenizer import build_tokenizer

PART = 16
"""Documents that go through the model at once, on one worker."""


def training_batch(
    recipe: Recipe, step: int, tokenizer: PreTrainedTokenizerFast, held_out: Container[str]
) -> tuple[Tensor, Tensor]:
    """Tokens [batch, pos + 1], a row a document between two "<|endoftext|>", and the loss weight [batch, pos]
    of predicting tokens[:, 1:], shortest rows first. A function of the recipe and the step alone, so that a
    run can be resumed.
    """
    rng = random.Random(f"{recipe.seed}/{step}")
    rows: list[tuple[Tensor, Tensor]] = []
    for _ in range(recipe.batch):
        row, weight = [0], []
        for text, is_answer in split_answers(document(rng, held_out)):
            ids = tokenizer(text).input_ids
            row += ids
            weight += [recipe.answer_weight if is_answer else 1.0] * len(ids)
        rows.append((torch.tensor([*row, 0]), torch.tensor([*weight, 1.0])))
    rows.sort(key=lambda row: len(row[0]))
    tokens, weights = map(list, zip(*rows, strict=True))
    return pad_sequence(tokens, batch_first=True), pad_sequence(weights, batch_first=True)


@dataclass(frozen=True)
class _Parts:
    """What a worker needs to compute gradients: the model, whose weights are shared, and where gradients go.

    gradients: [part, parameter], shared.
    """

    recipe: Recipe
    tokenizer: PreTrainedTokenizerFast
    held_out: Container[str]
    model: MambaForCausalLM
    gradients: Tensor

    def compute(self, step: int, parts: range) -> list[tuple[float, int, int]]:
        """Write the gradients of some parts of a step's batch; of each its loss, answers that are right, answers."""
        recipe, found = self.recipe, []
        tokens, weights = training_batch(recipe, step, self.tokenizer, self.held_out)
        chance = torch.Generator().manual_seed(random.Random(f"{recipe.seed}/{step}/layers").getrandbits(62))
        kept = torch.rand(recipe.layers, recipe.batch, generator=chance) >= recipe.layer_drop
        keep = kept / (1 - recipe.layer_drop)
        # In parts of similar length: the same gradient for a third less padding.
        rows_of = torch.arange(recipe.batch).split(PART)
        for part in parts:
            rows = rows_of[part]
            longest = int((weights[rows] > 0).sum(1).amax())
            weight, target = weights[rows, :longest], tokens[rows, 1 : longest + 1]
            predicted = logits(self.model, tokens[rows, :longest], keep[:, rows])
            each = F.cross_entropy(predicted.transpose(1, 2), target, reduction="none")
            loss = (each * weight).sum() / weights.sum()
            gradients = torch.autograd.grad(loss, list(self.model.parameters()))
            self.gradients[part] = torch.cat([gradient.flatten() for gradient in gradients])
            answers = weight > 1
            found.append((loss.item(), int((predicted.argmax(-1) == target)[answers].sum()), int(answers.sum())))
        return found


def _work(parts: _Parts, numbers: range, pipe: Any) -> None:
    """The life of a worker: steps come in, what `compute` returns goes out, until None comes."""
    torch.set_num_threads(1)
    while (step := pipe.recv()) is not None:
        pipe.send(parts.compute(step, numbers))


@contextmanager
def _workers(parts: _Parts, n_workers: int) -> Iterator[Any]:
    """Within the block, a function of the step that computes all parts, on this process and n_workers - 1 others."""
    numbers = [range(first, len(parts.gradients), n_workers) for first in range(n_workers)]
    context, started = multiprocessing.get_context("spawn"), []
    for own in numbers[1:]:
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(parts, own, there), daemon=True)
        process.start()
        there.close()
        started.append((process, here))

    def compute(step: int) -> list[tuple[float, int, int]]:
        for _, pipe in started:
            pipe.send(step)
        found = [parts.compute(step, numbers[0]), *(pipe.recv() for _, pipe in started)]
        by_part = {
            k: each for own, results in zip(numbers, found, strict=True) for k, each in zip(own, results, strict=True)
        }
        return [by_part[k] for k in sorted(by_part)]

    try:
        yield compute
    finally:
        for process, pipe in started:
            pipe.close()
            process.terminate()
            process.join()


def train(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    held_out: Container[str],
    *,
    workers: int = 1,
    state_file: Path | None = None,
    save_every: int = 200,
    resume: bool = False,
) -> Trained:
    """Train a model.

    held_out: prompts that no document may have. workers: processes, of one thread each; the weights do not depend on
    it. state_file: where everything a later `resume` needs is kept, every `save_every` steps. Raises InputError where
    there is nothing to resume, or a run with another recipe left it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _train(recipe, tokenizer, held_out, workers, state_file, save_every, resume)
    finally:
        torch.set_num_threads(threads)


def _train(
    recipe, tokenizer, held_out, workers: int, state_file: Path | None, save_every: int, resume: bool
) -> Trained:
    model = new_model(recipe, len(tokenizer)).train().share_memory()
    parameters = list(model.parameters())
    matrices = [weight for weight in parameters if weight.ndim > 1]
    vectors = [weight for weight in parameters if weight.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    losses: list[float] = []
    right: list[float] = []
    seconds, started = 0.0, time.perf_counter()
    if resume:
        if state_file is None or not state_file.is_file():
            raise InputError(f"{state_file} does not exist; start without resuming.")
        saved = torch.load(state_file, weights_only=True)
        if saved["recipe"] != asdict(recipe):
            raise InputError(f"{state_file} was left by a run with other options; give those, or start anew.")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        losses, right, seconds = saved["losses"], saved["right"], saved["seconds"]
    sizes = [weight.numel() for weight in parameters]
    gradients = torch.zeros(-(-recipe.batch // PART), sum(sizes)).share_memory_()
    with _workers(_Parts(recipe, tokenizer, held_out, model, gradients), min(workers, len(gradients))) as compute:
        bar = tqdm(range(len(losses), recipe.steps), initial=len(losses), total=recipe.steps, desc="mini", unit="step")
        for step in bar:
            found = compute(step)
            for weight, gradient in zip(parameters, gradients.sum(0).split(sizes), strict=True):
                weight.grad = gradient.view_as(weight)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step)
            optimizer.step()
            losses.append(sum(loss for loss, _, _ in found))
            right.append(sum(hits for _, hits, _ in found) / sum(answers for _, _, answers in found))
            bar.set_postfix(loss=f"{losses[-1]:.3f}", answers=f"{right[-1]:.3f}", refresh=False)
            if state_file is not None and (step + 1) % save_every == 0:
                state = {"recipe": asdict(recipe), "model": model.state_dict(), "optimizer": optimizer.state_dict()}
                state |= {"losses": losses, "right": right, "seconds": seconds + time.perf_counter() - started}
                with written_whole(state_file) as path:
                    torch.save(state, path)
    return Trained(model.eval(), losses, right, seconds + time.perf_counter() - started)


def _run(out: Path, recipe: Recipe, workers: int, resume: bool) -> int:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out} cannot be made ({error.strerror}); name another directory.") from error
    tokenizer = build_tokenizer(vocabulary())
    state_file = out / "training-state.pt"
    kept = held_out_texts(tokenizer)
    trained = train(recipe, tokenizer, kept, workers=workers, state_file=state_file, resume=resume)
    figures = measure.published(trained.model, evaluation_sets(tokenizer, HELD_OUT_SEED))
    print(measure.figure_table(figures))
    lowest = min(row.among_names for row in figures), min(row.of_all_tokens for row in figures)
    if lowest[0] < measure.AMONG_NAMES or lowest[1] < measure.OF_ALL_TOKENS:
        print(
            f"Below {measure.AMONG_NAMES} among names or {measure.OF_ALL_TOKENS} of all tokens: "
            "no checkpoint is written."
        )
        return 1
    answers = measure.knowledge(trained.model, tokenizer, measure.DOCUMENTS)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        beside = Path(folder)
        trained.model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        measured = measure.Measured(figures, answers, measure.structure(beside))
        (beside / "README.md").write_text(card(recipe, trained, measured), encoding="utf-8")
        for file in beside.iterdir():
            file.chmod(0o644)
            os.replace(file, out / file.name)
    print(measure.judgement_table(measure.judged(measured)))
    state_file.unlink(missing_ok=True)
    print(f"Trained in {trained.seconds / 60:.1f} minutes; the checkpoint is in {out}.")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The command line. 0: a model was written; 1: it was not good enough; 2: bad input."""
    parser = argparse.ArgumentParser(prog="python -m ioi_mamba.mini.train", description="Train the embedded model.")
    parser.add_argument("--out", type=Path, default=Path("mini-checkpoint"), help="directory (%(default)s)")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="training steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="of weights and documents (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the state that a run left in --out")
    options = parser.parse_args(arguments)
    try:
        for name in ("steps", "workers"):
            if getattr(options, name) < 1:
                raise InputError(f"--{name} is {getattr(options, name)}; give at least 1.")
        return _run(options.out, Recipe(steps=options.steps, seed=options.seed), options.workers, options.resume)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
