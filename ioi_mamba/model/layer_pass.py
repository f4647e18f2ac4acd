"""One layer's forward pass, stage by stage: read and write every value of a layer, in a plain trace.

`mixer.Mixer` is the same for people, as attributes.

Here stands what is the same in all families: the order of stages, which writes are too late, what is handed back. A
family's own class (`mamba/layer.py`) says how a stage is entered and left, and holds the formulas of the values between.

Values must be asked for in the order the pass reaches them (the order of the family's sites); within a stage a value
must be written before anything computed from it is read. Both are checked, so no edit is silently dead.

Only plain functions over plain envoys are used and only torch is imported at run time, so that the same code can
be shipped to a server by value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ioi_mamba.errors import InputError
from ioi_mamba.model.family import Family


def base(site: str) -> str:
    """The name of a site without its index."""
    return site.split(".")[0]


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


class LayerPass:
    """A pass through one block, stage by stage. `get` and `set` take site names (`conv_slice.-1` for one tap).

    fed_by: what a value is computed from, within its stage; a value may be written until something it feeds was
    computed. call_outputs: the outputs of the calls inside the mixer, whose inputs all else is computed from.
    alone: the trace has one invoke and no cache, so that what is replaced need not run.
    """

    fed_by: Mapping[str, tuple[str, ...]]
    call_outputs: tuple[str, ...]

    def __init__(self, family: Family, block: Any, layer: int, alone: bool):
        self.family, self._block, self._layer, self._alone = family, block, layer, alone
        self._stage = -1
        self._values: dict[str, Tensor] = {}
        self._written: set[str] = set()
        self._call: Any = None  # that of the current stage, see `calls.py`
        self._state_writes: list[tuple[Tensor, Tensor]] = []  # (mask, value), both broadcastable to h

    # -- the two verbs ------------------------------------------------------------------------------------------

    def get(self, site: str) -> Tensor:
        """The value at `site`, as the pass now has it. Not a copy: use `set` to change it."""
        self._reach(site)
        if site not in self._values:
            if self.family.stage(site) < self._stage:
                raise InputError(
                    f"{self.name(site)} was asked for too late: read sites in the order of "
                    "`ioi-mamba sites`, or keep it the first time the pass is there."
                )
            self._values[site] = self._compute(site)
        return self._values[site]

    def set(self, site: str, value: Tensor) -> None:
        """Write `value` at `site`; everything after it in the pass follows.

        Raises InputError for a wrong shape, a value that is not finite, or a site the pass has already used.
        A mixer whose output is written before anything inside it was asked for is not run.
        """
        if site == "out_proj" and self._stage < self.family.stages.index(self.family.inside[0]):
            self._replace_mixer(value)
            return
        self._reach(site)
        self._refuse_late(site)
        current = self._like(site)
        value = fitted(self.name(site), value, current)
        if site == "h":
            self.write_states(torch.ones((), dtype=torch.bool, device=value.device), value)
            return
        self._values[site] = value
        self._written.add(site)

    def write_states(self, mask: Tensor, value: Tensor) -> None:
        """Write `value` where `mask` is True (both broadcastable to h); the recurrence goes on."""
        self._reach("h")
        self._refuse_late("h")
        self._state_writes.append((mask, value))
        self._values.pop("h", None)
        self._written.add("h")

    def own_scan(self) -> None:
        """Run this layer's scan here even if nothing in it is written: same values, faster than the stock loop."""
        self._reach("h")
        self._written.add("own_scan")

    def finish(self) -> None:
        """Hand what was written in the current stage back to the model."""
        if self._stage >= 0 and self._written:
            try:
                self._leave(self.family.stages[self._stage])
            except Exception as error:
                self._name_if_passed(min(self._written), error)
                raise
            self._written.clear()

    def name(self, site: str) -> str:
        """The hook name of a site of this layer."""
        return f"blocks.{self._layer}.hook_{site}"

    # -- what a family adds -------------------------------------------------------------------------------------

    def conv_weight(self) -> Tensor:
        """The weights of the convolution, [channel, K], as the pass hands them over."""
        raise NotImplementedError

    def _enter(self, stage: str) -> None:
        """Take what the place of a stage serves into `_values`, or its call into `_call`."""
        raise NotImplementedError

    def _leave(self, stage: str) -> None:
        """Hand what was written in a stage back to its place."""
        raise NotImplementedError

    def _compute(self, site: str) -> Tensor:
        """A value that no place serves, from those of its stage."""
        raise NotImplementedError

    def _like(self, site: str) -> Tensor:
        """A tensor of the site's shape and dtype."""
        return self.get(site)

    # -- walking the stages -------------------------------------------------------------------------------------

    @property
    def _mixer(self) -> Any:
        return getattr(self._block, self.family.tree.mixer)

    def _replace_mixer(self, value: Tensor) -> None:
        value = fitted(self.name("out_proj"), value, self.get("normalized_input"))
        self.finish()
        if self._alone:
            self._mixer.skip(value)
        else:
            self._mixer.output = value
        self._stage = self.family.stage("out_proj")
        self._values["out_proj"] = value

    def _reach(self, site: str) -> None:
        wanted = self.family.stage(site)
        if wanted > self._stage:
            self.finish()
            self._call = None
            self._stage = wanted
            try:
                self._enter(self.family.stages[wanted])
            except Exception as error:
                self._name_if_passed(site, error)
                raise

    def _name_if_passed(self, site: str, error: Exception) -> None:
        """Where nnsight says that the model has run past a place: InputError that names site and layer."""
        # Told by its name: a server's sandbox has nnsight's errors, but not the class that we would import.
        if type(error).__name__ == "OutOfOrderError":
            raise InputError(
                f"{self.name(site)} can be neither read nor written any more: the model has run past "
                "it; open the layers of a trace in their order, each once, and before anything later is used."
            ) from error

    def _refuse_late(self, site: str) -> None:
        used = [value for value in self._values if base(site) in self.fed_by.get(base(value), ())]
        if self.family.stage(site) < self._stage:
            used = [self.family.stages[self._stage]]
        elif self._call is not None and self._call.ran and base(site) not in self.call_outputs:
            stage = self.family.stage(site)
            used = [v for v in self.call_outputs if v in self._values and self.family.stage(v) == stage]
        if used:
            raise InputError(
                f"{self.name(site)} cannot be written any more: {used[0]} was already computed from it; write it first."
            )
