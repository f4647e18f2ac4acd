"""The mixer of a layer as an object with a site an attribute, in a plain trace.

with model.trace(tokens):
    with im.mixer(model, 5) as m:
        m.B_bar[:, 4] = 0            # edit in place, or assign: m.B_bar = other
        m.h[:, 7] = other_state      # the recurrence goes on from what is written
        seen = m.y.save()
"""

from __future__ import annotations

from typing import Any

import nnsight
import torch
from torch import Tensor

from ioi_mamba.errors import InputError
from ioi_mamba.model.families import open_layer
from ioi_mamba.model.layer_pass import LayerPass, fitted


class Mixer:
    """`with mixer(model, layer) as m`: every site of the layer as an attribute, readable and writable.

    `m.B_bar` hands out a copy; editing it in place or assigning `m.B_bar = value` both take effect, on the rows of the
    invoke it is used in. It works in every step of a generation, with a cache or without: a step has one position then.
    `m.h[rows, pos]` and `m.conv_slice[s]` are read and written by index. Raises InputError as `LayerPass.set` does,
    and when used outside its `with` block, where nothing could be handed back to the model.
    """

    _pass: LayerPass
    _open: bool
    _lent: list

    def __init__(self, model, layer: int):
        self.__dict__["_pass"] = open_layer(model, layer, alone=False)
        self.__dict__["_open"] = False
        self.__dict__["_lent"] = []  # (copy handed out, its version then, how to write it back)

    def __enter__(self) -> Mixer:
        self.__dict__["_open"] = True
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type is None:
            self._settle()
            self._pass.finish()
        self.__dict__["_open"] = False

    def _settle(self) -> None:
        if not self._open:
            raise InputError(
                "A mixer is used in a block of its own inside the trace: `with im.mixer(model, layer) as m:`, on a line "
                "below `with model.trace(...):`."
            )
        lent, self.__dict__["_lent"] = self._lent, []
        for handed, version, write in lent:
            # Any edit in place counts, also one that leaves the numbers as they were: a state is held by it.
            if handed._version != version:
                write(handed)
            self._lent.append((handed, handed._version, write))

    def _lend(self, value: Tensor, write) -> Tensor:
        # Tensors made in inference mode do not count their edits.
        with torch.inference_mode(False):
            handed = value.clone()
        self._lent.append((handed, handed._version, write))
        return handed

    def __dir__(self) -> list[str]:
        return [*self._pass.block.sites, *object.__dir__(self)]

    def __repr__(self) -> str:
        state = "open" if self._open else "to be opened with `with`"
        return f"<Mixer of layer {self._pass._layer}, {state}; sites: {', '.join(self._pass.block.sites)}>"

    def __getattr__(self, site: str) -> Any:
        sites = self._pass.block.sites
        if site not in sites:
            raise AttributeError(f"a mixer has no site {site!r}; the sites are {', '.join(sites)}")
        self._settle()
        if sites[site].indexed_by == "position":
            return _States(self)
        if sites[site].indexed_by == "slice":
            return _ConvSlices(self)
        return self._lend(self._pass.get(site), lambda value: self._pass.set(site, value))

    def __setattr__(self, site: str, value) -> None:
        sites = self._pass.block.sites
        if site not in sites or sites[site].indexed_by == "slice":
            raise AttributeError(f"{site!r} cannot be assigned; the sites are {', '.join(sites)}")
        if isinstance(value, _States):  # what `m.h[...] op= value` ends with; the item was written already
            return
        self._settle()
        self._pass.set(site, value)


class _States:
    """`m.h`: the states [batch, pos, E, N]; a state written at a position is what the recurrence continues from.

    It is used like the tensor of all states. Written are the entries that an index names, `m.h[:, 7] = x`, or with
    `m.h += x` and its like all of them.
    """

    def __init__(self, mixer: Mixer):
        self._mixer = mixer

    def _all(self) -> Tensor:
        """A copy of all states."""
        self._mixer._settle()
        return self._mixer._pass.get("h").clone()

    def save(self) -> Tensor:
        """All states, kept after the trace."""
        return nnsight.save(self._all())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._all(), name)

    def __repr__(self) -> str:
        return f"<the states of layer {self._mixer._pass._layer}: m.h[rows, positions], or all of them>"

    def __len__(self) -> int:
        return len(self._all())

    def __neg__(self) -> Tensor:
        return -self._all()

    def __add__(self, other) -> Tensor:
        return self._all() + other

    def __radd__(self, other) -> Tensor:
        return other + self._all()

    def __sub__(self, other) -> Tensor:
        return self._all() - other

    def __rsub__(self, other) -> Tensor:
        return other - self._all()

    def __mul__(self, other) -> Tensor:
        return self._all() * other

    def __rmul__(self, other) -> Tensor:
        return other * self._all()

    def __truediv__(self, other) -> Tensor:
        return self._all() / other

    def __rtruediv__(self, other) -> Tensor:
        return other / self._all()

    def __pow__(self, other) -> Tensor:
        return self._all() ** other

    def __matmul__(self, other) -> Tensor:
        return self._all() @ other

    def __iadd__(self, other) -> _States:
        self[:] = self + other
        return self

    def __isub__(self, other) -> _States:
        self[:] = self - other
        return self

    def __imul__(self, other) -> _States:
        self[:] = self * other
        return self

    def __itruediv__(self, other) -> _States:
        self[:] = self / other
        return self

    def __getitem__(self, key) -> Tensor:
        self._mixer._settle()
        return self._mixer._lend(self._mixer._pass.get("h")[key], lambda value: self._write(key, value))

    def __setitem__(self, key, value) -> None:
        self._mixer._settle()
        self._write(key, value)

    def _write(self, key, value) -> None:
        h = self._mixer._pass.get("h")
        written = torch.zeros_like(h)
        written[key] = value
        written = fitted(self._mixer._pass.name("h"), written, h)
        mask = torch.zeros_like(h, dtype=torch.bool)
        mask[key] = True
        self._mixer._pass.write_states(mask, written)


class _ConvSlices:
    """`m.conv_slice`: the taps of the convolution by relative position, -(K-1) .. 0; each [batch, pos, E]."""

    def __init__(self, mixer: Mixer):
        self._mixer = mixer

    def __getattr__(self, name: str):
        raise InputError(f"conv_slice.{name}: take one slice by its index, such as m.conv_slice[-1].{name}.")

    def __getitem__(self, s: int) -> Tensor:
        site = f"conv_slice.{s}"
        self._mixer._settle()
        return self._mixer._lend(self._mixer._pass.get(site), lambda value: self._mixer._pass.set(site, value))

    def __setitem__(self, s: int, value: Tensor) -> None:
        self._mixer._settle()
        self._mixer._pass.set(f"conv_slice.{s}", value)
