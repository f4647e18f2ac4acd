"""The scan of a Mamba-2 mixer, as a pass meets it. Its convolution, of x, B and C side by side, is that of a Mamba-1.

The forms are those of `mamba/calls.py`: a whole prompt, and a step of a generation that goes on from a kept state.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ioi_mamba.model.mamba.calls import CONV_OP, STEP_CONV_OP, Calls, parameter

SCAN_OP = "mamba2_chunk_scan_0"
STEP_SCAN_OP = "mamba2_selective_state_update_0"
OPERATIONS = (CONV_OP, SCAN_OP, STEP_CONV_OP, STEP_SCAN_OP)


class Mamba2Calls(Calls):
    """Which calls this pass makes in one mixer."""

    def scan(self) -> Any:
        """The scan of this pass."""
        return (Mamba2Step if self.is_step else Mamba2Scan)(self)


class Mamba2Scan:
    """The scan of all positions.

    x: [batch, pos, H, P]; dt: [batch, pos, H], without its bias; B, C: [batch, pos, G, N]; A, D, bias: [H]; low, high: the
    ends between which delta is kept; start: [batch, H, P, N]. All in float32 or above; `dtype` is what the output is
    wanted in.
    """

    label = SCAN_OP

    def __init__(self, calls: Calls):
        self.calls, self.ran = calls, False
        self.op = getattr(calls.mixer.source, self.label)
        self._take()

    def _take(self) -> None:
        (x, dt, A, B, C), options = self.op.inputs
        self.with_state = bool(options.get("return_final_states"))
        self.low, self.high = options["dt_limit"]
        self._keep(x, dt, A, B, C, options["D"], options["dt_bias"], options.get("initial_states"))

    def _keep(self, x, dt, A, B, C, D, bias, start) -> None:
        module, H = self.calls.mixer._module, x.shape[2]
        self.dtype = x.dtype
        wide = torch.promote_types(x.dtype, torch.float32)
        self.x, self.dt, self.B, self.C = (value.to(wide) for value in (x, dt, B, C))
        own = lambda name: None if module is None else getattr(module, name)
        self.A = parameter(A, H, lambda: None if module is None else -torch.exp(module.A_log.float()), "A").to(wide)
        self.D = parameter(D, H, lambda: own("D"), "D").to(wide)
        self.bias = parameter(bias, H, lambda: own("dt_bias"), "the bias of delta").to(wide)
        nothing = self.x.new_zeros(x.shape[0], H, x.shape[3], B.shape[3])
        self.start = nothing if start is None else start.to(wide)

    def output(self) -> Tensor:
        """[batch, pos, E], with D x in it, before the gate."""
        self.ran = True
        served = self.op.output
        return (served[0] if self.with_state else served).flatten(2)

    def give(self, value: Tensor, state: Any) -> None:
        """Replace the output [batch, pos, E]; `state` gives the last state [batch, H, P, N], or None to leave it."""
        value = value.to(self.dtype).unflatten(2, self.x.shape[2:]).contiguous()
        if self.with_state:
            self.ran = True
            _, last = self.op.output
            written = state()
            self.op.output = (value, last if written is None else written.to(last.dtype))
        elif self.ran or not self.calls.alone:
            self.op.output = value
        else:
            self.op.skip(value)


class Mamba2Step(Mamba2Scan):
    """The scan of one more position, from the state that the cache keeps. Its delta has no ends."""

    label = STEP_SCAN_OP

    def _take(self) -> None:
        (kept, x, dt, A, B, C, D), options = self.op.inputs
        self.kept, self.gate = kept, options.get("z")
        self.low, self.high = 0.0, torch.inf
        x, dt, B, C = (value[:, None] for value in (x, dt[..., 0], B, C))
        # Parameters are served for every channel and column of a head; a copy of the state, which the call moves on.
        self._keep(x, dt, A[:, 0, 0], B, C, D[:, 0], options["dt_bias"][:, 0], kept.clone())

    def output(self) -> Tensor:
        """[batch, 1, E], with D x in it, before the gate."""
        self.ran = True
        served = self.op.output.flatten(1)[:, None]
        return served if self.gate is None else served / F.silu(self.gate.flatten(1)[:, None])

    def give(self, value: Tensor, state: Any) -> None:
        """Replace the output [batch, 1, E], and the kept state unless `state` gives None."""
        self.ran, served = True, self.op.output
        written = state()
        if written is not None:
            self.kept.copy_(written)
        if self.gate is not None:
            value = value * F.silu(self.gate.flatten(1)[:, None])
        self.op.output = value.reshape(served.shape).to(served.dtype)
