"""The pass through one block with a Mamba-1 mixer.

How it works. The mixer calls two functions, the causal convolution and the selective scan (`calls.py`). nnsight
serves the *inputs of those calls*; everything between is a formula of them (`scan.py`), so every internal value can be
computed beside the stock pass, and when one is written the call's output is replaced by the same formulas run from the
written value on. What is only read costs no rewrite, and a layer that is not opened runs stock code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ioi_mamba.model import scan
from ioi_mamba.model.mamba.calls import Calls
from ioi_mamba.model.scanned_layer import ScannedLayer

# What a value is computed from, within its stage.
_FED_BY = {
    "conv_slice": ("conv_start",),
    "conv": ("conv_slice", "conv_start"),
    "ssm_input": ("conv",),
    "delta": ("delta_2",),
    "A_bar": ("delta", "A"),
    "B_bar": ("delta",),
    "ssm_write": ("B_bar", "delta"),
    "h": ("A_bar", "B_bar", "ssm_write", "h_start"),
    "y": ("h", "A_bar", "B_bar", "ssm_write", "h_start", "delta", "A"),
    "ssm_output": ("y",),
    "after_skip": ("ssm_output",),
}


class MambaLayer(ScannedLayer):
    """A pass through one block with a Mamba-1 mixer."""

    fed_by = _FED_BY
    call_outputs = ("ssm_input", "after_skip")
    inside = ("in_proj", "conv", "x_proj", "scan")
    calls = Calls

    # -- the stages ---------------------------------------------------------------------------------------------

    def _open(self, stage: str) -> None:
        values, calls = self._values, self._made_calls()
        if stage == "in_proj":
            values["in_proj"], values["skip"] = self._mixer.in_proj.output.chunk(2, dim=-1)
        elif stage == "conv":
            self._call = calls.conv()
        elif stage == "x_proj":
            R, N = self._letters["R"], self._letters["N"]
            parts = self._mixer.x_proj.output.split([R, N, N], dim=-1)
            values.update(zip(("delta_1", "B", "C"), parts, strict=True))
        else:
            self._call = calls.scan()

    def _close(self, stage: str) -> None:
        values = self._values
        if stage == "in_proj":
            self._mixer.in_proj.output = torch.cat((values["in_proj"], values["skip"]), dim=-1)
        elif stage == "conv":
            self._call.give(self.get("ssm_input"))
        elif stage == "x_proj":
            self._mixer.x_proj.output = torch.cat((values["delta_1"], values["B"], values["C"]), dim=-1)
        else:
            self._call.give(self.get("after_skip"), self._last_state)

    # -- the formulas -------------------------------------------------------------------------------------------

    def _ssm_input(self) -> Tensor:
        return self._convolved()

    def _delta_2(self) -> Tensor:
        delta_2, bias = self._call.delta_2, self._call.bias
        return delta_2 if bias is None else delta_2 + bias

    def _delta(self) -> Tensor:
        return F.softplus(self.get("delta_2"))

    def _A_bar(self) -> Tensor:
        return (self.get("delta")[..., None] * self.get("A")).exp_()

    def _B_bar(self) -> Tensor:
        return self.get("delta")[..., None] * self._call.B[:, :, None, :]

    def _scan_input(self) -> Tensor:
        return self._call.x

    def _read_out(self, h: Tensor) -> Tensor:
        return scan.read_out(h, self._call.C)

    def _scanned(self) -> tuple[Tensor, Tensor]:
        call = self._call
        return scan.selective_scan(call.x, self.get("delta"), self.get("A"), call.B, call.C, self.get("h_start"))

    def _ssm_output(self) -> Tensor:
        return self.get("y") + self._call.x * self._call.D

    def _after_skip(self) -> Tensor:
        if self._written:
            return self.get("ssm_output") * F.silu(self._call.z)
        return self._call.output()


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
