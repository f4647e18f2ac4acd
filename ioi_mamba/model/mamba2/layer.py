"""The pass through one block with a Mamba-2 mixer: as `mamba/layer.py`, with the formulas of `ssd.py`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ioi_mamba.model import scan, ssd
from ioi_mamba.model.family import Block, Family
from ioi_mamba.model.layer_pass import LayerPass, base
from ioi_mamba.model.mamba.calls import FullConv
from ioi_mamba.model.mamba.layer import MOVES_STATE, conv_output, conv_slice
from ioi_mamba.model.mamba2.calls import Mamba2Calls, Mamba2Scan

_FED_BY = {
    "conv_slice": ("conv_start",),
    "conv": ("conv_slice", "conv_start"),
    "ssm_input": ("conv", "conv_slice", "conv_start"),
    "B": ("conv", "conv_slice", "conv_start"),
    "C": ("conv", "conv_slice", "conv_start"),
    "delta": ("delta_2",),
    "A_bar": ("delta", "A"),
    "B_bar": ("delta",),
    "h": ("A_bar", "B_bar", "h_start"),
    "y": ("h", "A_bar", "B_bar", "h_start", "delta", "A"),
    "ssm_output": ("y",),
}


class Mamba2Layer(LayerPass):
    """A pass through one block with a Mamba-2 mixer."""

    fed_by = _FED_BY
    call_outputs = ("ssm_input", "B", "C", "ssm_output")
    inside = ("in_proj", "conv", "scan", "out_proj_input")

    def __init__(self, family: Family, block: Block, model: Any, layer: int, *, alone: bool):
        # By name: code that travels as source loses what super() looks up.
        LayerPass.__init__(self, family, block, model, layer, alone=alone)
        self._letters = family.sizes(self._config).letters
        self._calls: Mamba2Calls | None = None  # from in_proj on

    def conv_weight(self) -> Tensor:
        """The weights of the convolution, [E+2GN, K], as the pass hands them over."""
        self._reach("conv")
        return self._conv_call.weight

    @property
    def _conv_call(self) -> FullConv:
        assert isinstance(self._call, FullConv)
        return self._call

    @property
    def _scan(self) -> Mamba2Scan:
        assert isinstance(self._call, Mamba2Scan)
        return self._call

    # -- the stages ---------------------------------------------------------------------------------------------

    def _open(self, stage: str) -> None:
        if self._calls is None:
            self._calls = Mamba2Calls(self._mixer, self._alone)
        if stage == "in_proj":
            given = self._multiplied(self._mixer.in_proj.output)
            self._values["skip"], self._values["in_proj"], self._dt = given.split(self._split(), dim=-1)
        elif stage == "conv":
            self._call = self._calls.conv()
        else:
            self._call = self._calls.scan()

    def _close(self, stage: str) -> None:
        values = self._values
        if stage == "in_proj":
            whole = torch.cat((values["skip"], values["in_proj"], self._dt), dim=-1)
            self._mixer.in_proj.output = self._multiplied(whole, divide=True)
        elif stage == "conv":
            parts = (self.get("ssm_input"), self.get("B").flatten(2), self.get("C").flatten(2))
            self._conv_call.give(torch.cat(parts, dim=-1))
        else:
            self._scan.give(self.get("ssm_output"), self._last_state)

    def _split(self) -> list[int]:
        """The widths of what in_proj gives: the gate, what is convolved, and delta."""
        return [self._letters[letter] for letter in ("E", "E+2GN", "H")]

    def _multiplied(self, projected: Tensor, divide: bool = False) -> Tensor:
        """What in_proj gives, times what the config multiplies its sections with."""
        return projected

    # -- the formulas -------------------------------------------------------------------------------------------

    def _like(self, site: str) -> Tensor:
        # For y the scan's input serves, which costs no scan.
        return self._scan.x.flatten(2) if site == "y" and "y" not in self._values else self.get(site)

    def _compute(self, site: str) -> Tensor:
        if base(site) == "conv_slice":
            return conv_slice(self, self._conv_call, int(site.split(".")[1]))
        return getattr(self, f"_{site}")()

    def _conv_start(self) -> Tensor:
        return self._conv_call.start

    def _conv(self) -> Tensor:
        return conv_output(self, self._conv_call, self._written)

    def _convolved(self) -> tuple[Tensor, ...]:
        """x [batch, pos, E], and B and C [batch, pos, G, N], after the activation."""
        if {base(written) for written in self._written} & {"conv", "conv_start", "conv_slice"}:
            whole = F.silu(self.get("conv")).to(self._conv_call.u.dtype)
        else:
            whole = self._conv_call.output()
        E, G, N = (self._letters[letter] for letter in "EGN")
        x, B, C = whole.split([E, G * N, G * N], dim=-1)
        return x, B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))

    def _ssm_input(self) -> Tensor:
        return self._convolved()[0]

    def _B(self) -> Tensor:
        return self._convolved()[1]

    def _C(self) -> Tensor:
        return self._convolved()[2]

    def _delta_2(self) -> Tensor:
        return self._scan.dt + self._scan.bias

    def _delta(self) -> Tensor:
        return F.softplus(self.get("delta_2")).clamp(self._scan.low, self._scan.high)

    def _A(self) -> Tensor:
        return self._scan.A

    def _A_bar(self) -> Tensor:
        return (self.get("delta") * self.get("A")).exp()

    def _B_bar(self) -> Tensor:
        return self.get("delta")[..., None] * ssd.by_head(self._scan.B, self._letters["H"])

    def _h_start(self) -> Tensor:
        return self._scan.start

    def _h(self) -> Tensor:
        decay, drive = self.family.recurrence_terms(self.get("A_bar"), self.get("B_bar"), self._scan.x.flatten(2))
        # A written state forgets what came before it (decay 0) and is driven by the written value alone.
        for mask, value in self._state_writes:
            decay, drive = torch.where(mask, 0.0, decay), torch.where(mask, value, drive)
        return scan.recurrence(decay.expand_as(drive), drive, self.get("h_start"), overwrite=True)

    def _y(self) -> Tensor:
        if self._written & {"A_bar", "B_bar", "h"} or "h" in self._values:
            return ssd.read_out(self.get("h"), self._scan.C).flatten(2)
        return self._scanned()[0].flatten(2)

    def _scanned(self) -> tuple[Tensor, Tensor]:
        """y and the last state, of a scan in which neither A_bar, B_bar nor h is written."""
        call = self._scan
        return ssd.ssd_scan(call.x, self.get("delta"), self.get("A"), call.B, call.C, self.get("h_start"))

    def _last_state(self) -> Tensor | None:
        """The state after the last position, for a cache; None where nothing that moves it was written."""
        if not self._written & MOVES_STATE:
            return None
        if self._written & {"A_bar", "B_bar", "h"} or "h" in self._values:
            return self.get("h")[:, -1]
        return self._scanned()[1]

    def _ssm_output(self) -> Tensor:
        if self._written:
            return self.get("y") + (self._scan.x * self._scan.D[:, None]).flatten(2)
        return self._scan.output()
