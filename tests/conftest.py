"""Models the tests share. Nothing here or in the tests needs a network."""

import json
import os

# Read when transformers is imported, so set before any test module imports it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["USE_HUB_KERNELS"] = "0"
os.environ["OMP_NUM_THREADS"] = "1"  # models so small that a second thread only waits

import pytest
import torch
from ndif_server.fixtures import ndif_server, sandboxed_ndif_server  # noqa: F401  fixtures of the remote tests
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, MambaConfig

import ioi_mamba as im
from ioi_mamba.files import MINI
from ioi_mamba.model.opening import _token_ids_tokenizer

torch.set_num_threads(1)

VOCAB = 40


def pytest_addoption(parser):
    parser.addoption("--write-docs", action="store_true", help="write the tables that tests make into docs/")


@pytest.fixture
def tried(record_property):
    """A function tried(what, number) with which a test tells `reliability.py` what it went through."""
    return lambda what, number: record_property("tried", [what, number])


@pytest.fixture(scope="session")
def tiny_mamba_dir(tmp_path_factory):
    """A directory with a random Mamba of 4 layers, all sizes different; its prompts are token ids."""
    path = tmp_path_factory.mktemp("tiny-mamba")
    save_mamba(path, vocab_size=VOCAB, n_layers=4)
    _token_ids_tokenizer(VOCAB).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def reads_names(tmp_path_factory):
    """A directory with a random Mamba of 2 layers that has the vocabulary of the embedded model."""
    path = tmp_path_factory.mktemp("reads-names")
    tokenizer = AutoTokenizer.from_pretrained(str(MINI))
    save_mamba(path, vocab_size=len(tokenizer), n_layers=2)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    """Three pairs of prompts of token ids, for a model without tokenizer, as a file."""
    rows = [([9, 11, 5, 6], 7, 8), ([9, 12, 4, 6], 3, 2), ([10, 11, 3, 6], 5, 1)]
    pairs = [([answer, *tokens], [wrong, *tokens], answer, wrong) for tokens, answer, wrong in rows]
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", pairs)


def write_pairs(path, pairs):
    """Write pairs (tokens, corrupted tokens, answer, wrong answer) for a model without tokenizer; returns the path."""
    with path.open("w") as file:
        for clean, corrupted, answer, wrong in pairs:
            pair = {
                "uncorrupted": " ".join(map(str, clean)),
                "corrupted": " ".join(map(str, corrupted)),
                "answer_uncorrupted": f" {answer}",
                "answer_corrupted": f" {wrong}",
                "incorrect_for_uncorrupted": [f" {wrong}"],
                "incorrect_for_corrupted": [f" {answer}"],
                "corruption": "A -> B",
            }
            file.write(json.dumps(pair) + "\n")
    return path


def save_mamba(path, *, vocab_size, n_layers):
    """Write a random Mamba, without a tokenizer; all sizes are different."""
    config = MambaConfig(
        vocab_size=vocab_size,
        hidden_size=24,
        state_size=5,
        num_hidden_layers=n_layers,
        expand=2,
        time_step_rank=3,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    _save(config, path)


@pytest.fixture(scope="session")
def tiny_mamba(tiny_mamba_dir):
    """The random Mamba, opened as a user opens it."""
    return im.open_model(str(tiny_mamba_dir), device="cpu")


@pytest.fixture(scope="session")
def tiny_gpt2_dir(tmp_path_factory):
    """A directory with a random GPT-2 of 3 layers; its prompts are token ids."""
    path = tmp_path_factory.mktemp("tiny-gpt2")
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=24, n_layer=3, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    _save(config, path)
    _token_ids_tokenizer(VOCAB).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def mini():
    """The embedded trained model."""
    return im.open_model("mini", device="cpu")


def _save(config, path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        # Wide enough that removing a layer moves the logits far beyond rounding.
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.data.mul_(4.0)
        model.save_pretrained(path)
