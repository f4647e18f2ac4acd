"""Train `mini`, measure it on prompts it has not seen, and write the checkpoint and its model card.

    python -m ioi_mamba.mini.train --out DIR [--architecture A] [--steps N] [--seed S] [--threads N] [--resume]

An architecture other than `mamba` makes one of its relatives, `mini-mamba2` or `mini-hybrid`, which learn the paper's
templates alone.

Everything random comes from the seed, so one machine with one number of threads makes the same checkpoint
twice. The state of the run is kept in DIR; `--resume` goes on from it, to the very weights that an
uninterrupted run reaches. A model that misses its thresholds is reported and not written.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Container
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

from ioi_mamba.errors import InputError
from ioi_mamba.files import written_whole
from ioi_mamba.mini.corpus import (
    ANSWER,
    HELD_OUT_SEED,
    TRAIN_SEED,
    document,
    evaluation_sets,
    held_out_texts,
    vocabulary,
)
from ioi_mamba.mini.tokenizer import build_tokenizer
from ioi_mamba.model.families import FAMILIES
from ioi_mamba.model.scan import selective_scan
from ioi_mamba.tasks.base import Pairs

AMONG_NAMES, OF_ALL_TOKENS = 0.99, 0.97
"""Held-out accuracies below which a model is not written."""


PART = 16
"""Documents that go through the model at once."""


def logits(model: Any, tokens: Tensor) -> Tensor:
    """What `model(tokens).logits` gives, [batch, pos, vocab], from the same parameters; of a Mamba-1 with a fast gradient.

    tokens: [batch, pos].
    """
    if not isinstance(model, MambaForCausalLM):
        return model(tokens, use_cache=False).logits
    residual = model.backbone.embeddings(tokens)
    layers: Any = model.backbone.layers
    for layer in layers:
        mixer = layer.mixer
        x, gate = mixer.in_proj(layer.norm(residual)).chunk(2, dim=-1)
        taps = mixer.conv1d.weight[:, 0].T  # [tap, E]
        earlier = F.pad(x, (0, 0, len(taps) - 1, 0))
        conv = sum(tap * earlier[:, k : k + x.shape[1]] for k, tap in enumerate(taps))
        x = F.silu(mixer.conv1d.bias + conv)
        sizes = (mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size)
        low_rank, B, C = mixer.x_proj(x).split(sizes, dim=-1)
        delta = F.softplus(mixer.dt_proj(low_rank))
        y, _ = selective_scan(x, delta, -mixer.A_log.exp(), B, C)
        residual = residual + mixer.out_proj((y + x * mixer.D) * F.silu(gate))
    return model.lm_head(model.backbone.norm_f(residual))


Architecture = Literal["mamba", "mamba2", "hybrid"]


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, all of it: two runs with equal recipes on one machine end equal."""

    architecture: Architecture = "mamba"
    steps: int = 1700
    seed: int = 0
    batch: int = 64
    layers: int = 8
    hidden: int = 128
    state: int = 8
    ramp: int = 1100  # steps until the mixture of documents is complete; it begins with the paper's templates
    learning_rate: float = 3e-3
    warmup: int = 100  # steps
    final_rate: float = 0.02  # of learning_rate, where the cosine ends
    weight_decay: float = 0.05  # of matrices
    answer_weight: float = 30.0  # of an answer in the loss, where any other token counts 1

    def rate(self, step: int) -> float:
        """Learning rate of a step: a linear warm-up, then a cosine."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        cosine = (1 + math.cos(math.pi * done)) / 2
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * cosine)


NEVER = 10**9
"""A ramp that is never climbed: the paper's templates alone."""

RECIPES: dict[str, Recipe] = {
    "mamba": Recipe(),
    "mamba2": Recipe(architecture="mamba2", steps=3200, batch=32, layers=4, hidden=96, state=16, ramp=NEVER),
    "hybrid": Recipe(architecture="hybrid", steps=2000, batch=32, layers=4, hidden=64, state=16, ramp=NEVER),
}
"""The recipe of each architecture: `mini`, and its relatives for tests and comparisons."""

HEAD_WIDTH, CHUNK = 16, 32


def new_model(recipe: Recipe, vocab_size: int) -> Any:
    """An untrained model of the recipe's architecture, sizes and seed.

    mamba2: one group of heads, of HEAD_WIDTH channels each. hybrid: a Bamba, whose third block has attention in place of
    the mixer, and every block an MLP.
    """
    if recipe.architecture == "mamba":
        return _new_mamba(recipe, vocab_size)
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": True}
    heads = 2 * recipe.hidden // HEAD_WIDTH
    torch.manual_seed(recipe.seed)
    if recipe.architecture == "mamba2":
        config = Mamba2Config(
            vocab_size=vocab_size,
            hidden_size=recipe.hidden,
            state_size=recipe.state,
            num_hidden_layers=recipe.layers,
            num_heads=heads,
            head_dim=HEAD_WIDTH,
            n_groups=1,
            chunk_size=CHUNK,
            **special,
        )
        return Mamba2ForCausalLM(config)
    config = BambaConfig(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden,
        intermediate_size=2 * recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        attn_layer_indices=[2],
        mamba_n_heads=heads,
        mamba_d_head=HEAD_WIDTH,
        mamba_d_state=recipe.state,
        mamba_n_groups=1,
        mamba_chunk_size=CHUNK,
        max_position_embeddings=512,
        **special,
    )
    return BambaForCausalLM(config)


def _new_mamba(recipe: Recipe, vocab_size: int) -> MambaForCausalLM:
    """As `new_model`.

    The output projections start smaller by the square root of the number of layers (the option of the
    configuration, which names the first weights alone and is put back). Without it the first layer learns
    the whole task by itself, and there is no circuit across layers to find.
    """
    config = MambaConfig(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden,
        state_size=recipe.state,
        num_hidden_layers=recipe.layers,
        conv_kernel=4,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=True,
        rescale_prenorm_residual=True,
    )
    torch.manual_seed(recipe.seed)
    model = MambaForCausalLM(config)
    model.config.rescale_prenorm_residual = False
    return model


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
        text = document(rng, held_out, variety=min(1.0, step / recipe.ramp) ** 3)
        for number, piece in enumerate(text.split(ANSWER)):
            ids = tokenizer(piece).input_ids
            row += ids
            weight += [recipe.answer_weight if number and not k else 1.0 for k in range(len(ids))]
        rows.append((torch.tensor([*row, 0]), torch.tensor([*weight, 1.0])))
    rows.sort(key=lambda row: len(row[0]))
    tokens, weights = map(list, zip(*rows, strict=True))
    return pad_sequence(tokens, batch_first=True), pad_sequence(weights, batch_first=True)


def train(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    held_out: Container[str],
    *,
    state_file: Path | None = None,
    save_every: int = 200,
    resume: bool = False,
) -> tuple[Any, list[float], float]:
    """The trained model, the loss of every step, and the seconds it took, before an interruption and after.

    state_file: where everything a later `resume` needs is kept, every `save_every` steps. Raises InputError
    where there is nothing to resume, or a run with another recipe left it.
    """
    model = new_model(recipe, len(tokenizer)).train()
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    losses: list[float] = []
    seconds, started = 0.0, time.perf_counter()
    if resume:
        if state_file is None or not state_file.is_file():
            raise InputError(f"{state_file} does not exist; start without resuming.")
        saved = torch.load(state_file, weights_only=True)
        if saved["recipe"] != asdict(recipe):
            raise InputError(f"{state_file} was left by a run with other options; give those, or start anew.")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        losses, seconds = saved["losses"], saved["seconds"]
    steps = range(len(losses), recipe.steps)
    bar = tqdm(steps, initial=len(losses), total=recipe.steps, desc="mini", unit="step")
    for step in bar:
        tokens, weights = training_batch(recipe, step, tokenizer, held_out)
        optimizer.zero_grad()
        loss, right = 0.0, 0
        # In parts of similar length: the same gradient for a third less padding.
        for rows in torch.arange(recipe.batch).split(PART):
            longest = int((weights[rows] > 0).sum(1).amax())
            weight, target = weights[rows, :longest], tokens[rows, 1 : longest + 1]
            predicted = logits(model, tokens[rows, :longest])
            each = F.cross_entropy(predicted.transpose(1, 2), target, reduction="none")
            share = (each * weight).sum() / weights.sum()
            share.backward()
            loss += share.item()
            right += int((predicted.argmax(-1) == target)[weight > 1].sum())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        optimizer.step()
        losses.append(loss)
        bar.set_postfix(loss=f"{loss:.3f}", answers=f"{right / int((weights > 1).sum()):.3f}", refresh=False)
        if state_file is not None and (step + 1) % save_every == 0:
            state = {
                "recipe": asdict(recipe),
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            state |= {"losses": losses, "seconds": seconds + time.perf_counter() - started}
            with written_whole(state_file) as path:
                torch.save(state, path)
    return model.eval(), losses, seconds + time.perf_counter() - started


@dataclass(frozen=True)
class Figure:
    """How often the answer has the largest logit: among the names of its pair, and of all tokens."""

    template: str
    corruption: str
    prompts: int
    among_names: float
    of_all_tokens: float


def measure(model: Any, sets: dict[tuple[str, str], Pairs]) -> list[Figure]:
    """The figures of `model` on each of `sets`."""
    figures = []
    for (template, corruption), pairs in sets.items():
        assert pairs.candidates is not None
        with torch.no_grad():
            last = logits(model, pairs.clean)[torch.arange(len(pairs)), pairs.last]
        of_names = last.gather(1, pairs.candidates.clamp(min=0)).where(pairs.candidates >= 0, -torch.inf)
        among_names = last.gather(1, pairs.answer[:, None])[:, 0] >= of_names.amax(1)
        of_all = last.argmax(1) == pairs.answer
        accuracies = (right.float().mean().item() for right in (among_names, of_all))
        figures.append(Figure(template, corruption, len(pairs), *accuracies))
    return figures


def as_table(figures: list[Figure]) -> str:
    """The figures as a Markdown table."""
    rows = ["| template | corruption | prompts | among names | of all tokens |", "|---|---|---|---|---|"]
    for row in figures:
        rates = f"{row.among_names:.4f} | {row.of_all_tokens:.4f}"
        rows.append(f"| {row.template} | {row.corruption} | {row.prompts} | {rates} |")
    return "\n".join(rows)


CARD = """---
license: mit
library_name: transformers
tags: [mamba, interpretability, indirect-object-identification]
---
# mini

A small trained Mamba on which the analyses of this package run in seconds. It exists to be taken apart: it
does indirect object identification with three names, on the very prompts of the mamba-370m IOI paper (arXiv
2407.14008), and is built of the same parts as that model.

**What it is not.** It is not a language model: it has read nothing but short made-up documents of {words}
words, and how it continues other text means nothing. No figure of it is one of mamba-370m, and its circuits
say nothing about those of a model that was trained on natural text.

## Size
{layers} layers, hidden size {hidden}, {inner} channels with {state} state columns each, convolutions of
{conv} tokens, {vocab} vocabulary entries (embedding and unembedding tied), {parameters:,} parameters in
float32, {megabytes:.1f} MB. `AutoModelForCausalLM` and `AutoTokenizer` of `transformers` load the directory
as it is.

The tokenizer keeps the words of the training documents whole, with all 203 names, and cuts other text into
bytes. It gives the paper's prompts the token boundaries they have in GPT-NeoX (`After|wards`, `Fri|ends`). It
adds no BOS: prepend id 0.

## Training
`python -m ioi_mamba.mini.train --seed {seed} --steps {steps} --threads {threads}` made it in {minutes:.1f}
minutes: {steps} steps of {batch} documents, AdamW, learning rate {rate:g}, answers weighted {weight:g} to 1.
It begins with the paper's templates alone; from step {ramp} on they are three documents in ten. A quarter is
the same task in other words: two to four people, every order, one giver or all of them, two groups of which
one gives, other verbs, places and objects. Around either come other sentences, which name the same people
again or strangers. The rest uses the same names otherwise: lists said twice, possession, whereabouts, gifts
returned, people who leave. Prompts of the published data sets of the seeds {train_seed} and {held_out_seed}
occur in no training document (those of the steering set were not looked for).

## Held-out accuracy
Prompts of seed {held_out_seed}, both of each pair. Among names: the answer has the largest logit of the three
or four names of its pair (two or three in the last row). Of all tokens: the largest of all {vocab}.

{table}
"""


RELATIVE_CARD = """---
license: mit
library_name: transformers
tags: [{family}, interpretability, indirect-object-identification]
---
# mini-{architecture}

A small trained relative of `mini`, of the family `{family}`, for tests and comparisons. It has read the templates of the
mamba-370m IOI paper (arXiv 2407.14008) and nothing else, and does that task alone. It is not a language model, and no
figure of it is one of a published model.

{layers} layers, hidden size {hidden}, {vocab} vocabulary entries (those of `mini`), {parameters:,} parameters in float32.
`python -m ioi_mamba.mini.train --architecture {architecture} --seed {seed} --steps {steps} --threads {threads}` made it in
{minutes:.1f} minutes: {steps} steps of {batch} documents, AdamW, learning rate {rate:g}. Prompts of the published data
sets of the seeds {train_seed} and {held_out_seed} occur in no training document.

## Held-out accuracy
Prompts of seed {held_out_seed}, both of each pair. Among names: the answer has the largest logit of the names of its
pair. Of all tokens: the largest of all {vocab}.

{table}
"""


def write_checkpoint(
    out: Path,
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    seconds: float,
    figures: list[Figure],
) -> None:
    """Write model, tokenizer and model card beside the files of `out`; move them in once all are complete."""
    config = model.config
    with tempfile.TemporaryDirectory(dir=out) as folder:
        beside = Path(folder)
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        own = recipe.architecture == "mamba"
        sizes = FAMILIES[config.model_type].sizes(config).letters
        card = (CARD if own else RELATIVE_CARD).format(
            architecture=recipe.architecture,
            family=config.model_type,
            words=len({word.strip() for word in vocabulary()}),
            layers=config.num_hidden_layers,
            hidden=sizes["D"],
            inner=sizes["E"],
            state=sizes["N"],
            conv=sizes["K"],
            vocab=sizes["vocab"],
            parameters=model.num_parameters(),
            megabytes=sum(file.stat().st_size for file in beside.iterdir()) / 1e6,
            seed=recipe.seed,
            steps=recipe.steps,
            minutes=seconds / 60,
            threads=torch.get_num_threads(),
            batch=recipe.batch,
            rate=recipe.learning_rate,
            weight=recipe.answer_weight,
            ramp=recipe.ramp,
            train_seed=TRAIN_SEED,
            held_out_seed=HELD_OUT_SEED,
            table=as_table(figures),
        )
        (beside / "README.md").write_text(card, encoding="utf-8")
        for file in beside.iterdir():
            file.chmod(0o644)
            os.replace(file, out / file.name)


def _run(out: Path, recipe: Recipe, resume: bool) -> int:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out} cannot be made ({error.strerror}); name another directory.") from error
    tokenizer = build_tokenizer(vocabulary())
    state_file = out / "training-state.pt"
    model, _, seconds = train(recipe, tokenizer, held_out_texts(tokenizer), state_file=state_file, resume=resume)
    figures = measure(model, evaluation_sets(tokenizer, HELD_OUT_SEED))
    print(as_table(figures))
    if any(row.among_names < AMONG_NAMES or row.of_all_tokens < OF_ALL_TOKENS for row in figures):
        print(f"Below {AMONG_NAMES} among names or {OF_ALL_TOKENS} of all tokens: no checkpoint is written.")
        return 1
    write_checkpoint(out, model, tokenizer, recipe, seconds, figures)
    state_file.unlink(missing_ok=True)
    print(f"Trained in {seconds / 60:.1f} minutes; the checkpoint is in {out}.")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The command line. 0: a model was written; 1: it was not good enough; 2: bad input."""
    parser = argparse.ArgumentParser(prog="python -m ioi_mamba.mini.train", description="Train the embedded model.")
    parser.add_argument("--out", type=Path, default=Path("mini-checkpoint"), help="directory (%(default)s)")
    parser.add_argument("--architecture", choices=RECIPES, default="mamba", help="of the model (%(default)s)")
    parser.add_argument("--steps", type=int, default=None, help="training steps (those of the recipe)")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="of weights and documents (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="processor threads (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the state that a run left in --out")
    options = parser.parse_args(arguments)
    try:
        recipe = RECIPES[options.architecture]
        recipe = replace(recipe, seed=options.seed, steps=recipe.steps if options.steps is None else options.steps)
        for name, value in (("steps", recipe.steps), ("threads", options.threads)):
            if value < 1:
                raise InputError(f"--{name} is {value}; give at least 1.")
        torch.set_num_threads(options.threads)
        return _run(options.out, recipe, options.resume)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
