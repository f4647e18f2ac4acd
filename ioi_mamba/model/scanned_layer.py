"""What the passes through blocks with a state-space mixer have in common, of either kind of recurrence."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ioi_mamba.errors import InputError
from ioi_mamba.model import scan
from ioi_mamba.model.family import Block, Family
from ioi_mamba.model.layer_pass import LayerPass, base

# What the scan's last state depends on, of all that can be written after its inputs were served.
_MOVES_STATE = {"delta_2", "delta", "A", "A_bar", "B_bar", "ssm_write", "h_start", "h"}
BY_STATES = {"A_bar", "B_bar", "ssm_write", "h"}
"""Where these are written all states of the pass are made, which take N times the memory of all else."""


class ScannedLayer(LayerPass):
    """A pass through one block with a mixer: its convolution, and its states where they are looked at.

    calls: the class that says which calls the mixer makes in this pass (`mamba/calls.py`, `mamba2/calls.py`).
    """

    calls: type[Any]

    def __init__(self, family: Family, block: Block, model: Any, layer: int, *, alone: bool):
        # By name: code that travels as source loses what super() looks up.
        LayerPass.__init__(self, family, block, model, layer, alone=alone)
        self._letters = family.sizes(self._config).letters
        self._calls: Any = None  # from in_proj on
        self._scan: tuple[Tensor, Tensor] | None = None  # y and the last state, once they were needed

    def conv_weight(self) -> Tensor:
        """The weights of the convolution, [channel, K], as the pass hands them over."""
        self._reach("conv")
        return self._call.weight

    def _made_calls(self) -> Any:
        if self._calls is None:
            self._calls = self.calls(self._mixer, self._alone)
        return self._calls

    def _compute(self, site: str) -> Tensor:
        if base(site) == "conv_slice":
            return self._conv_slice(int(site.split(".")[1]))
        return getattr(self, f"_{site}")()

    def _like(self, site: str) -> Tensor:
        # For y the scan's input serves, which costs no scan.
        return self._scan_input() if site == "y" and "y" not in self._values else self.get(site)

    # -- the convolution ----------------------------------------------------------------------------------------

    def _conv_start(self) -> Tensor:
        return self._call.start

    def _padded(self) -> Tensor:
        return torch.cat((self.get("conv_start"), self._call.u), dim=1)

    def _conv_slice(self, s: int) -> Tensor:
        weight, u = self._call.weight, self._call.u
        width = weight.shape[-1]
        first = width - 1 + s
        if not 0 <= first < width:
            raise InputError(f"{self.name('conv_slice')}: conv slices are {1 - width} to 0, not {s}.")
        return weight[:, first] * self._padded()[:, first : first + u.shape[1]]

    def _conv(self) -> Tensor:
        weight, bias = self._call.weight, self._call.bias
        if any(base(written) == "conv_slice" for written in self._written):
            total = torch.stack([self.get(f"conv_slice.{s}") for s in range(1 - weight.shape[-1], 1)]).sum(0)
            return total if bias is None else total + bias
        # Tap by tap: without the copies that a convolution of torch makes, and no number differs.
        padded = self._padded().to(weight.dtype)
        L, taps = self._call.u.shape[1], weight.unbind(1)
        out = padded[:, :L] * taps[0] if bias is None else torch.addcmul(bias, padded[:, :L], taps[0])
        for k, tap in enumerate(taps[1:], 1):
            out = torch.addcmul(out, padded[:, k : k + L], tap)
        return out

    def _convolved(self) -> Tensor:
        """What the convolution gives after the activation, [batch, pos, channel]."""
        if {base(written) for written in self._written} & {"conv", "conv_start", "conv_slice"}:
            return F.silu(self.get("conv")).to(self._call.u.dtype)
        return self._call.output()

    # -- the recurrence -----------------------------------------------------------------------------------------

    def _scan_input(self) -> Tensor:
        """x as the scan is served it, [batch, pos, E]."""
        raise NotImplementedError

    def _read_out(self, h: Tensor) -> Tensor:
        """y [batch, pos, E] of all states."""
        raise NotImplementedError

    def _scanned(self) -> tuple[Tensor, Tensor]:
        """y and the last state, of a scan in which neither A_bar, B_bar nor h is written."""
        raise NotImplementedError

    def _A(self) -> Tensor:
        return self._call.A

    def _h_start(self) -> Tensor:
        return self._call.start

    def _terms(self) -> tuple[Tensor, Tensor]:
        """Decay and drive of every step."""
        return self.family.mixer.recurrence_terms(self.get("A_bar"), self.get("B_bar"), self._scan_input())

    def _ssm_write(self) -> Tensor:
        return self._terms()[1]

    def _h(self) -> Tensor:
        if self._one_position() and not self._by_writes():
            return self._scanned_once()[1][:, None]
        decay, drive = self._terms()
        if "ssm_write" in self._values:
            drive = self._values["ssm_write"].clone()  # the recurrence works in place
        # A written state forgets what came before it (decay 0) and is driven by the written value alone.
        for mask, value in self._state_writes:
            decay, drive = torch.where(mask, 0.0, decay), torch.where(mask, value, drive)
        return scan.recurrence(decay.expand_as(drive), drive, self.get("h_start"), overwrite=True)

    def _by_states(self) -> bool:
        """Whether y is read off all states: they are written, made of what is written, or there anyway."""
        return self._by_writes() or ("h" in self._values and not self._one_position())

    def _by_writes(self) -> bool:
        return bool(self._written & BY_STATES)

    def _one_position(self) -> bool:
        """Whether the pass has one position only, of which the last state is all states."""
        return self._scan_input().shape[1] == 1

    def _scanned_once(self) -> tuple[Tensor, Tensor]:
        if self._scan is None:
            self._scan = self._scanned()
        return self._scan

    def _y(self) -> Tensor:
        return self._read_out(self.get("h")) if self._by_states() else self._scanned_once()[0]

    def _last_state(self) -> Tensor | None:
        """The state after the last position, for a cache; None where nothing that moves it was written."""
        if not self._written & _MOVES_STATE:
            return None
        return self.get("h")[:, -1] if self._by_states() else self._scanned_once()[1]
