"""Models to measure on: `mini`, and random weights in the shape of published checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, Mamba2Config, MambaConfig
from transformers.utils import logging

import ioi_mamba as im
from ioi_mamba.tasks.base import Pairs

# name -> (layers, width D, vocabulary); the rest is the same in all published Mambas (E = 2 D, N = 16, K = 4) and in all
# published Mamba-2 of their authors (E = 2 D, N = 128, K = 4, heads of 64 channels, one group, chunks of 256).
SHAPES = {
    "small": (4, 64, 1000),
    "mamba-130m": (24, 768, 50280),
    "mamba-370m": (48, 1024, 50280),
    "mamba2-130m": (24, 768, 50288),
    "mamba2-370m": (48, 1024, 50288),
    "mamba2-370m, 4 layers": (4, 1024, 50288),
}
POSITIONS = 20

logging.set_verbosity_error()
logging.disable_progress_bar()


@contextmanager
def opened(shape: str, *, layers: int | None = None) -> Iterator:
    """`mini`, or a model with random weights of that shape (with other `layers`, if given)."""
    if shape == "mini":
        yield im.open_model("mini", device="cpu")
        return
    with saved(shape, layers=layers) as directory:
        yield im.open_model(directory, device="cpu")


@contextmanager
def saved(shape: str, *, layers: int | None = None) -> Iterator[str]:
    """A directory with random weights of that shape (with other `layers`, if given)."""
    n, width, vocab = SHAPES[shape]
    sizes = {"vocab_size": vocab, "hidden_size": width, "num_hidden_layers": layers or n}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    if shape.startswith("mamba2"):
        config = Mamba2Config(**sizes, **ids, num_heads=width // 32, head_dim=64, state_size=128, n_groups=1)
    else:
        config = MambaConfig(**sizes, **ids)
    with TemporaryDirectory() as directory:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        yield directory


def stock(model):
    """The same weights in a model that nnsight has not touched: the yardstick."""
    own = AutoModelForCausalLM.from_config(model.config)
    weights = {name: value.detach() for name, value in model._module.state_dict().items()}
    own.load_state_dict(weights, assign=True)
    return own.requires_grad_(False).eval()


def pairs_for(model, n_pairs: int, n_positions: int = POSITIONS) -> Pairs:
    """Pairs that differ everywhere but at the first and last token: no cell of a sweep is free."""
    vocab = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(1, vocab, (n_pairs, n_positions), generator=generator)
    clean[:, 0] = 0
    corrupted = clean.clone()
    corrupted[:, 1:-1] = 1 + (clean[:, 1:-1] + 6) % (vocab - 1)
    answers = torch.stack([torch.randperm(vocab, generator=generator)[:2] for _ in range(n_pairs)])
    return Pairs.from_tokens(clean, corrupted, answers[:, 0], answers[:, 1])
