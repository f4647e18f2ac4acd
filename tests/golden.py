"""What several test modules share: the golden values and the models the tests of the core run on."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import conftest  # noqa: F401  sets the environment that keeps tests off the network
import torch
from reference import weights_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MambaConfig

import ioi_mamba as im

DIRECTORY = Path(__file__).parent / "data" / "golden"
LISTS = json.loads((DIRECTORY / "golden.json").read_text())
TENSORS = load_file(DIRECTORY / "golden.safetensors")
NODES = ["embed", "0", "1", "2", "3", "output"]


@cache
def model(dtype="float32"):
    """The random Mamba that the golden values belong to."""
    return im.open_model(str(DIRECTORY), device="cpu", dtype=dtype)


@cache
def odd_model(dtype="float32", **sizes):
    """A random Mamba with every size and option other than usual: 3 conv taps, biases turned about, 3 layers.

    sizes: options of its config that are to be other still.
    """
    options = {
        "vocab_size": 60,
        "hidden_size": 20,
        "expand": 3,
        "state_size": 5,
        "num_hidden_layers": 3,
        "conv_kernel": 3,
        "time_step_rank": 3,
        "use_bias": True,
        "use_conv_bias": False,
        "layer_norm_epsilon": 1e-3,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    config = MambaConfig(**options | sizes)
    with torch.random.fork_rng(), TemporaryDirectory() as directory:
        torch.manual_seed(1)
        built = AutoModelForCausalLM.from_config(config)
        for name, parameter in built.named_parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=0.35)
            elif "norm" in name or name.endswith((".D", "bias")):
                parameter.data += 0.5 * torch.randn_like(parameter)
        for block in built.backbone.layers:
            block.mixer.A_log.data.clamp_(-1.0, 1.0)
        built.save_pretrained(directory)
        return im.open_model(directory, device="cpu", dtype=dtype)


@cache
def opened(name):
    """A model by the name under which tests are parametrized."""
    return {"golden": model, "odd": odd_model, "mini": lambda: im.open_model("mini", device="cpu")}[name]()


@cache
def weights(name, dtype=torch.float64):
    """The weights of `opened(name)` for the reference."""
    return weights_of(opened(name), dtype)


@cache
def golden_pairs():
    """The five pairs of the golden values."""
    return im.Pairs.from_tokens(*(TENSORS[f"ids/{key}"] for key in ("clean", "corr", "ans", "ans_corr")))


def random_pairs(name, n_pairs=4, n_pos=9, seed=0, lengths=None):
    """Pairs of random tokens that differ at positions 2 and 4, and nowhere else."""
    vocab = opened(name).config.vocab_size
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(1, vocab, (n_pairs, n_pos), generator=generator)
    clean[:, 0] = 0
    corrupted = clean.clone()
    for position in (2, 4):
        corrupted[:, position] = 1 + (clean[:, position] + 6) % (vocab - 1)
    answers = torch.stack([torch.randperm(vocab, generator=generator)[:2] for _ in range(n_pairs)])
    return im.Pairs.from_tokens(clean, corrupted, answers[:, 0], answers[:, 1], lengths=lengths)


def at_last(logits, pairs):
    """[pair, vocab] out of [pair, pos, vocab]."""
    return logits[torch.arange(len(pairs)), pairs.last]


def relative_error(got, want):
    """Largest difference over the largest magnitude of what is wanted."""
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-6)).item()
