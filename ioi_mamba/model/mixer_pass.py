"""One layer's forward pass, stage by stage: read and write every value inside the stock Mamba mixer, in a plain trace.

`opened.Mixer` is the same for people, as attributes.

How it works. The mixer calls two functions, the causal convolution and the selective scan (`calls.py`). nnsight
serves the *inputs of those calls*; everything between is a formula of them (`scan.py`), so every internal value can be
computed beside the stock pass, and when one is written the call's output is replaced by the same formulas run from the
written value on. What is only read costs no rewrite, and a layer that is not opened runs stock code.

Values must be asked for in the order the pass reaches them (the order of `sites.SITES`); within a stage a value
must be written before anything computed from it is read. Both are checked, so no edit is silently dead.

Only plain functions over plain envoys are used and only torch is imported at run time, so that the same code can
be shipped to a server by value.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ioi_mamba.errors import InputError
from ioi_mamba.model import scan
from ioi_mamba.model.calls import Calls, FullConv, FullScan
from ioi_mamba.model.jobs import config_of
from ioi_mamba.model.sites import SITES, STAGES

# What a value is computed from, within its stage. A value may be written until something it feeds was computed.
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
_CALL_OUTPUTS = (
    "ssm_input",
    "after_skip",
)  # the outputs of the two calls, whose inputs all else is computed from


def _base(site: str) -> str:
    return site.split(".")[0]


# What the scan's last state depends on, of all that can be written after its inputs were served.
_MOVES_STATE = {"delta_2", "delta", "A", "A_bar", "B_bar", "h_start", "h"}


def has_values(value: Tensor) -> bool:
    """Whether a tensor has numbers: those of `model.scan`, which only follows shapes, have none."""
    return not value.is_meta and type(value).__name__ != "FakeTensor"


def fitted(name: str, value: Tensor, like: Tensor) -> Tensor:
    """`value` as the dtype and on the device of `like`.

    Raises InputError, naming the site, unless it is a finite tensor of the same shape.
    """
    if not isinstance(value, Tensor):
        raise InputError(f"{name}: an edit must be a tensor, not {type(value).__name__}.")
    if value.shape != like.shape:
        raise InputError(f"{name}: the edit has shape {tuple(value.shape)}, the site {tuple(like.shape)}.")
    if has_values(value) and not bool(torch.isfinite(value).all()):
        raise InputError(f"{name}: the edit holds NaN or infinity; write finite numbers.")
    return value.to(dtype=like.dtype, device=like.device)


class MixerPass:
    """A pass through one block, stage by stage. `get` and `set` take site names (`conv_slice.-1` for one tap).

    alone: the trace has one invoke and no cache, so that what is replaced need not run.
    """

    def __init__(self, model, layer: int, *, alone: bool):
        self._block = model.backbone.layers[layer]
        self._config = config_of(model)
        self._layer = layer
        self._alone = alone
        self._stage = -1
        self._values: dict[str, Tensor] = {}
        self._written: set[str] = set()
        self._calls: Calls | None = None  # from in_proj on
        self._call: FullConv | FullScan | None = None  # that of the current stage
        self._state_writes: list[tuple[Tensor, Tensor]] = []  # (mask, value), both broadcastable to h

    # -- the two verbs ------------------------------------------------------------------------------------------

    def get(self, site: str) -> Tensor:
        """The value at `site`, as the pass now has it. Not a copy: use `set` to change it."""
        self._reach(site)
        if site not in self._values:
            if STAGES.index(SITES[_base(site)].stage) < self._stage:
                raise InputError(
                    f"blocks.{self._layer}.hook_{site} was asked for too late: read sites in the order of "
                    "`ioi-mamba sites`, or keep it the first time the pass is there."
                )
            self._values[site] = self._compute(site)
        return self._values[site]

    def set(self, site: str, value: Tensor) -> None:
        """Write `value` at `site`; everything after it in the pass follows.

        Raises InputError for a wrong shape, a value that is not finite, or a site the pass has already used.
        A mixer whose output is written before anything inside it was asked for is not run.
        """
        if site == "out_proj" and self._stage < STAGES.index("in_proj"):
            self._replace_mixer(value)
            return
        self._reach(site)
        self._refuse_late(site)
        current = self._like(site)
        value = fitted(f"blocks.{self._layer}.hook_{site}", value, current)
        if site == "h":
            self.write_states(torch.ones((), dtype=torch.bool, device=value.device), value)
            return
        self._values[site] = value
        self._written.add(site)

    def _replace_mixer(self, value: Tensor) -> None:
        value = fitted(f"blocks.{self._layer}.hook_out_proj", value, self.get("normalized_input"))
        self.finish()
        if self._alone:
            self._block.mixer.skip(value)
        else:
            self._block.mixer.output = value
        self._stage = STAGES.index("mixer_output")
        self._values["out_proj"] = value

    def _like(self, site: str) -> Tensor:
        """A tensor of the site's shape and dtype: the value itself, or for y the scan's input, which costs no scan."""
        return self._scan.x if site == "y" and "y" not in self._values else self.get(site)

    @property
    def _conv_call(self) -> FullConv:
        assert isinstance(self._call, FullConv)
        return self._call

    @property
    def _scan(self) -> FullScan:
        assert isinstance(self._call, FullScan)
        return self._call

    def write_states(self, mask: Tensor, value: Tensor) -> None:
        """Write `value` where `mask` is True (both broadcastable to [batch, pos, E, N]); the recurrence goes on."""
        self._reach("h")
        self._refuse_late("h")
        self._state_writes.append((mask, value))
        self._values.pop("h", None)
        self._written.add("h")

    def own_scan(self) -> None:
        """Run this layer's scan here even if nothing in it is written: same values, faster than the stock loop."""
        self._reach("after_skip")
        self._written.add("own_scan")

    def finish(self) -> None:
        """Hand what was written in the current stage back to the model."""
        if self._stage >= 0:
            try:
                self._leave()
            except Exception as error:
                self._name_if_passed(min(self._written), error)
                raise
            self._written.clear()

    # -- walking the stages -------------------------------------------------------------------------------------

    def _reach(self, site: str) -> None:
        wanted = STAGES.index(SITES[_base(site)].stage)
        if wanted > self._stage:
            self.finish()
            self._call = None
            self._stage = wanted
            try:
                if self._calls is None and wanted in range(STAGES.index("in_proj"), STAGES.index("mixer_output")):
                    self._calls = Calls(self._block, self._alone)
                self._enter()
            except Exception as error:
                self._name_if_passed(site, error)
                raise

    def _name_if_passed(self, site: str, error: Exception) -> None:
        """Where nnsight says that the model has run past a place: InputError that names site and layer."""
        # Told by its name: a server's sandbox has nnsight's errors, but not the class that we would import.
        if type(error).__name__ == "OutOfOrderError":
            raise InputError(
                f"blocks.{self._layer}.hook_{site} can be neither read nor written any more: the model has run past "
                "it; open the layers of a trace in their order, each once, and before anything later is used."
            ) from error

    def _refuse_late(self, site: str) -> None:
        base = _base(site)
        used = [v for v in self._values if base in _FED_BY.get(_base(v), ())]
        if STAGES.index(SITES[base].stage) < self._stage:
            used = [STAGES[self._stage]]
        elif self._call is not None and self._call.ran and base not in _CALL_OUTPUTS:
            used = [v for v in _CALL_OUTPUTS if v in self._values and SITES[v].stage == SITES[base].stage]
        if used:
            raise InputError(
                f"blocks.{self._layer}.hook_{site} cannot be written any more: {used[0]} was already computed from it; "
                "write it first."
            )

    def _enter(self) -> None:
        stage, block = STAGES[self._stage], self._block
        if stage == "block_input":
            self._values["resid_pre"] = block.input
        elif stage == "norm_input":
            self._values["layer_input"] = block.norm.input
        elif stage == "norm_output":
            self._values["normalized_input"] = block.norm.output
        elif stage == "in_proj":
            self._values["in_proj"], self._values["skip"] = block.mixer.in_proj.output.chunk(2, dim=-1)
        elif stage == "conv":
            assert self._calls is not None
            self._call = self._calls.conv()
        elif stage == "x_proj":
            sizes = [self._config.time_step_rank, self._config.state_size, self._config.state_size]
            parts = block.mixer.x_proj.output.split(sizes, dim=-1)
            self._values.update(zip(("delta_1", "B", "C"), parts, strict=True))
        elif stage == "scan":
            assert self._calls is not None
            self._call = self._calls.scan()
        elif stage == "mixer_output":
            self._values["out_proj"] = block.mixer.output
        else:
            self._values["resid_post"] = block.output

    def _leave(self) -> None:
        stage, block, values = STAGES[self._stage], self._block, self._values
        if not self._written:
            return
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

    def _compute(self, site: str) -> Tensor:
        if _base(site) == "conv_slice":
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
        if any(_base(w) == "conv_slice" for w in self._written):
            total = torch.stack([self.get(f"conv_slice.{s}") for s in range(1 - weight.shape[-1], 1)]).sum(0)
            return total if bias is None else total + bias
        padded = self._padded().transpose(1, 2).to(weight.dtype)
        return F.conv1d(padded, weight[:, None], bias, groups=weight.shape[0]).transpose(1, 2)

    def _ssm_input(self) -> Tensor:
        if self._written & {"conv", "conv_start"} or any(_base(w) == "conv_slice" for w in self._written):
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
        decay, drive = self.get("A_bar"), self.get("B_bar") * self._scan.x[..., None]
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
