"""Writes checkpoints as they are published: file names, tensor names and config keys are true, sizes and values not."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ioi_mamba.tasks import ioi

# config.json of state-spaces/mamba-370m.
ORIGINAL_370M = {
    "d_model": 1024,
    "n_layer": 48,
    "vocab_size": 50277,
    "ssm_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}
# config.json of state-spaces/mamba-370m-hf: the keys of mamba_ssm are still in it.
HF_370M = {
    "architectures": ["MambaForCausalLM"],
    "bos_token_id": 0,
    "conv_kernel": 4,
    "d_inner": 2048,
    "d_model": 1024,
    "eos_token_id": 0,
    "expand": 2,
    "fused_add_norm": True,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.1,
    "intermediate_size": 2048,
    "layer_norm_epsilon": 1e-05,
    "model_type": "mamba",
    "n_layer": 48,
    "num_hidden_layers": 48,
    "pad_token_id": 0,
    "pad_vocab_size_multiple": 8,
    "rescale_prenorm_residual": False,
    "residual_in_fp32": True,
    "rms_norm": True,
    "ssm_cfg": {},
    "state_size": 16,
    "time_step_floor": 0.0001,
    "time_step_init_scheme": "random",
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "time_step_rank": 64,
    "time_step_scale": 1.0,
    "torch_dtype": "float32",
    "transformers_version": "4.39.0.dev0",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "vocab_size": 50280,
}


def random_tensors(D, layers, rows, *, E=None, R=None, N=16, K=4, conv_bias=True, bias=False, tied=True, seed=0):
    """The tensors of a mamba_ssm file by name; every part of the model moves its logits. A tied head is one tensor."""
    generator = torch.Generator().manual_seed(seed)
    E, R = E or 2 * D, R or -(-D // 16)

    def normal(*shape, std=0.0, mean=0.0):
        return mean + (std or shape[-1] ** -0.5) * torch.randn(*shape, generator=generator)

    tensors = {"backbone.embedding.weight": normal(rows, D, std=0.5)}
    for i in range(layers):
        mixer = {
            "A_log": torch.arange(1.0, N + 1).log().expand(E, N) + normal(E, N, std=0.1),
            "D": normal(E, std=0.3, mean=1.0),
            "in_proj.weight": normal(2 * E, D),
            "conv1d.weight": normal(E, 1, K, std=0.5),
            "x_proj.weight": normal(R + 2 * N, E),
            "dt_proj.weight": normal(E, R),
            "dt_proj.bias": normal(E, std=0.5, mean=-2.0),
            "out_proj.weight": normal(D, E),
        }
        mixer |= {"conv1d.bias": normal(E, std=0.3)} if conv_bias else {}
        mixer |= {"in_proj.bias": normal(2 * E, std=0.3), "out_proj.bias": normal(D, std=0.3)} if bias else {}
        tensors |= {f"backbone.layers.{i}.mixer.{name}": tensor for name, tensor in mixer.items()}
        tensors[f"backbone.layers.{i}.norm.weight"] = normal(D, std=0.2, mean=1.0)
    tensors["backbone.norm_f.weight"] = normal(D, std=0.2, mean=1.0)
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"] if tied else normal(rows, D)
    return tensors


def reference_weights(tensors):
    """The same for `reference.run`, in float64."""
    named = {key.replace("backbone.embedding.", "backbone.embeddings."): t.double() for key, t in tensors.items()}
    return named | {"layers": sum(key.endswith("A_log") for key in tensors), "eps": 1e-5}


def write_original(directory: Path, tensors, **config):
    """`pytorch_model.bin` and config.json of mamba_ssm, and nothing else."""
    D, layers = tensors["backbone.norm_f.weight"].shape[0], sum(key.endswith("A_log") for key in tensors)
    directory.mkdir(parents=True, exist_ok=True)
    made = ORIGINAL_370M | {"d_model": D, "n_layer": layers} | config
    (directory / "config.json").write_text(json.dumps(made, indent=4))
    torch.save(tensors, directory / "pytorch_model.bin")
    return directory


def write_hf(directory: Path, tensors, **config):
    """`model.safetensors` and config.json of transformers."""
    tensors = {key.replace("backbone.embedding.", "backbone.embeddings."): t for key, t in tensors.items()}
    rows, D = tensors["backbone.embeddings.weight"].shape
    E, N = tensors["backbone.layers.0.mixer.A_log"].shape
    layers = sum(key.endswith("A_log") for key in tensors)
    if config.get("tie_word_embeddings", True):
        del tensors["lm_head.weight"]
    directory.mkdir(parents=True, exist_ok=True)
    sizes = {"d_model": D, "hidden_size": D, "d_inner": E, "intermediate_size": E, "state_size": N, "expand": E // D}
    sizes |= {"n_layer": layers, "num_hidden_layers": layers, "vocab_size": rows}
    sizes["time_step_rank"] = tensors["backbone.layers.0.mixer.dt_proj.weight"].shape[1]
    (directory / "config.json").write_text(json.dumps(HF_370M | sizes | config, indent=2))
    save_file({key: t.contiguous() for key, t in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    return directory


def neox_like_tokenizer():
    """Byte-level BPE with the special tokens of GPT-NeoX, in which the names of the task are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    words = sorted({*ioi.NAMES[:12], *ioi.PLACES, *ioi.OBJECTS, "and", "went", "to", "the", "gave", "a"})
    text = [f"Then, {' '.join(words)}. Friends" for _ in range(5)]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def write_neox_files(directory: Path):
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json as GPT-NeoX's repository has them."""
    directory.mkdir(parents=True, exist_ok=True)
    neox_like_tokenizer().save_pretrained(directory)
    special = {f"{kind}_token": "<|endoftext|>" for kind in ("bos", "eos", "unk")}
    (directory / "special_tokens_map.json").write_text(json.dumps(special))
    config = special | {"add_prefix_space": False, "name_or_path": "EleutherAI/gpt-neox-20b"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "GPTNeoXTokenizer"}))
    return directory


def put_into_hub_cache(cache: Path, repository: str, directory: Path):
    """The files of `directory` where huggingface_hub would have left them after a download of `repository`."""
    revision = "0" * 40
    home = cache / f"models--{repository.replace('/', '--')}"
    shutil.copytree(directory, home / "snapshots" / revision)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(revision)
