"""The pass through one layer of a Mamba-1.

How it works. The mixer calls two functions, the causal convolution and the selective scan (`calls.py`). nnsight
serves the *inputs of those calls*; everything between is a formula of them (`scan.py`), so every internal value can be
computed beside the stock pass, and when one is written the call's output is replaced by the same formulas run from the
written value on. What is only read costs no rewrite, and a layer that is not opened runs stock code.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ioi_mamba.errors import InputError
from ioi_mamba.model import scan
from ioi_mamba.model.family import Block, Family
from ioi_mamba.model.layer_pass import LayerPass, base
from ioi_mamba.model.mamba.calls import Calls, FullConv, FullScan

# What the scan's last state depends on, of all that can be written after its inputs were served.
MOVES_STATE = {"delta_2", "delta", "A", "A_bar", "B_bar", "h_start", "h"}

# What a value is computed from, within its stage.
_FED_BY = {
    "conv_slice": ("conv_start",),
    "conv": ("conv_slice", "conv_start"),
    "ssm_input": ("conv",),
    "delta": ("delta_2",),
    "A_bar": ("delta", "A"),
    "B_bar": ("delta",),
    "h": ("A_bar", "B_bar", "h_start"),
    "y": ("h", "A_bar", "B_bar", "h_start", "delta", "A"),
    "ssm_output": ("y",),
    "after_skip": ("ssm_output",),
}


def _padded(layer: LayerPass, call: FullConv) -> Tensor:
    return torch.cat((layer.get("conv_start"), call.u), dim=1)


def conv_slice(layer: LayerPass, call: FullConv, s: int) -> Tensor:
    """One tap of the convolution, [batch, pos, channel], before bias and activation. Raises InputError for no tap."""
    width = call.weight.shape[-1]
    first = width - 1 + s
    if not 0 <= first < width:
        raise InputError(f"{layer.name('conv_slice')}: conv slices are {1 - width} to 0, not {s}.")
    return call.weight[:, first] * _padded(layer, call)[:, first : first + call.u.shape[1]]


def conv_output(layer: LayerPass, call: FullConv, written: set[str]) -> Tensor:
    """The convolution [batch, pos, channel], before the activation; a sum of slices where one of them is written."""
    weight, bias = call.weight, call.bias
    if any(base(site) == "conv_slice" for site in written):
        total = torch.stack([layer.get(f"conv_slice.{s}") for s in range(1 - weight.shape[-1], 1)]).sum(0)
        return total if bias is None else total + bias
    padded = _padded(layer, call).transpose(1, 2).to(weight.dtype)
    return F.conv1d(padded, weight[:, None], bias, groups=weight.shape[0]).transpose(1, 2)


class MambaLayer(LayerPass):
    """A pass through one block of a Mamba-1."""

    fed_by = _FED_BY
    call_outputs = ("ssm_input", "after_skip")
    inside = ("in_proj", "conv", "x_proj", "scan")

    def __init__(self, family: Family, block: Block, model: Any, layer: int, *, alone: bool):
        # By name: code that travels as source loses what super() looks up.
        LayerPass.__init__(self, family, block, model, layer, alone=alone)
        self._letters = family.sizes(self._config).letters
        self._calls: Calls | None = None  # from in_proj on

    def conv_weight(self) -> Tensor:
        """The weights of the convolution, [E, K], as the pass hands them over."""
        self._reach("conv")
        return self._conv_call.weight

    @property
    def _conv_call(self) -> FullConv:
        assert isinstance(self._call, FullConv)
        return self._call

    @property
    def _scan(self) -> FullScan:
        assert isinstance(self._call, FullScan)
        return self._call

    # -- the stages ---------------------------------------------------------------------------------------------

    def _open(self, stage: str) -> None:
        values = self._values
        if self._calls is None:
            self._calls = Calls(self._mixer, self._alone)
        if stage == "in_proj":
            values["in_proj"], values["skip"] = self._mixer.in_proj.output.chunk(2, dim=-1)
        elif stage == "conv":
            self._call = self._calls.conv()
        elif stage == "x_proj":
            values.update(
                zip(("delta_1", "B", "C"), self._mixer.x_proj.output.split(self._split(), dim=-1), strict=True)
            )
        else:
            self._call = self._calls.scan()

    def _close(self, stage: str) -> None:
        values = self._values
        if stage == "in_proj":
            self._mixer.in_proj.output = torch.cat((values["in_proj"], values["skip"]), dim=-1)
        elif stage == "conv":
            self._conv_call.give(self.get("ssm_input"))
        elif stage == "x_proj":
            self._mixer.x_proj.output = torch.cat((values["delta_1"], values["B"], values["C"]), dim=-1)
        else:
            self._scan.give(self.get("after_skip"), self._last_state)

    def _split(self) -> list[int]:
        """The widths of what x_proj gives: delta_1, B and C."""
        R, N = self._letters["R"], self._letters["N"]
        return [R, N, N]

    # -- the formulas -------------------------------------------------------------------------------------------

    def _like(self, site: str) -> Tensor:
        # For y the scan's input serves, which costs no scan.
        return self._scan.x if site == "y" and "y" not in self._values else self.get(site)

    def _compute(self, site: str) -> Tensor:
        if base(site) == "conv_slice":
            return conv_slice(self, self._conv_call, int(site.split(".")[1]))
        return getattr(self, f"_{site}")()

    def _conv_start(self) -> Tensor:
        return self._conv_call.start

    def _conv(self) -> Tensor:
        return conv_output(self, self._conv_call, self._written)

    def _ssm_input(self) -> Tensor:
        if {base(written) for written in self._written} & {"conv", "conv_start", "conv_slice"}:
            return F.silu(self.get("conv")).to(self._conv_call.u.dtype)
        return self._conv_call.output()

    def _delta_2(self) -> Tensor:
        delta_2, bias = self._scan.delta_2, self._scan.bias
        return delta_2 if bias is None else delta_2 + bias

    def _delta(self) -> Tensor:
        return F.softplus(self.get("delta_2"))

    def _A(self) -> Tensor:
        return self._scan.A

    def _A_bar(self) -> Tensor:
        return (self.get("delta")[..., None] * self.get("A")).exp_()

    def _B_bar(self) -> Tensor:
        return self.get("delta")[..., None] * self._scan.B[:, :, None, :]

    def _h_start(self) -> Tensor:
        return self._scan.start

    def _h(self) -> Tensor:
        decay, drive = self.family.recurrence_terms(self.get("A_bar"), self.get("B_bar"), self._scan.x)
        # A written state forgets what came before it (decay 0) and is driven by the written value alone.
        for mask, value in self._state_writes:
            decay, drive = torch.where(mask, 0.0, decay), torch.where(mask, value, drive)
        return scan.recurrence(decay, drive, self.get("h_start"), overwrite=True)

    def _y(self) -> Tensor:
        if self._written & {"A_bar", "B_bar", "h"} or "h" in self._values:
            return scan.read_out(self.get("h"), self._scan.C)
        return self._scanned()[0]

    def _scanned(self) -> tuple[Tensor, Tensor]:
        """y and the last state, of a scan in which neither A_bar, B_bar nor h is written."""
        call = self._scan
        return scan.selective_scan(call.x, self.get("delta"), self.get("A"), call.B, call.C, self.get("h_start"))

    def _last_state(self) -> Tensor | None:
        """The state after the last position, for a cache; None where nothing that moves it was written."""
        if not self._written & MOVES_STATE:
            return None
        if self._written & {"A_bar", "B_bar", "h"} or "h" in self._values:
            return self.get("h")[:, -1]
        return self._scanned()[1]

    def _ssm_output(self) -> Tensor:
        return self.get("y") + self._scan.x * self._scan.D

    def _after_skip(self) -> Tensor:
        if self._written:
            return self.get("ssm_output") * F.silu(self._scan.z)
        return self._scan.output()


class NormedMambaLayer(MambaLayer):
    """The same where delta_1, B and C go through norms of their own before the scan: B and C are what these give."""

    inside = ("in_proj", "conv", "x_proj", "B_norm", "C_norm", "scan")

    def _open(self, stage: str) -> None:
        if stage == "x_proj":
            self._values["delta_1"] = self._mixer.x_proj.output[..., : self._letters["R"]]
        else:
            MambaLayer._open(self, stage)

    def _close(self, stage: str) -> None:
        if stage == "x_proj":
            given, delta_1 = self._mixer.x_proj.output, self._values["delta_1"]
            self._mixer.x_proj.output = torch.cat((delta_1, given[..., delta_1.shape[-1] :]), dim=-1)
        else:
            MambaLayer._close(self, stage)
