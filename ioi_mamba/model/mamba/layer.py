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
from ioi_mamba.model.family import Family
from ioi_mamba.model.jobs import config_of
from ioi_mamba.model.layer_pass import LayerPass, base
from ioi_mamba.model.mamba.calls import Calls, FullConv, FullScan

# What the scan's last state depends on, of all that can be written after its inputs were served.
_MOVES_STATE = {"delta_2", "delta", "A", "A_bar", "B_bar", "h_start", "h"}

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


class MambaLayer(LayerPass):
    """A pass through one block of a Mamba-1."""

    fed_by = _FED_BY
    call_outputs = ("ssm_input", "after_skip")

    def __init__(self, family: Family, model: Any, layer: int, *, alone: bool):
        # By name: code that travels as source loses what super() looks up.
        LayerPass.__init__(self, family, model.backbone.layers[layer], layer, alone)
        self._config = config_of(model)
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

    def _enter(self, stage: str) -> None:
        block, values = self._block, self._values
        if self._calls is None and stage in self.family.inside:
            self._calls = Calls(block, self._alone)
        if stage == "block_input":
            values["resid_pre"] = block.input
        elif stage == "norm_input":
            values["layer_input"] = block.norm.input
        elif stage == "norm_output":
            values["normalized_input"] = block.norm.output
        elif stage == "in_proj":
            values["in_proj"], values["skip"] = block.mixer.in_proj.output.chunk(2, dim=-1)
        elif stage == "conv":
            assert self._calls is not None
            self._call = self._calls.conv()
        elif stage == "x_proj":
            sizes = [self._config.time_step_rank, self._config.state_size, self._config.state_size]
            parts = block.mixer.x_proj.output.split(sizes, dim=-1)
            values.update(zip(("delta_1", "B", "C"), parts, strict=True))
        elif stage == "scan":
            assert self._calls is not None
            self._call = self._calls.scan()
        elif stage == "mixer_output":
            values["out_proj"] = block.mixer.output
        else:
            values["resid_post"] = block.output

    def _leave(self, stage: str) -> None:
        block, values = self._block, self._values
        if stage == "block_input":
            block.input = values["resid_pre"]
        elif stage == "norm_input":
            block.norm.input = values["layer_input"]
        elif stage == "norm_output":
            block.norm.output = values["normalized_input"]
        elif stage == "in_proj":
            block.mixer.in_proj.output = torch.cat((values["in_proj"], values["skip"]), dim=-1)
        elif stage == "conv":
            self._conv_call.give(self.get("ssm_input"))
        elif stage == "x_proj":
            block.mixer.x_proj.output = torch.cat((values["delta_1"], values["B"], values["C"]), dim=-1)
        elif stage == "scan":
            self._scan.give(self.get("after_skip"), self._last_state)
        elif stage == "mixer_output":
            block.mixer.output = values["out_proj"]
        else:
            block.output = values["resid_post"]

    # -- the formulas -------------------------------------------------------------------------------------------

    def _like(self, site: str) -> Tensor:
        # For y the scan's input serves, which costs no scan.
        return self._scan.x if site == "y" and "y" not in self._values else self.get(site)

    def _compute(self, site: str) -> Tensor:
        if base(site) == "conv_slice":
            return self._conv_slice(int(site.split(".")[1]))
        return getattr(self, f"_{site}")()

    def _conv_start(self) -> Tensor:
        return self._conv_call.start

    def _padded(self) -> Tensor:
        return torch.cat((self.get("conv_start"), self._conv_call.u), dim=1)

    def _conv_slice(self, s: int) -> Tensor:
        weight, u = self._conv_call.weight, self._conv_call.u
        first = weight.shape[-1] - 1 + s
        if not 0 <= first < weight.shape[-1]:
            raise InputError(f"blocks.{self._layer}: conv slices are {1 - weight.shape[-1]} to 0, not {s}.")
        return weight[:, first] * self._padded()[:, first : first + u.shape[1]]

    def _conv(self) -> Tensor:
        weight, bias = self._conv_call.weight, self._conv_call.bias
        if any(base(written) == "conv_slice" for written in self._written):
            total = torch.stack([self.get(f"conv_slice.{s}") for s in range(1 - weight.shape[-1], 1)]).sum(0)
            return total if bias is None else total + bias
        padded = self._padded().transpose(1, 2).to(weight.dtype)
        return F.conv1d(padded, weight[:, None], bias, groups=weight.shape[0]).transpose(1, 2)

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
        if not self._written & _MOVES_STATE:
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
