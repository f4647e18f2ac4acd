"""Read and edit any number of sites of a stock model in one forward pass.

`read` returns values by MambaLens hook name, `run` returns logits with values replaced; both are one nnsight trace
of the same function, `forward`, which also serves every experiment: it can keep the logits of one position only,
and it can *resume*, that is run layers >= l on positions >= p alone, from what a clean run had there.

An edit is a tensor (the new value), a number (which it then is everywhere), a function of the value (returns the new
value), or `Given`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import nnsight
import torch
from torch import Tensor

from ioi_mamba.errors import InputError
from ioi_mamba.model.families import block_of, blocks_of, family_of, head_of, hooks_of, open_layer, sizes_of, skip
from ioi_mamba.model.family import SCAN, Block, at
from ioi_mamba.model.jobs import call, config_of, device_of
from ioi_mamba.model.layer_pass import LayerPass, fitted
from ioi_mamba.model.mixer import Mixer
from ioi_mamba.model.portable import portable
from ioi_mamba.model.sites import Address
from ioi_mamba.model.tokens import check_tokens, prompts_of


@portable
class Given(NamedTuple):
    """An edit whose value is made when the pass is there; what it replaces is not computed."""

    make: Callable[[], Tensor]


Edit = Tensor | float | Given | Callable[[Tensor], Tensor]
Observer = Callable[[Tensor], None]


@portable
@dataclass(frozen=True)
class Start:
    """Where a resumed pass begins: at layer `layer`, with all that a clean run had computed by then.

    The tokens given to the pass are those of the positions still to be run. A causal model's past is a constant-size
    state, so this is exact: below `layer` and before the first token nothing can have changed.
    resid_pre: [batch, pos, D], the clean residual stream entering `layer` at the positions still to be run.
    conv_start, h_start: per layer >= `layer`, the K-1 conv inputs [batch, K-1, E] and the state [batch, E, N]
    before the first of these positions; layers without one begin at zeros, as at the first position of a prompt.
    above: by layer the stream of as many more rows that begin there, from the same past: they come after the rows that are
    there already. Rows that begin at several layers share the passes through the layers above, which reads every weight once.
    """

    layer: int
    resid_pre: Tensor
    conv_start: Mapping[int, Tensor]
    h_start: Mapping[int, Tensor]
    above: Mapping[int, Tensor] = field(default_factory=dict)


def mixer(model, layer: int) -> Mixer:
    """The opened mixer of a layer, for use inside a trace: `with mixer(model, 3) as m: m.B_bar[:, 4] = 0`.

    A negative layer counts from the last. Raises InputError for a layer out of range and a model that is no Mamba.
    """
    n_layers = sizes_of(model).n_layers
    if not isinstance(layer, int) or not -n_layers <= layer < n_layers:
        raise InputError(f"The model has layers 0 to {n_layers - 1}, not {layer!r}.")
    return Mixer(model, layer % n_layers)


def _addresses(model, names: Iterable[str], n_positions: int) -> dict[str, Address]:
    """The address of each name. Raises InputError for two names of one value, of which only one could take effect."""
    hooks, where = hooks_of(model, n_positions), {}
    for name in dict.fromkeys(names):
        address = hooks.address(name)
        other = next((known for known, place in where.items() if place == address), None)
        if other is not None:
            raise InputError(f"{other!r} and {name!r} are the same value: give it once.")
        where[name] = address
    return where


def _apply(edit: Edit, current: Callable[[], Tensor], name: str) -> Tensor:
    if isinstance(edit, Tensor):
        return edit
    if isinstance(edit, Given):
        return edit.make()
    if isinstance(edit, int | float):
        return torch.full_like(current(), edit)
    if not callable(edit):
        raise InputError(
            f"{name}: an edit is a tensor, a number or a function of the value, not {type(edit).__name__}."
        )
    value = edit(current())
    if not isinstance(value, Tensor):
        raise InputError(f"{name}: the edit returned {type(value).__name__}, not a tensor; return the new value.")
    return value


def _edit_states(open_pass: LayerPass, name: str, index: int | None, edit: Edit) -> None:
    """Write states: one position (`hook_h.p`) or the whole stack (`hook_h`).

    A function given the whole stack writes the entries it changes; the others go on following the recurrence.
    """
    if index is not None:
        h = open_pass.get("h")
        state = fitted(name, _apply(edit, lambda: h[:, index].clone(), name), h[:, index])
        here = torch.arange(h.shape[1], device=h.device).view(-1, *[1] * (h.dim() - 2)) == index
        open_pass.write_states(here, state[:, None])
    elif isinstance(edit, Tensor):
        open_pass.set("h", edit)
    else:
        h = open_pass.get("h")
        value = fitted(name, _apply(edit, h.clone, name), h)
        open_pass.write_states(value != h, value)


def _key(address: Address) -> str:
    return address.site if address.index is None else f"{address.site}.{address.index}"


def _value(open_pass: LayerPass, address: Address) -> Tensor:
    if address.site == "h" and address.index is not None:
        return open_pass.get("h")[:, address.index]
    return open_pass.get(_key(address))


@portable
@dataclass
class _LayerPlan:
    """What one layer of a pass is asked for: edits, observers and reads by address, rows that begin and the past of all."""

    begins: Tensor | None = None
    past: dict[str, Tensor] = field(default_factory=dict)
    edits: dict[Address, tuple[str, Edit]] = field(default_factory=dict)
    observers: dict[Address, Observer] = field(default_factory=dict)
    reads: dict[Address, str] = field(default_factory=dict)

    def _output_is_given(self, block: Block, layer: int) -> bool:
        """Whether the mixer's output is a tensor, and nothing inside the mixer is asked for: then it need not run."""
        output = Address(layer, "out_proj", None)
        asked = {*self.edits, *self.observers, *self.reads}
        return isinstance(self.edits.get(output, ("", None))[1], Tensor) and not any(
            block.sites[address.site].stage in block.layer_pass.inside for address in asked
        )

    def walk(self, model, layer: int, saved: dict[str, Tensor], own_scan: bool) -> None:
        """Do all of it in the order the layer computes its values; an edit precedes a read of the same site."""
        if self.begins is not None:
            place = blocks_of(model)[layer]
            place.input = torch.cat((place.input, self.begins))
        open_pass, block = open_layer(model, layer, alone=True), block_of(model, layer)
        own_scan = own_scan and not self._output_is_given(block, layer)
        wanted = sorted({*self.edits, *self.observers, *self.reads}, key=lambda a: (a.index is not None, a.index or 0))
        for site, record in block.sites.items():
            if own_scan and record.stage == SCAN:
                open_pass.own_scan()
                own_scan = False
            if site in self.past:
                open_pass.begin(site, self.past[site])
            here = [address for address in wanted if address.site == site]
            for address in here:
                if address in self.edits:
                    name, edit = self.edits[address]
                    if site == "h":
                        _edit_states(open_pass, name, address.index, edit)
                    else:
                        current = lambda key=_key(address): open_pass.get(key).clone()  # noqa: B008
                        open_pass.set(_key(address), _apply(edit, current, name))
            for address in here:
                if address in self.observers:
                    self.observers[address](_value(open_pass, address))
                if address in self.reads:
                    saved[self.reads[address]] = _value(open_pass, address)
        open_pass.finish()


def _scaled(value: Tensor, config, entry: str | None, *, back: bool = False) -> Tensor:
    """A value times an entry of the config, or of "/entry" divided by it; None: as it is. back: undone."""
    if entry is None:
        return value
    factor = getattr(config, entry.removeprefix("/"))
    return value / factor if entry.startswith("/") != back else value * factor


def _edit_place(place, config, entry: str | None, name: str, edits, observe, reads, saved: dict[str, Tensor]) -> None:
    """Serve a value of the whole model: what a module gives, times an entry of the config."""
    if name not in edits and name not in observe and name not in reads:
        return
    value = _scaled(place.output, config, entry)
    if name in edits:
        value = fitted(name, _apply(edits[name], value.clone, name), value)
        place.output = _scaled(value, config, entry, back=True)
    if name in observe:
        observe[name](value)
    if name in reads:
        saved[name] = value


def without_mask(model) -> None:
    """Leave out nnsight's mask, inside a trace: one of ones, multiplied with every layer's values to no effect."""
    served, named = model.inputs
    model.inputs = (served, {**named, "attention_mask": None})


def give_logits_of(head, stream: Tensor, tokens: Tensor) -> None:
    """Have the head give the logits of some tokens only, [row, k, choice], inside a trace. stream: [row, k, D]."""
    module = head._module
    if module is None:
        # A server that shows no weights: all logits are made there, and the others dropped.
        head.output = head.output.gather(-1, tokens)
        return
    logits = (module.weight[tokens] @ stream[..., None])[..., 0]
    head.skip(logits if module.bias is None else logits + module.bias[tokens])


def forward(
    model,
    tokens: Tensor,
    edits: Mapping[str, Edit] | None = None,
    reads: Iterable[str] = (),
    *,
    logits_at: Tensor | None = None,
    logits_of: Tensor | None = None,
    start: Start | None = None,
    own_scan: bool = False,
    observe: Mapping[str, Observer] | None = None,
    reduce: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """One pass: edits applied, the named values returned, and always the logits as `hook_logits`.

    tokens: Long[batch, pos]. logits_at: Long[batch, k], keep the logits of these positions only ([batch, k, vocab]).
    With k = 0 none are made, where the head can be most of a pass.
    logits_of: Long[batch, k, choice], keep the logits of these tokens only at those positions ([batch, k, choice]).
    start: resume from there; `tokens` are then the positions still to be run, and `logits_at` counts from the first
    of them. Of rows that begin above, `tokens` has nothing and `logits_at` all. Layers before `start.layer` are not run, so they can be neither read nor edited.
    own_scan: run `scan.py` in every layer instead of the stock loop (equal, and faster on a CPU).
    observe: hook name -> function called with the value when the pass reaches it (after the edits there).
    reduce: turns what would be returned into what is, inside the trace (so that only the result travels).
    Raises InputError for unknown names, bad shapes, NaN in an edit, layers out of range.
    """
    tokens = check_tokens(model, tokens).to(device_of(model))
    edits, observe, reads = dict(edits or {}), dict(observe or {}), list(reads)
    where = _addresses(model, [*edits, *observe, *reads], tokens.shape[1])
    n_layers, first, stream_in, begins = sizes_of(model).n_layers, 0, None, {}
    past: dict[int, dict[str, Tensor]] = {}
    tree, head, config = family_of(model).tree, head_of(model), config_of(model)
    if start is not None:
        first, stream_in, begins = start.layer, start.resid_pre, start.above
        for site, values in (("conv_start", start.conv_start), ("h_start", start.h_start)):
            for i, value in values.items():
                name = f"blocks.{i}.hook_{site}"
                if name in edits:
                    raise InputError(f"{name!r} is where this pass starts from: put the value into `start`.")
                past.setdefault(i, {})[site] = value
    opened = range(first if own_scan else n_layers, n_layers)
    plans = {i: _LayerPlan(begins.get(i), past.get(i, {})) for i in {*opened, *begins, *past}}
    for name, address in where.items():
        if address.layer is None:
            continue
        if address.layer < first:
            raise InputError(f"{name!r} is below layer {first}, where this pass starts.")
        plan = plans.setdefault(address.layer, _LayerPlan())
        if name in edits:
            plan.edits[address] = (name, edits[name])
        if name in observe:
            plan.observers[address] = observe[name]
        if name in reads:
            plan.reads[address] = name

    with model.trace(tokens, use_cache=False):
        without_mask(model)
        saved: dict[str, Tensor] = {}
        if start is None:
            _edit_place(at(model, tree.embeddings), config, tree.embedded, "hook_embed", edits, observe, reads, saved)
        for i in range(first):
            skip(model, i, stream_in)
        for i in sorted(plans):
            plans[i].walk(model, i, saved, own_scan)
        _edit_place(at(model, tree.last_norm), config, None, "hook_norm", edits, observe, reads, saved)
        if logits_at is not None:
            stream = head.input
            rows = torch.arange(stream.shape[0], device=stream.device)[:, None]
            head.input = stream = stream[rows, logits_at.to(stream.device)]
            if logits_of is not None:
                give_logits_of(head, stream, logits_of.to(stream.device))
        _edit_place(head, config, tree.scaled, "hook_logits", edits, observe, [*reads, "hook_logits"], saved)
        if reduce is not None:
            saved = reduce(saved)
        saved = nnsight.save(saved)
    return saved


def read(model, tokens: Any, names: str | Iterable[str], *, own_scan: bool = False) -> dict[str, Tensor]:
    """Values by MambaLens hook name, from one stock forward pass.

    tokens: Long[batch, pos], or a text, texts, an encoding or `Pairs` (see `tokens.prompts_of`). names: one or several
    of `hook_embed`, `hook_norm`, `hook_logits` and `blocks.{i}.hook_{site}`; `ioi-mamba sites` lists them with their shapes. A `*`
    stands for any layer, site or index (`blocks.*.hook_h.7`); negative layers and positions count from the end.
    own_scan: run `scan.py` in every layer instead of the stock loop, so that states that are
    read are computed once: the same values within rounding, at about two thirds of the cost for all of them.
    Raises InputError for an unknown name, a layer, position or slice out of range, tokens outside the vocabulary, and a
    model that is no Mamba.
    """
    family_of(model)  # refused before the tokens are looked at
    tokens = check_tokens(model, prompts_of(model, tokens))
    names = hooks_of(model, tokens.shape[1]).expanded(names)
    return call(model, _read, tokens, names, own_scan)


def _read(model, tokens: Tensor, names: list[str], own_scan: bool, *, progress=None) -> dict[str, Tensor]:
    logits_at = None if "hook_logits" in names else tokens[:, :0]
    saved = forward(model, tokens, reads=names, logits_at=logits_at, own_scan=own_scan)
    return {name: saved[name] for name in names}


def run(model, tokens: Any, edits: Mapping[str, Edit] | None = None, *, own_scan: bool = False) -> Tensor:
    """Logits [batch, pos, vocab] of a pass in which the named values are replaced.

    tokens: as `read` takes them. edits: hook name -> new value, a number, or function from the value to the new one;
    names as `read` takes them, each match edited. All combine; later edits see earlier
    ones. `blocks.{i}.hook_h.{p}` continues the recurrence from what is written; a function at `blocks.{i}.hook_h`
    writes the entries it changes. `layer_input` reaches its layer only, `resid_pre` all that follows.
    own_scan: as `read` takes it. Raises InputError as `read` does, and for an edit of the wrong shape or with NaN in it.
    """
    family_of(model)  # refused before the tokens are looked at
    if edits is not None and not isinstance(edits, Mapping):
        raise InputError(f"Edits are a dictionary from hook name to value, not {type(edits).__name__}.")
    tokens = check_tokens(model, prompts_of(model, tokens))
    hooks = hooks_of(model, tokens.shape[1])
    found = {name: edit for names, edit in (edits or {}).items() for name in hooks.expanded(names)}
    return call(model, _run, tokens, found, own_scan)


def _run(model, tokens: Tensor, edits: dict[str, Edit], own_scan: bool, *, progress=None) -> Tensor:
    return forward(model, tokens, edits, own_scan=own_scan)["hook_logits"]
