"""Relevance rules: what a backward pass holds fixed, so that gradients times changes are closer to what patching does.

A gradient treats a layer norm's scale, an activation's slope, and how the state decays and is read as if they would follow
any change. Held fixed, the layer is linear in what flows through it (RelP, arXiv 2508.21258; the rules for Mamba after
MambaLRP, arXiv 2406.07592). Values stay as they are; only gradients differ. Each rule is named and can be left out:

| rule | what is held fixed |
|---|---|
| norm | the scale of the norm before a mixer, and of the last one |
| silu | the slope of SiLU after the convolution and at the gate, silu(z) = z sigmoid(z) with sigmoid(z) fixed; in a Mamba-2 the scale of the gated norm too |
| ssm | delta, B and C: y = M x with M fixed |
| half | each of the two factors at the gate, read-out and gate branch, counts half |

Without `half` a product of two factors counts twice, once for each, so relevance is not conserved; with all four rules it
is, but for biases: over any cut of the model gradients times values sum to the metric. Attention and MLPs of hybrids keep
their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ioi_mamba.errors import InputError
from ioi_mamba.model.families import block_of, sizes_of
from ioi_mamba.model.family import ATTENTION_WRITER
from ioi_mamba.passes.forward import Observer

RULES = {
    "norm": "the scale of the norm before a mixer, and of the last one, is held fixed",
    "silu": "the slope of SiLU after the convolution and at the gate is held fixed",
    "ssm": "delta, B and C are held fixed",
    "half": "each of the two factors at the gate counts half",
}
"""What each rule does."""
DEFAULT_RULES = ("norm", "silu", "ssm")
"""Those of RelP but `half`, which takes scores away from exact patching on all three trained models (bench/RESULTS.md)."""


def check_rules(rules: Iterable[str]) -> None:
    """Raise InputError for a rule that is none, and for half without silu, whose gate it is about."""
    rules = list(rules)
    for rule in rules:
        if rule not in RULES:
            raise InputError(f"There is no rule {rule!r}: the rules are {', '.join(RULES)}.")
    if "half" in rules and "silu" not in rules:
        raise InputError("The rule 'half' is about the gate, which the rule 'silu' makes linear: give both.")


def with_slopes(value: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """`value` itself; its gradient is that of the sum of slope times x over (slope, x), with the slopes held fixed."""
    out = value.detach()
    for slope, x in terms:
        out = out + (slope.detach() * (x - x.detach())).to(value.dtype)
    return out


def quotient(value: Tensor, by: Tensor) -> Tensor:
    """value / by, 0 where that is 0."""
    return torch.where(by == 0, 0.0, value / torch.where(by == 0, 1.0, by))


def scaled(value: Tensor, x: Tensor) -> Tensor:
    """What a norm makes of x, with its scale held fixed."""
    return with_slopes(value, (quotient(value.to(x.dtype), x), x))


def activated(value: Tensor, conv: Tensor) -> Tensor:
    """SiLU of the first channels of the convolution, with its slope held fixed."""
    conv = conv[..., : value.shape[-1]]
    return with_slopes(value, (torch.sigmoid(conv), conv))


def gated(value: Tensor, read_out: Tensor, gate: Tensor, share: float) -> Tensor:
    """Read-out times SiLU of the gate, with the slope of SiLU and the scale of a gated norm held fixed.

    share: how much of each factor counts.
    """
    wide = torch.promote_types(read_out.dtype, gate.dtype)
    o, z = read_out.to(wide), gate.to(wide)
    scale = share * quotient(value.to(wide), o * F.silu(z))
    return with_slopes(value, (scale * F.silu(z), o), (scale * o * torch.sigmoid(z), z))


def hooks(model: Any, rules: Iterable[str]) -> tuple[dict[str, Callable[[Tensor], Tensor]], dict[str, Observer]]:
    """The edits of a pass in which these rules hold, and the observers that they need, by hook name."""
    rules, seen = tuple(rules), {}
    edits: dict[str, Callable[[Tensor], Tensor]] = {}
    observe: dict[str, Observer] = {}

    def kept(name: str) -> str:
        observe[name] = lambda value: seen.__setitem__(name, value)
        return name

    blocks = [block_of(model, layer) for layer in range(sizes_of(model).n_layers)]
    if "norm" in rules:
        stream = kept(f"blocks.{len(blocks) - 1}.hook_resid_post")
        edits["hook_norm"] = lambda value: scaled(value, seen[stream])
    for layer, block in enumerate(blocks):
        if block.mixer is None:
            continue
        name = f"blocks.{layer}.hook_"
        # Where attention is no node of its own, the norm reads more than the layer's copy of the stream.
        if "norm" in rules and (not block.attends or ATTENTION_WRITER in block.all_writers()):
            copy = kept(f"{name}layer_input")
            edits[f"{name}normalized_input"] = lambda value, copy=copy: scaled(value, seen[copy])
        if "silu" in rules:
            conv, read_out, gate = (kept(f"{name}{site}") for site in ("conv", "ssm_output", "skip"))
            share = 0.5 if "half" in rules else 1.0
            edits[f"{name}ssm_input"] = lambda value, conv=conv: activated(value, seen[conv])
            edits[f"{name}after_skip"] = lambda value, o=read_out, z=gate, share=share: gated(
                value, seen[o], seen[z], share
            )
        if "ssm" in rules:
            edits |= dict.fromkeys((f"{name}{site}" for site in ("delta", "B", "C")), _fixed)
    return edits, observe


def _fixed(value: Tensor) -> Tensor:
    return value.detach()
