"""How often rewriting a name rewrites the continuation: `python -m bench.steering [--model mini] [--prompts 200]`.

Of each held-out prompt (seed 28) the name that answers it, one of the first three, is turned into another name by
subtract-and-add (`ioi_mamba.steer`); success: the greedy continuation begins with the intended name, and without the
edit with the answer.
"""

from __future__ import annotations

import argparse
import random

import torch
from tqdm import tqdm

import ioi_mamba as im
from ioi_mamba.passes.metrics import wilson_interval
from ioi_mamba.steering.bottleneck import find_layer, find_offset
from ioi_mamba.steering.steer import averages
from ioi_mamba.tasks import ioi


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Success of steering on held-out prompts.")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--prompts", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = im.open_model(options.model)
    tokenizer = model.tokenizer
    layer = find_layer(model)
    offset = find_offset(model, layer)
    means = averages(model, ioi.generate(tokenizer, 2000, 27, symmetric=True), layer, offset=offset)
    names = [tokenizer.decode([name]).strip() for name in means.names.tolist()]
    rng = random.Random(28)
    pairs = ioi.generate(tokenizer, options.prompts // 2 + 1, 28, symmetric=True)[: options.prompts]
    by_slot: dict[str, list[bool]] = {"n1": [], "n2": [], "n3": []}
    for row in tqdm(range(len(pairs)), desc="steer", mininterval=5):
        answer = tokenizer.decode([int(pairs.answer[row])]).strip()
        prompt = pairs.texts[row][0] if pairs.texts else ""
        slot = next(s for s in by_slot if int(pairs.clean[row, pairs.roles[s][row]]) == int(pairs.answer[row]))
        new = rng.choice([name for name in names if name not in prompt])
        plain, steered = (im.steer(model, prompt, each, averages=means, max_new_tokens=1) for each in ({}, {slot: new}))
        by_slot[slot].append(plain.strip() == answer and steered.strip() == new)
    print(f"{options.model}: layer {layer}, {offset} tokens after the name, {len(pairs)} prompts")
    for slot, wins in [*by_slot.items(), ("all", [win for each in by_slot.values() for win in each])]:
        if wins:
            low, high = wilson_interval(sum(wins), len(wins))
            print(f"{slot}: {sum(wins)} of {len(wins)}, {sum(wins) / len(wins):.1%} ({low:.1%} to {high:.1%})")


if __name__ == "__main__":
    main()
