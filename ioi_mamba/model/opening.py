"""Open a model: the embedded `mini`, a hub id, or a directory, in either layout of a checkpoint."""

from __future__ import annotations

import difflib
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ioi_mamba.errors import InputError
from ioi_mamba.files import EMBEDDED
from ioi_mamba.model import compiled_scan
from ioi_mamba.model.families import FAMILIES, check_labels
from ioi_mamba.model.mamba import checkpoints
from ioi_mamba.remote.workers import RayJobs, Workers

KNOWN = (*EMBEDDED, *(name for family in FAMILIES.values() for name in family.published))
"""The embedded models and published ones, to be named where an unknown name is near."""
BACKENDS = ("local", "ray", "ndif", "local-serialized")
_DTYPES = ("float32", "float64", "float16", "bfloat16")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
)


def _token_ids_tokenizer(vocab_size: int):
    """The tokenizer of a checkpoint that has none: the text "17 4 9" is the ids 17, 4, 9; id 0 is BOS.

    Any other word is the unknown token, whose id lies outside the model's vocabulary, so that it cannot pass unseen.
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({str(i): i for i in range(vocab_size)} | {"?": vocab_size}, unk_token="?"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    # As a whole word: a special token is else cut out of every id that has its digit.
    zero = AddedToken("0", single_word=True, normalized=False, special=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=zero, eos_token=zero, pad_token=zero, unk_token="?"
    )


def _read_config(name: str, local: bool) -> dict:
    from transformers import PreTrainedConfig

    if local:
        path = Path(name) / "config.json"
        if not path.is_file():
            raise InputError(f"{name!r} has no config.json: give a directory in Hugging Face layout.")
        try:
            config = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not JSON ({error}): restore the file.") from None
        if not isinstance(config, dict):
            raise InputError(f"{path} holds no JSON object: restore config.json.")
        return config
    if name.startswith((".", "/", "~")):
        raise InputError(f"There is no directory {name!r}: give an existing one, a hub id or 'mini'.")
    if "/" not in name and difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.6):
        # A slip of the pen is not asked of a hub, which may be minutes away.
        raise InputError(f"Unknown model {name!r}: {_nearest(name)}")
    try:
        return PreTrainedConfig.get_config_dict(name)[0]
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"Unknown model {name!r}: the hub did not give it ({reason}); {_nearest(name)}") from None


def _nearest(name: str) -> str:
    """What a user may have meant who gave an unknown name."""
    named = difflib.get_close_matches(name, KNOWN, n=2, cutoff=0.5) or KNOWN[:2]
    return f"did you mean {' or '.join(map(repr, named))}? Give one of these, another hub id, or a directory."


def _refuse(config: dict, name: str, any_architecture: bool) -> None:
    kind = config.get("model_type")
    if kind not in FAMILIES:
        if any_architecture:
            return
        raise InputError(
            f"{name!r} is a {kind} model, not a Mamba: use a checkpoint whose config says one of the model types "
            f"{', '.join(FAMILIES)}."
        )
    if (why := FAMILIES[kind].refusal(config)) is not None:
        raise InputError(f"{name!r} {why}")


def open_model(
    name: str = "mini",
    *,
    device: str | None = None,
    dtype: str | torch.dtype = "float32",
    backend: str = "local",
    host: str | None = None,
    workers: Workers | None = None,
    any_architecture: bool = False,
):
    """An nnsight `TransformersModel` ready for `read`, `run`, `mixer` and every experiment. Parameters are frozen.

    name: "mini", its relatives "mini-mamba2" and "mini-hybrid", a hub id such as "state-spaces/mamba-370m-hf", or a directory, in the layout of transformers or of
    mamba_ssm (`mamba/checkpoints.py`); without a tokenizer, prompts are token ids. device: "cpu", "cuda", ...; default a GPU
    if there is one. dtype: float32, float64, bfloat16 or float16, by name or as torch has it; the scan itself never runs below float32.
    any_architecture: accept causal language models that are no Mamba too (for `layer-removal`, which needs none).
    backend: "local"; "ray", `workers` that Ray runs hold the model once each and share the work (`model.jobs.close()`
    ends them); "ndif", the model stays on an NDIF server (`host`, default nnsight's setting; dtype and device
    are the server's, and a directory must be there under the same path); "local-serialized", everything a server
    would be sent is serialised and run here.
    Raises InputError for an unknown model, a directory without config or weights, and a model that is not a Mamba.
    """
    # Read by transformers when a mixer is built: without it, opening a model asks a hub for kernels.
    os.environ.setdefault("USE_HUB_KERNELS", "0")
    from nnsight import TransformersModel

    if backend not in BACKENDS:
        raise InputError(f"backend {backend!r} is unknown: use one of {', '.join(BACKENDS)}.")
    if workers is not None and backend != "ray":
        raise InputError(f"--address and --workers are for backend 'ray', not {backend!r}: leave them out.")
    if host is not None and backend != "ndif":
        raise InputError(f"--host {host} is for backend 'ndif', not {backend!r}: leave it out.")
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise InputError(f"dtype {dtype!r} is unknown: use one of {', '.join(_DTYPES)}.")
    path = str(EMBEDDED.get(name, name))
    local = bool(path) and Path(path).is_dir()
    config = _read_config(path, local)
    original = checkpoints.translated(config, name)
    config = config if original is None else original.to_dict()
    _refuse(config, name, any_architecture)
    if backend == "ndif":
        if original is not None:
            raise InputError(
                f"{name!r} is in the layout of mamba_ssm, which a server cannot open: use its -hf version."
            )
        model = _on_a_server(path, local, name, config, host)
    elif backend == "ray":
        opened = partial(open_model, name, device=device, dtype=dtype, any_architecture=any_architecture)
        weights = checkpoints.without_weights(path, original, getattr(torch, dtype))
        tokenizer = _tokenizer(path, name, original, weights.config.vocab_size)
        model = TransformersModel(weights, task="text-generation", tokenizer=tokenizer, device="meta")
        workers = workers or Workers()
        model.jobs = RayJobs(opened, replace(workers, gpus=0) if device == "cpu" else workers)
    else:
        weights = _weights(path, name, original, device, dtype)
        if weights.device.type == "cpu":
            compiled_scan.load()
        tokenizer = _tokenizer(path, name, original, weights.config.vocab_size)
        model = TransformersModel(weights, task="text-generation", tokenizer=tokenizer)
        if backend == "local-serialized":
            from ioi_mamba.remote.client import SerializedJobs

            model.jobs = SerializedJobs(name)
    if config.get("model_type") in FAMILIES:
        check_labels(model)
    return model


def _weights(path: str, name: str, original, device: str | None, dtype: str):
    """The model itself, frozen, on its device."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        # transformers draws first weights before it reads those of the file; the user's generator is not ours to turn.
        with torch.random.fork_rng(devices=[]):
            weights = checkpoints.load_weights(path, original, getattr(torch, dtype))
    except StrictDataclassError as error:
        raise InputError(f"The model {name!r} cannot be loaded: {' '.join(str(error).split())}") from None
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"The weights of {name!r} cannot be loaded: {str(error).splitlines()[0]}") from None
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        weights.to(place)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return weights.requires_grad_(False).eval()


def _tokenizer(path: str, name: str, original, vocab_size: int):
    from transformers import AutoTokenizer

    home = path if original is None else checkpoints.tokenizer_home(path, original)
    if home is None or (Path(home).is_dir() and not any((Path(home) / file).is_file() for file in _TOKENIZER_FILES)):
        return _token_ids_tokenizer(vocab_size)
    try:
        # With a translated config at hand, a lone tokenizer.json gets GPT-NeoX's special tokens.
        return AutoTokenizer.from_pretrained(home, config=original)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"The tokenizer of {name!r} cannot be loaded: {str(error).splitlines()[0]}") from None


def _on_a_server(path: str, local: bool, name: str, config: dict, host: str | None):
    """The model's tree without weights, and the jobs that reach the one with weights."""
    import nnsight
    from nnsight import TransformersModel
    from nnsight.modeling import huggingface

    from ioi_mamba.remote.client import ServerJobs, host_of

    host = host_of(host)
    # So that a trace with remote=True on this model goes there too.
    nnsight.CONFIG.API.HOST = host
    if local:
        # nnsight looks every id up on the hub, unless it knows it.
        huggingface._ID_CACHE[path] = path
    tokenizer = _tokenizer(path, name, None, config["vocab_size"])
    model = TransformersModel(path, task="text-generation", tokenizer=tokenizer)
    model.jobs = ServerJobs(model.to_model_key(), host)
    model.sent_config = model.config
    return model
