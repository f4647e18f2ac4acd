"""The two calls of a mixer, the causal convolution and the selective scan, as a pass meets them.

A pass over a whole prompt makes the full forms. A step of a generation with a cache makes others, which go on from a
kept past: `causal_conv1d_update` from the last conv inputs, `mamba_selective_state_update` from the state. Both are
served here in one layout, positions on axis 1, with the past they start from; and both take a value back in its place.

With a cache on, the full forms differ too: the convolution may be served more positions than the pass has (a prompt
shorter than the kernel is filled up in front), and the scan gives the last state beside its output.

Parameters are served among a call's inputs. nnsight cuts every served tensor whose first axis is as long as all rows of
all invokes together, so with several invokes it can take a parameter for rows; `parameter` then takes the module's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ioi_mamba.errors import InputError

# Operations inside MambaMixer.forward as nnsight's `.source` labels them; the last two are those of a step of a
# generation with a cache.
CONV_OP = "causal_conv1d_fn_0"
SCAN_OP = "mamba_selective_scan_0"
STEP_CONV_OP = "causal_conv1d_update_0"
STEP_SCAN_OP = "mamba_selective_state_update_0"
OPERATIONS = (CONV_OP, SCAN_OP, STEP_CONV_OP, STEP_SCAN_OP)


class Calls:
    """Which calls this pass makes in one mixer, over how many positions, and whether they may be skipped.

    alone: the pass has one invoke and no cache, so a call that is replaced need not run. Otherwise a replaced call
    runs all the same and its output is overwritten, which serves the rows of any invoke and any cache.
    """

    def __init__(self, mixer, alone: bool):
        self.mixer, self.alone = mixer, alone
        self.n_positions: int | None = None
        self.cache: Any = None
        self.is_step = False
        if not alone:
            args, kwargs = self.mixer.inputs
            named = {"hidden_states": 0, "cache": 1}
            given = {name: args[k] for name, k in named.items() if k < len(args)} | dict(kwargs)
            cache = given.get("cache", given.get("cache_params"))
            self.cache, self.n_positions = cache, given["hidden_states"].shape[1]
            index = self.mixer._module.layer_idx if self.mixer._module is not None else None
            if cache is not None and index is None:
                raise InputError(
                    "This server shows values but not the model that keeps them, so a cache cannot be written: give "
                    "use_cache=False to the trace."
                )
            self.is_step = cache is not None and self.n_positions == 1 and cache.has_previous_state(index)

    def conv(self) -> FullConv | StepConv:
        """The convolution of this pass."""
        return (StepConv if self.is_step else FullConv)(self)

    def scan(self) -> FullScan | StepScan:
        """The scan of this pass."""
        return (StepScan if self.is_step else FullScan)(self)


def parameter(served: Tensor, size: int, own, name: str) -> Tensor:
    """A parameter of `size` entries on its first axis: as served, or the module's where it was cut like rows.

    own: gives the module's, or None where a server shows none. Raises InputError where neither is whole.
    """
    if served.shape[0] == size:
        return served
    whole = own()
    if whole is None:
        raise InputError(
            f"{name} was taken for rows of the batch, since the rows of all invokes are as many as its {size} entries: "
            "add or leave out a prompt."
        )
    return whole


class _Call:
    """What the four calls have in common: their place, and whether they have run."""

    label = ""

    def __init__(self, calls: Calls):
        self.calls, self.module = calls, calls.mixer._module
        self.op = getattr(calls.mixer.source, self.label)
        self.ran = False

    def served_output(self):
        """The call's own output, after which only it can still change."""
        self.ran = True
        return self.op.output

    def replace(self, value) -> None:
        """Put a value in the place of the call's output."""
        if self.ran or not self.calls.alone:
            self.op.output = value
        else:
            self.op.skip(value)


class FullConv(_Call):
    """The convolution of all positions. u: [batch, pos, E]; start: [batch, K-1, E]; weight: [E, K]; bias: [E] or None."""

    label = CONV_OP

    def __init__(self, calls: Calls):
        _Call.__init__(self, calls)  # by name: code that travels as source loses what super() looks up
        (u, weight, bias, *_), _ = self.op.inputs
        self._take(u.transpose(1, 2), weight, bias, calls.n_positions)

    def _take(self, u: Tensor, weight: Tensor, bias: Tensor | None, n_positions: int | None) -> None:
        E, module = u.shape[2], self.module
        self.weight = parameter(
            weight, E, lambda: None if module is None else module.conv1d.weight.squeeze(1), "the conv weight"
        )
        self.bias = bias
        if bias is not None:
            self.bias = parameter(bias, E, lambda: None if module is None else module.conv1d.bias, "the conv bias")
        before = 0 if n_positions is None else u.shape[1] - n_positions
        reach = self.weight.shape[-1] - 1
        nothing = u.new_zeros(u.shape[0], max(0, reach - before), E)
        self.start = torch.cat((nothing, u[:, max(0, before - reach) : before]), dim=1)
        self.u, self.before = u[:, before:], before

    def output(self) -> Tensor:
        """[batch, pos, E], after the activation."""
        return self.served_output().transpose(1, 2)[:, self.before :]

    def give(self, value: Tensor) -> None:
        """Replace the output [batch, pos, E]."""
        if self.before:
            # The mixer drops what comes before its own positions.
            value = torch.cat((value.new_zeros(value.shape[0], self.before, value.shape[2]), value), dim=1)
        self.replace(value.transpose(1, 2))


class StepConv(FullConv):
    """The convolution of one more position, after the inputs that the cache keeps."""

    label = STEP_CONV_OP

    def __init__(self, calls: Calls):
        _Call.__init__(self, calls)
        (u, kept, weight, bias, *_), _ = self.op.inputs
        # A copy, since the call moves the kept inputs on in place.
        self._take(torch.cat((kept, u), dim=2).transpose(1, 2).to(u.dtype), weight, bias, u.shape[2])
        self.before = 0


class FullScan(_Call):
    """The scan of all positions.

    x, delta_2 (without its bias), z: [batch, pos, E]; B, C: [batch, pos, N]; A: [E, N]; D, bias: [E]; start:
    [batch, E, N]. All of them in float32 or above (A as the mixer makes it); `dtype` is what the output is wanted in.
    """

    label = SCAN_OP

    def __init__(self, calls: Calls):
        _Call.__init__(self, calls)  # by name: code that travels as source loses what super() looks up
        (x, dt, A, B, C), options = self.op.inputs
        self.with_state = bool(options.get("return_last_state"))
        x, dt, B, C, z = (value.transpose(1, 2) for value in (x, dt, B, C, options["z"]))
        self._take(x, dt, B, C, z, A, options["D"], options["delta_bias"], None)

    def _take(self, x, dt, B, C, z, A, D, bias, start) -> None:
        E, module = x.shape[2], self.module
        self.dtype = x.dtype
        wide = torch.promote_types(x.dtype, torch.float32)
        self.x, self.delta_2, self.B, self.C, self.z = (value.to(wide) for value in (x, dt, B, C, z))
        self.A = parameter(A, E, lambda: None if module is None else -torch.exp(module.A_log.float()), "A")
        self.D = parameter(D, E, lambda: None if module is None else module.D, "D").to(wide)
        self.bias = bias
        if bias is not None:
            own = lambda: None if module is None else module.dt_proj.bias
            self.bias = parameter(bias, E, own, "the bias of delta").to(wide)
        self.start = self.x.new_zeros(self.x.shape[0], *self.A.shape) if start is None else start.to(wide)

    def output(self) -> Tensor:
        """[batch, pos, E], with D x and the gate in it."""
        served = self.served_output()
        return (served[0] if self.with_state else served).transpose(1, 2)

    def give(self, value: Tensor, state) -> None:
        """Replace the output [batch, pos, E]; `state` gives the last state [batch, E, N], or None to leave it."""
        value = value.to(self.dtype).transpose(1, 2)
        if not self.with_state:
            self.replace(value)
            return
        _, last = self.served_output()
        written = state()
        self.replace((value, last if written is None else written.to(last.dtype)))


class StepScan(FullScan):
    """The scan of one more position, from the state that the cache keeps."""

    label = STEP_SCAN_OP
    with_state = False

    def __init__(self, calls: Calls):
        _Call.__init__(self, calls)
        (kept, x, dt, A, B, C, D), options = self.op.inputs
        self.kept = kept
        x, dt, B, C, z = (value[:, None] for value in (x, dt, B, C, options["z"]))
        # A copy, since the call moves the kept state on in place.
        self._take(x, dt, B, C, z, A, D, options["dt_bias"], kept.clone())

    def output(self) -> Tensor:
        """[batch, 1, E], with D x and the gate in it."""
        return self.served_output()[:, None]

    def give(self, value: Tensor, state) -> None:
        """Replace the output [batch, 1, E], and the kept state unless `state` gives None."""
        self.served_output()  # the call has moved the kept state on
        written = state()
        if written is not None:
            self.kept.copy_(written)
        self.replace(value[:, 0].to(self.dtype))
