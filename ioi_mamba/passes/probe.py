"""What a model runs in: weights, device, dtype, versions, and whether gradients are to be had. Asked by one job."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import Any

import torch

from ioi_mamba.errors import InputError, ServerError
from ioi_mamba.model.jobs import call, runs_here
from ioi_mamba.passes.forward import forward
from ioi_mamba.remote.store import weights_digest

KERNELS = ("mamba_ssm", "causal_conv1d")


def probe(model) -> dict[str, Any]:
    """Where the model is, here or on a server; every value is text, a truth value or a list or dict of these.

    weights_sha256: of parameters and buffers as loaded, in hex; None where a server does not show them. device, dtype: of the weights. kernels: the compiled
    ones in use. versions: python, torch, nnsight, transformers. gradients: whether a backward pass works; without,
    methods that need one are not to be had. Raises ServerError where a server does not answer.
    """
    found = call(model, _probe)
    try:
        # A job of its own: after a failed one a server's sandbox is not in order.
        found["gradients"] = call(model, _gradients)
    except (ServerError, InputError, RuntimeError):
        found["gradients"] = False
    return found


def _probe(model, *, progress=None) -> dict[str, Any]:
    # In a server's sandbox there are traces, but no modules to look at.
    tensors = None if model._module is None else model._module.state_dict()
    if tensors is None:
        stream = forward(model, torch.zeros(1, 1, dtype=torch.int64), reads=["hook_embed"])["hook_embed"]
    else:
        stream = next(iter(tensors.values()))
    on_gpu = stream.device.type == "cuda"
    return {
        "weights_sha256": None if tensors is None else weights_digest(tensors),
        "device": f"{stream.device} ({torch.cuda.get_device_name(stream.device)})" if on_gpu else str(stream.device),
        "dtype": str(stream.dtype).removeprefix("torch."),
        "kernels": [name for name in KERNELS if on_gpu and importlib.util.find_spec(name) is not None],
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in ("torch", "nnsight", "transformers")},
        },
    }


def weights_of(model) -> str:
    """What tells a model's weights from what they were before: their SHA-256; those on a server cannot be edited.

    Whatever is kept of a model is kept with this: after an edit of its weights it is made anew.
    """
    return weights_digest(model._module.state_dict()) if runs_here(model) else "on a server"


def _gradients(model, *, progress=None) -> bool:
    leaf: list[torch.Tensor] = []

    def edit(x: torch.Tensor) -> torch.Tensor:
        leaf.append(x.requires_grad_())
        return leaf[0]

    def differentiate(saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        (gradient,) = torch.autograd.grad(saved["hook_logits"][:, -1].float().sum(), leaf)
        return {"gradient": gradient}

    with torch.enable_grad():
        found = forward(model, torch.tensor([[0, 1, 2]]), {"hook_embed": edit}, reduce=differentiate)
    return bool(torch.isfinite(found["gradient"]).all())
