"""The pass through one block with a Mamba-2 mixer: as `mamba/layer.py`, with the formulas of `ssd.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ioi_mamba.errors import InputError
from ioi_mamba.model import ssd
from ioi_mamba.model.mamba2.calls import Mamba2Calls
from ioi_mamba.model.scanned_layer import ScannedLayer

_FED_BY = {
    "conv_slice": ("conv_start",),
    "conv": ("conv_slice", "conv_start"),
    "ssm_input": ("conv", "conv_slice", "conv_start"),
    "B": ("conv", "conv_slice", "conv_start"),
    "C": ("conv", "conv_slice", "conv_start"),
    "delta": ("delta_2",),
    "A_bar": ("delta", "A"),
    "B_bar": ("delta",),
    "dual": ("A_bar", "B_bar", "delta", "A"),
    "ssm_write": ("B_bar", "delta"),
    "h": ("A_bar", "B_bar", "ssm_write", "h_start"),
    "y": ("dual", "h", "A_bar", "B_bar", "ssm_write", "h_start", "delta", "A"),
    "ssm_output": ("y",),
}


class Mamba2Layer(ScannedLayer):
    """A pass through one block with a Mamba-2 mixer."""

    fed_by = _FED_BY
    call_outputs = ("ssm_input", "B", "C", "ssm_output")
    inside = ("in_proj", "conv", "scan", "out_proj_input")
    calls = Mamba2Calls

    # -- the stages ---------------------------------------------------------------------------------------------

    def _open(self, stage: str) -> None:
        calls = self._made_calls()
        if stage == "in_proj":
            given = self._multiplied(self._mixer.in_proj.output)
            self._values["skip"], self._values["in_proj"], self._dt = given.split(self._split(), dim=-1)
        elif stage == "conv":
            self._call = calls.conv()
        else:
            self._call = calls.scan()

    def _close(self, stage: str) -> None:
        values = self._values
        if stage == "in_proj":
            whole = torch.cat((values["skip"], values["in_proj"], self._dt), dim=-1)
            self._mixer.in_proj.output = self._multiplied(whole, divide=True)
        elif stage == "conv":
            parts = (self.get("ssm_input"), self.get("B").flatten(2), self.get("C").flatten(2))
            self._call.give(torch.cat(parts, dim=-1))
        else:
            self._call.give(self.get("ssm_output"), self._last_state)

    def _split(self) -> list[int]:
        """The widths of what in_proj gives: the gate, what is convolved, and delta."""
        return [self._letters[letter] for letter in ("E", "E+2GN", "H")]

    def _multiplied(self, projected: Tensor, divide: bool = False) -> Tensor:
        """What in_proj gives, times what the config multiplies its sections with."""
        return projected

    # -- the formulas -------------------------------------------------------------------------------------------

    def _section(self, which: int) -> Tensor:
        """x, B or C of what the convolution gives, [batch, pos, width]."""
        E, G, N = (self._letters[letter] for letter in "EGN")
        return self._convolved().split([E, G * N, G * N], dim=-1)[which]

    def _ssm_input(self) -> Tensor:
        return self._section(0)

    def _B(self) -> Tensor:
        return self._section(1).unflatten(-1, (self._letters["G"], -1))

    def _C(self) -> Tensor:
        return self._section(2).unflatten(-1, (self._letters["G"], -1))

    def _delta_2(self) -> Tensor:
        return self._call.dt + self._call.bias

    def _delta(self) -> Tensor:
        return F.softplus(self.get("delta_2")).clamp(self._call.low, self._call.high)

    def _A_bar(self) -> Tensor:
        return (self.get("delta") * self.get("A")).exp()

    def _B_bar(self) -> Tensor:
        return self.get("delta")[..., None] * ssd.by_head(self._call.B, self._letters["H"])

    def _dual(self) -> Tensor:
        if self._written & {"A_bar", "B_bar"}:
            return ssd.dual_of_terms(self.get("A_bar"), self.get("B_bar"), self._call.C)
        return ssd.dual(self.get("delta"), self.get("A"), self._call.B, self._call.C)

    def _y(self) -> Tensor:
        if "dual" not in self._written:
            return ScannedLayer._y(self)
        for site in self._written & {"h", "ssm_write"}:
            raise InputError(
                f"{self.name('dual')} and {self.name(site)} were both written, and either makes y: write one of them."
            )
        from_start = ssd.read_out(self.get("h_start")[:, None], self._call.C)  # [batch, pos, H, P]
        left = self.get("A_bar").cumprod(1)[..., None]
        return (torch.einsum("bhts,bshp->bthp", self.get("dual"), self._call.x) + left * from_start).flatten(2)

    def _scan_input(self) -> Tensor:
        return self._call.x.flatten(2)

    def _read_out(self, h: Tensor) -> Tensor:
        return ssd.read_out(h, self._call.C).flatten(2)

    def _scanned(self) -> tuple[Tensor, Tensor]:
        call = self._call
        y, last = ssd.ssd_scan(call.x, self.get("delta"), self.get("A"), call.B, call.C, self.get("h_start"))
        return y.flatten(2), last

    def _ssm_output(self) -> Tensor:
        if self._written:
            return self.get("y") + (self._call.x * self._call.D[:, None]).flatten(2)
        return self._call.output()
