"""One layer's forward pass, stage by stage: read and write every value of a layer, in a plain trace.

`mixer.Mixer` is the same for people, as attributes.

Here stands what is the same in all families: the order of stages, values that a module takes or gives, which writes are
too late, what is handed back. A mixer's own class (`mamba/layer.py`, `mamba2/layer.py`) opens the stages inside it, and
holds the formulas of the values between.

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
from ioi_mamba.model.family import SCAN, Block, End, Family, at
from ioi_mamba.model.jobs import config_of


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
    if has_values(value) and not _finite(value):
        raise InputError(f"{name}: the edit holds NaN or infinity; write finite numbers.")
    return value.to(dtype=like.dtype, device=like.device)


def _finite(value: Tensor) -> bool:
    """Whether all numbers are finite. Their sum says so in a tenth of the time; where it overflows, each is looked at."""
    return bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all())


_FED_BY_NONE: Mapping[str, tuple[str, ...]] = {}


class LayerPass:
    """A pass through one block, stage by stage. `get` and `set` take site names (`conv_slice.-1` for one tap).

    Of a block without a mixer this is all; with one, a class that inherits from it opens the stages inside.

    fed_by: what a value is computed from, within its stage; a value may be written until something it feeds was
    computed. call_outputs: the outputs of the calls inside the mixer, whose inputs all else is computed from.
    inside: the stages that need the mixer to run.
    alone: the trace has one invoke and no cache, so that what is replaced need not run.
    """

    fed_by: Mapping[str, tuple[str, ...]] = _FED_BY_NONE
    call_outputs: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()

    def __init__(self, family: Family, block: Block, model: Any, layer: int, *, alone: bool):
        self.family, self.block, self._layer, self._alone = family, block, layer, alone
        self._module = at(model, family.tree.blocks)[layer]
        self._config = config_of(model)
        self._stages = block.stages()
        self._stage = -1
        self._values: dict[str, Tensor] = {}
        self._rest: dict[str, tuple] = {}  # of places that hold several values, those after the first
        self._added: dict[str, list[Tensor]] = {}  # what other modules add to a place's own value
        self._written: set[str] = set()
        self._call: Any = None  # that of the current stage, see `calls.py`
        self._state_writes: list[tuple[Tensor, Tensor]] = []  # (mask, value), both broadcastable to h

    # -- the two verbs ------------------------------------------------------------------------------------------

    def get(self, site: str) -> Tensor:
        """The value at `site`, as the pass now has it. Not a copy: use `set` to change it."""
        self._reach(site)
        if site not in self._values:
            if self._stage_of(site) < self._stage:
                raise InputError(
                    f"{self.name(site)} was asked for too late: read sites in the order of "
                    "`ioi-mamba sites`, or keep it the first time the pass is there."
                )
            self._values[site] = self._between() if site == "resid_mid" else self._compute(site)
        return self._values[site]

    def set(self, site: str, value: Tensor) -> None:
        """Write `value` at `site`; everything after it in the pass follows.

        Raises InputError for a wrong shape, a value that is not finite, or a site the pass has already used.
        A mixer whose output is written before anything inside it was asked for is not run.
        """
        if (
            site == "out_proj"
            and self._stage < self._stages.index(self.inside[0])
            and self.block.ends[site].times is None
        ):
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

    def begin(self, site: str, past: Tensor) -> None:
        """Begin from the past that an earlier pass had at `site`, of every row or of as many as share it in turn."""
        self._reach(site)
        like = self._like(site)
        past, times = past.to(like), len(like) // len(past)
        self._values[site] = past.repeat(times, *[1] * (past.dim() - 1)) if times > 1 else past
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
        if SCAN in self._stages:
            self._reach("h")
            self._written.add("own_scan")

    def finish(self) -> None:
        """Hand what was written in the current stage back to the model."""
        if self._stage >= 0 and self._written:
            try:
                self._leave(self._stages[self._stage])
            except Exception as error:
                self._name_if_passed(min(self._written), error)
                raise
            self._written.clear()

    def name(self, site: str) -> str:
        """The hook name of a site of this layer."""
        return f"blocks.{self._layer}.hook_{site}"

    # -- what a mixer adds --------------------------------------------------------------------------------------

    def conv_weight(self) -> Tensor:
        """The weights of the convolution, [channel, K], as the pass hands them over."""
        raise NotImplementedError

    def _open(self, stage: str) -> None:
        """Take what the place of a stage inside the mixer serves into `_values`, or its call into `_call`."""
        raise NotImplementedError

    def _close(self, stage: str) -> None:
        """Hand what was written in a stage inside the mixer back to its place."""
        raise NotImplementedError

    def _compute(self, site: str) -> Tensor:
        """A value that no place serves, from those of its stage."""
        raise NotImplementedError

    def _like(self, site: str) -> Tensor:
        """A tensor of the site's shape and dtype."""
        return self.get(site)

    # -- values that modules take and give ----------------------------------------------------------------------

    def _ends(self, stage: str) -> dict[str, End]:
        return {name: end for name, end in self.block.ends.items() if self.block.sites[name].stage == stage}

    def _enter(self, stage: str) -> None:
        ends = self._ends(stage)
        for site, end in ends.items():
            self._values[site] = self._taken(site, end)
        if not ends:
            self._open(stage)

    def _leave(self, stage: str) -> None:
        ends = self._ends(stage)
        for site, end in ends.items():
            if site in self._written:
                self._hand(site, end, self._values[site])
        if "resid_mid" in self._written:
            # The stream between two sub-blocks is no module's: what the last one adds is made to lead to it.
            *others, last = self._before_middle()
            rest = [self._values[name] for name in ("resid_pre", *others)]
            self._hand(last, self.block.ends[last], self._values["resid_mid"] - sum(rest[1:], rest[0]))
        if not ends:
            self._close(stage)

    def _taken(self, site: str, end: End) -> Tensor:
        self._added[site] = [at(self._module, path).output for path in end.added]
        place = at(self._module, end.path)
        value = place.input if end.side == "input" else place.output
        if isinstance(value, tuple):
            value, *rest = value
            self._rest[site] = tuple(rest)
        for other in self._added[site]:
            value = other + value
        return value if end.times is None else value * getattr(self._config, end.times)

    def _hand(self, site: str, end: End, value: Tensor) -> None:
        if end.times is not None:
            value = value / getattr(self._config, end.times)
        for other in self._added[site]:
            value = value - other
        given = (value, *self._rest[site]) if site in self._rest else value
        place = at(self._module, end.path)
        if end.side == "input":
            place.input = given
        else:
            place.output = given

    def _before_middle(self) -> list[str]:
        """What the sub-blocks before `resid_mid` add, in order."""
        return [writer.adds for writer in self.block.writers[0]]

    def _between(self) -> Tensor:
        terms = [self.get(name) for name in self._before_middle()]
        return self._values["resid_pre"] + sum(terms[1:], terms[0])

    # -- walking the stages -------------------------------------------------------------------------------------

    @property
    def _mixer(self) -> Any:
        assert self.block.mixer is not None
        return at(self._module, self.block.mixer)

    def _stage_of(self, site: str) -> int:
        return self._stages.index(self.block.sites[base(site)].stage)

    def _replace_mixer(self, value: Tensor) -> None:
        value = fitted(self.name("out_proj"), value, self.get("normalized_input"))
        self.finish()
        if self._alone:
            self._mixer.skip(value)
        else:
            self._mixer.output = value
        self._stage = self._stage_of("out_proj")
        self._values["out_proj"] = value

    def _reach(self, site: str) -> None:
        wanted = self._stage_of(site)
        # What the stream between two sub-blocks is the sum of is kept on the way.
        kept = ("resid_pre", *self._before_middle()) if "resid_mid" in self.block.sites else ()
        for each in kept:
            if self._stage < self._stage_of(each) < wanted:
                self._go(self._stage_of(each), each)
        if wanted > self._stage:
            self._go(wanted, site)

    def _go(self, stage: int, site: str) -> None:
        self.finish()
        self._call, self._stage = None, stage
        try:
            self._enter(self._stages[stage])
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
        if "resid_mid" in self._values and base(site) in self._before_middle():
            used.append("resid_mid")
        stage = self._stage_of(site)
        if stage < self._stage:
            used = [self._stages[self._stage]]
        elif self._call is not None and self._call.ran and base(site) not in self.call_outputs:
            used = [v for v in self.call_outputs if v in self._values and self._stage_of(v) == stage]
        if used:
            raise InputError(
                f"{self.name(site)} cannot be written any more: {used[0]} was already computed from it; write it first."
            )
