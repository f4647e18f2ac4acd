"""Weights from either layout of a checkpoint: that of transformers, or that of the mamba_ssm library.

`state-spaces/mamba-370m-hf` is a transformers checkpoint and is loaded by transformers. `state-spaces/mamba-370m` is
the same model as it was first published (`state-spaces/mamba2-370m` exists in this form alone): other names in config.json, a `pytorch_model.bin` in which one tensor has
another name, a vocabulary that is padded to a multiple of 8 only when the model is built, and no tokenizer, because
GPT-NeoX's is meant. It is translated in memory, and the model that results is the transformers one, tensor for tensor.

Nothing of a checkpoint is executed: the `.bin` is unpickled with `weights_only=True`, which makes tensors and
containers of them and refuses everything else, and no code of a repository is trusted.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ioi_mamba.errors import InputError

if TYPE_CHECKING:
    from transformers import Mamba2Config, MambaConfig

NEOX = "EleutherAI/gpt-neox-20b"
NEOX_ROWS = 50280  # GPT-NeoX's 50,277 tokens, padded to a multiple of 8

# Options of the mixer (`ssm_cfg`) and what transformers calls them; the last five matter to initialisation only.
_MIXER_OPTIONS = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "dt_rank": "time_step_rank",
    "conv_bias": "use_conv_bias",
    "bias": "use_bias",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init": "time_step_init_scheme",
    "dt_scale": "time_step_scale",
    "dt_init_floor": "time_step_floor",
}
_MIXER_OPTIONS_2 = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "headdim": "head_dim",
    "ngroups": "n_groups",
    "chunk_size": "chunk_size",
    "conv_bias": "use_conv_bias",
    "bias": "use_bias",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init_floor": "time_step_floor",
    "dt_limit": "time_step_limit",
}
_DEFAULTS_2 = {"d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64, "ngroups": 1}
_EMBEDDING, _HEAD = "backbone.embedding.weight", "lm_head.weight"


def translated(config: dict[str, Any], name: str) -> MambaConfig | Mamba2Config | None:
    """The transformers config of a mamba_ssm config.json; None if `config` is not in that layout.

    The vocabulary counts its padding, as the weights do. Raises InputError, naming the model, for what is no stack of
    Mamba-1 or Mamba-2 with RMSNorm (attention layers, MLPs, LayerNorm), for unknown mixer options and for bad sizes.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import Mamba2Config, MambaConfig

    if "model_type" in config or not {"d_model", "n_layer", "vocab_size"} <= config.keys():
        return None
    if not isinstance(mixer := config.get("ssm_cfg") or {}, dict):
        raise InputError(f"{name!r} has ssm_cfg {mixer!r} in config.json: it must be an object of mixer options.")
    mixer = dict(mixer)
    kind = mixer.pop("layer", "Mamba1")
    mixer.pop("use_fast_path", None)  # which kernel to run, not what to compute
    if kind not in ("Mamba1", "Mamba2"):
        raise InputError(f"{name!r} is made of {kind} layers, which are not supported: use one of Mamba1 or Mamba2.")
    known = _MIXER_OPTIONS if kind == "Mamba1" else _MIXER_OPTIONS_2
    if kind == "Mamba2":
        mixer = _DEFAULTS_2 | mixer
    for key, what in (("attn_layer_idx", "attention layers"), ("d_intermediate", "MLPs between its layers")):
        if config.get(key):
            raise InputError(f"{name!r} has {what} ({key} is {config[key]}): use a checkpoint of Mamba layers alone.")
    if not config.get("rms_norm", True):
        raise InputError(f"{name!r} uses LayerNorm (rms_norm is false): use a checkpoint with RMSNorm.")
    if unknown := sorted(mixer.keys() - known.keys()):
        raise InputError(f"{name!r} has the unknown mixer option {unknown[0]!r} in ssm_cfg: use another checkpoint.")
    multiple = config.get("pad_vocab_size_multiple", 8)
    sizes = {key: config[key] for key in ("d_model", "n_layer", "vocab_size")} | {"pad_vocab_size_multiple": multiple}
    sizes |= {key: mixer[key] for key in ("d_state", "d_conv", "expand", "headdim", "ngroups") if key in mixer}
    for key, size in sizes.items():
        if type(size) is not int or size < 1:
            raise InputError(f"{name!r} has {key} {size!r} in config.json: it must be a whole number above 0.")
    common: dict[str, Any] = {
        "hidden_size": config["d_model"],
        "num_hidden_layers": config["n_layer"],
        "vocab_size": -(-config["vocab_size"] // multiple) * multiple,
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "tie_word_embeddings": config.get("tie_embeddings", True),
    } | {known[key]: value for key, value in mixer.items()}
    try:
        if kind == "Mamba1":
            return MambaConfig(**common)
        return Mamba2Config(num_heads=mixer["expand"] * config["d_model"] // mixer["headdim"], **common)
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{name!r} has a config.json that makes no Mamba ({reason}): restore the file.") from None


def load_weights(path: str, original: MambaConfig | Mamba2Config | None, dtype: torch.dtype):
    """The transformers model at `path` (a directory or a hub id), every parameter taken from the checkpoint.

    original: what `translated` made of its config. Raises ValueError or OSError with the reason if a file cannot be
    read, or if its tensors are not those of the config: transformers alone would fill a gap with random numbers.
    """
    from transformers import AutoModelForCausalLM, Mamba2ForCausalLM, MambaForCausalLM

    if original is None:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
        model, found = loaded
    else:
        tensors = _original_tensors(path, tied=original.tie_word_embeddings)
        kind = MambaForCausalLM if original.model_type == "mamba" else Mamba2ForCausalLM
        loaded = kind.from_pretrained(None, config=original, state_dict=tensors, dtype=dtype, output_loading_info=True)
        model, found = loaded
        model.config._name_or_path = str(path)
        if surplus := sorted(found["unexpected_keys"]):
            raise ValueError(f"it has {len(surplus)} tensors without a place in this model, {surplus[0]!r} among them.")
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"it lacks {len(missing)} of the model's tensors, {missing[0]!r} among them.")
    return model


def without_weights(path: str, original: MambaConfig | Mamba2Config | None, dtype: torch.dtype):
    """The module tree of the model at `path` and its config, without a single weight (on torch's device "meta")."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path) if original is None else original
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.config._name_or_path = str(path)
    return model.requires_grad_(False).eval()


def _original_tensors(path: str, tied: bool) -> dict[str, Tensor]:
    """The tensors of a mamba_ssm `pytorch_model.bin` by their transformers names; of a tied pair only one."""
    file = _file(path, "pytorch_model.bin")
    if file is None:
        raise OSError("pytorch_model.bin is not beside its config.json, or cannot be downloaded.")
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it is cut short"
        raise ValueError(f"pytorch_model.bin holds other things than tensors, or is broken ({reason})") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError("pytorch_model.bin is no dictionary of tensors by name.")
    if tied and _EMBEDDING in tensors and _HEAD in tensors:
        if not torch.equal(tensors[_EMBEDDING], tensors[_HEAD]):
            raise ValueError("lm_head.weight is not the embedding to which config.json ties it: set tie_embeddings.")
        del tensors[_HEAD]
    return {"backbone.embeddings.weight" if key == _EMBEDDING else key: tensor for key, tensor in tensors.items()}


def tokenizer_home(path: str, original: MambaConfig | Mamba2Config) -> str | None:
    """Where the tokenizer of a mamba_ssm checkpoint lies: at `path`, or GPT-NeoX's hub id; None if neither is meant.

    GPT-NeoX's is meant where there is no tokenizer.json and the vocabulary has the size of GPT-NeoX's. Raises
    InputError if it is and cannot be had: transformers would make an empty tokenizer instead.
    """
    if _file(path, "tokenizer.json") is not None:
        return path
    if original.vocab_size != NEOX_ROWS:
        return None
    if _file(NEOX, "tokenizer.json") is None:
        raise InputError(
            f"{path!r} has no tokenizer, and the one that is meant cannot be had from the hub: "
            f"put the tokenizer.json of {NEOX} beside its config.json."
        )
    return NEOX


def _file(path: str, name: str) -> str | None:
    """A file of a directory or of a hub repository, downloaded if need be; None if there is none."""
    from transformers.utils.hub import cached_file

    quiet = ("missing_entries", "connection_errors")
    return cached_file(path, name, **{f"_raise_exceptions_for_{kind}": False for kind in quiet})
