"""Many edits as rows of few passes, each pass resumed from the layer and position it touches.

A Mamba is causal and its past is a constant-size state (a model with attention has another past: there a pass is resumed
from the layer alone, and runs all positions). A row patched at (layer l, position p) equals the clean run
below l and before p, so it needs only layers >= l on positions >= p, started from the clean residual stream and, for
every later layer, the last three conv inputs and the state before p. Averaged over a layer x position sweep that is
about a quarter of the work, and exact. Rows patched at one position begin at their layers in one pass, so that above the
last of these every weight is read once for all of them.

The states are rolled forward with the sweep, one token at a time (`Roll`), so nothing of size
[layer, pair, pos, E, N] is ever alive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import nnsight
import torch
import torch.nn.functional as F
from torch import Tensor

from ioi_mamba.errors import InputError
from ioi_mamba.model.families import attends, family_of, hooks_of, layers_with, open_layer, sizes_of
from ioi_mamba.model.jobs import chunks_wanted, conduct, device_of, each_chunk
from ioi_mamba.model.memory import chunk_count, pass_work, rows_per_chunk, rows_per_pass
from ioi_mamba.model.portable import portable
from ioi_mamba.model.scanned_layer import BY_STATES
from ioi_mamba.passes.ablations import (
    RESAMPLE,
    Ablation,
    AblationName,
    Spread,
    ablation_of,
    gathered,
    groups_of,
    sums_of,
)
from ioi_mamba.passes.forward import Edit, Start, forward
from ioi_mamba.passes.metrics import logit_diff
from ioi_mamba.tasks.base import Pairs, check_pairs

Progress = Callable[[int, int], None]
LAYERS_OF_A_CHUNK = 4  # at least, where a sweep is cut up by layers: each chunk rolls the states forward once more
LEAST_WORK = 1e11
"""Multiply-adds of a group of layers: seconds of a CPU core."""
STATE_AND_CONV = "h_and_conv"  # a layer's whole memory: its state and the conv inputs the next tokens still see


def layer_count(model) -> int:
    return sizes_of(model).n_layers


def block_sites(site: str, layers: Sequence[int]) -> list[str]:
    """Hook names of one site (`layer_input`, `conv_slice.-1`, ...) in several layers."""
    return [f"blocks.{i}.hook_{site}" for i in layers]


@portable
@dataclass(frozen=True)
class Roll:
    """A run stopped before `position`, with the conv inputs and states every layer needs to go on from there.

    tokens: Long[batch, pos], all of them. conv_start, h_start: per layer, of the shapes of the sites of these names.
    """

    model: Any
    tokens: Tensor
    position: int
    conv_start: dict[int, Tensor]
    h_start: dict[int, Tensor]

    @classmethod
    def begin(cls, model, tokens: Tensor) -> Roll:
        """Before the first token: all zeros."""
        sites, sizes, layers = family_of(model).sites, sizes_of(model), layers_with(model, "h")
        conv, state = (
            tokens.new_zeros(sizes.shape(sites[name], len(tokens), 0), dtype=torch.float32)
            for name in ("conv_start", "h_start")
        )
        return cls(model, tokens, 0, dict.fromkeys(layers, conv), dict.fromkeys(layers, state))

    def start(self, layer: int, resid_pre: Tensor, rows: Tensor | slice = slice(None)) -> Start:
        """The resume point at `layer` and this position, for some of the rows.

        resid_pre: [row, pos, D], the stream entering `layer` from this position on, of these rows.
        """
        return Start(
            layer,
            resid_pre,
            {i: value[rows] for i, value in self.conv_start.items() if i >= layer},
            {i: value[rows] for i, value in self.h_start.items() if i >= layer},
        )

    def step(self, reads: Sequence[str] = ()) -> tuple[Roll, dict[str, Tensor]]:
        """Run one token: the roll after it, and the `reads` there (position axes of length 1)."""
        layers = list(self.h_start)
        inputs, states = (dict(zip(layers, block_sites(site, layers), strict=True)) for site in ("in_proj", "h.0"))
        token = self.tokens[:, self.position : self.position + 1]
        at = forward(
            self.model,
            token,
            reads=[*inputs.values(), *states.values(), *reads],
            logits_at=token[:, :0],
            start=self.start(0, token.new_empty(0)),
            own_scan=True,
        )
        # Cut after joining: a convolution of one tap keeps nothing.
        conv = {i: torch.cat((self.conv_start[i], at[inputs[i]]), dim=1)[:, 1:] for i in layers}
        return replace(
            self, position=self.position + 1, conv_start=conv, h_start={i: at[states[i]] for i in layers}
        ), at


def choice_scores(model, pairs: Pairs, tokens: Tensor) -> Tensor:
    """What each choice scores (`Pairs.scores`), [pair, choice], in a plain pass of one side of the pairs."""
    return pairs.scores(forward(model, tokens, logits_at=pairs.read_at, own_scan=True)["hook_logits"])


@contextmanager
def pair_named(model, pairs: Pairs) -> Iterator[None]:
    """Where the block refuses a value that is not finite, the InputError is one that names the pair it came from."""
    try:
        yield
    except InputError:
        # Asked only now, since it takes two passes.
        for name in ("clean", "corrupted"):
            logits = conduct(model, plain_scores, pairs.without_text(), getattr(pairs, name))
            pairs.check_finite(f"logits of its {name} prompt", logits.movedim(0, -1))
        raise


def plain_scores(model, pairs: Pairs, tokens: Tensor, *, progress: Progress | None = None) -> Tensor:
    """`choice_scores` of many pairs, on the CPU; a function for `conduct`."""
    rows, bare = (
        torch.arange(len(pairs)).split(rows_per_chunk(model, len(pairs), tokens.shape[1])),
        pairs.without_text(),
    )
    return torch.cat(each_chunk(model, _plain_chunk, [(bare[part], tokens[part]) for part in rows], progress=progress))


def _plain_chunk(model, pairs: Pairs, tokens: Tensor, *, progress: Progress | None = None) -> Tensor:
    with torch.no_grad():
        return choice_scores(model, pairs, tokens).cpu()


def resample_sweep(
    model,
    pairs: Pairs,
    site: str,
    *,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    ablation: AblationName | Ablation = "resample",
    resume: bool = True,
    progress: Progress | None = None,
) -> Tensor:
    """Ablate one site at every (layer, position): logits of (answer, wrong), [layer, position, pair, 2].

    In each cell the clean prompt runs with the site's value at that layer and position overwritten, by default with the
    value of the corrupted run (paper section 4.1.1); `ablations` lists the kinds. `conv_slice.s` takes the OUTPUT
    position of the convolution; `h` is the state after that position's update, from which the recurrence goes on;
    `h_and_conv` is the same with the last K-1 conv inputs replaced too, for the positions that follow.
    site: a site name of one layer, with index for conv slices ("conv_slice.-1"). layers, positions: default all.
    resume: start each pass at its layer and position; False runs every row in full (slower, same values).
    A cell after a pair's last token, or, resampled, before its first differing one, is the clean run itself (causality)
    and is not computed. Raises InputError for an unknown site, and for logits that are not finite, naming the pair.
    """
    layers, positions = _checked(model, pairs, site, layers, positions)
    with pair_named(model, pairs):
        logits = conduct(
            model, _sweep, pairs, site, layers, positions, _kind(ablation, site, pairs), resume, progress=progress
        )
    pairs.check_finite("logits", logits.movedim(-1, 0))
    return logits


def _checked(model, pairs: Pairs, site: str, layers, positions) -> tuple[list[int], list[int]]:
    """The layers and positions of a sweep. Raises InputError for what is not there."""
    n_pos = check_pairs(pairs).clean.shape[1]
    layers = list(layers_of(model, site) if layers is None else layers)
    positions = list(range(n_pos) if positions is None else positions)
    hooks = hooks_of(model, n_pos)
    for name in block_sites("h" if site == STATE_AND_CONV else site, layers):
        address = hooks.address(name)
        record = family_of(model).sites[address.site]
        at_one = address.index is not None and record.indexed_by == "position"
        if at_one or not record.by_position:
            raise InputError(f"{site!r} has no value of its own at every position: sweep another site.")
    if not positions or not all(0 <= p < n_pos for p in positions):
        raise InputError(f"positions {positions} are not in this prompt: give some of 0 to {n_pos - 1}.")
    return layers, positions


def layers_of(model, site: str) -> list[int]:
    """The layers that a sweep of a site is over: all that have it. Raises InputError, with the nearest name, for none."""
    layers = layers_with(model, "h" if site == STATE_AND_CONV else site)
    return layers or list(range(layer_count(model)))  # then the name is refused for each of them


def swept_logit_diffs(
    model,
    pairs: Pairs,
    site: str,
    *,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    ablation: AblationName | Ablation = "resample",
    resume: bool = True,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Logit diffs of `resample_sweep`, "patched" [layer, position, pair], and of plain runs, "clean", "corrupted" [pair].

    Arguments and errors as there.
    """
    layers, positions = _checked(model, pairs, site, layers, positions)
    kind = _kind(ablation, site, pairs)
    return conduct(model, _logit_diffs, pairs, site, layers, positions, kind, resume, progress=progress)


def _kind(ablation: str | Ablation, site: str, pairs: Pairs) -> Ablation:
    """The ablation. Raises InputError for a site that it has no values for, and for pairs without the roles it takes."""
    kind = ablation_of(ablation, pairs)
    if site == STATE_AND_CONV and kind.name != RESAMPLE.name:
        raise InputError(f"{STATE_AND_CONV} can be resampled only, not ablated by {kind.name}: ablate h in its place.")
    return kind


def _logit_diffs(
    model,
    pairs: Pairs,
    site: str,
    layers,
    positions,
    ablation: Ablation,
    resume: bool,
    *,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    diffs: dict[str, Tensor] = {}
    for name in ("clean", "corrupted"):
        scores = plain_scores(model, pairs, getattr(pairs, name))
        diffs[name] = logit_diff(scores, pairs.answer, pairs.wrong)
        # Before the sweep, which would refuse to write the value of such a pair without knowing whose it is.
        pairs.check_finite(f"logits of its {name} prompt", diffs[name])
    diffs["patched"] = logit_diff(_sweep(model, pairs, site, layers, positions, ablation, resume, progress=progress))
    pairs.check_finite("logits when patched", diffs["patched"])
    return diffs


def _sweep(
    model,
    pairs: Pairs,
    site: str,
    layers,
    positions,
    ablation: Ablation,
    resume: bool,
    *,
    progress: Progress | None = None,
) -> Tensor:
    rows, n_groups = _cut(model, pairs, site, layers)
    spread = _spread(model, pairs, site, layers, max(positions) + 1, ablation)
    groups = [layers[k * len(layers) // n_groups : (k + 1) * len(layers) // n_groups] for k in range(n_groups)]
    bare = pairs.without_text()
    chunks = [
        (bare[first : first + rows], site, group, positions, _of_layers(spread, group), first, resume)
        for first in range(0, len(pairs), rows)
        for group in groups
    ]
    found = each_chunk(model, _sweep_chunk, chunks, progress=progress)
    # [layer, position, pair, 2]: groups of layers first, then pairs.
    return torch.cat([torch.cat(found[k : k + n_groups]) for k in range(0, len(found), n_groups)], dim=2)


def _cut(model, pairs: Pairs, site: str, layers: Sequence[int]) -> tuple[int, int]:
    """How many pairs make a chunk of a sweep, and into how many groups its layers are cut where the pairs are few."""
    n_positions = pairs.clean.shape[1]
    rows = rows_per_chunk(model, len(pairs), n_positions)
    if attends(model):
        # The values of all positions are kept at once.
        record = family_of(model).sites["h" if site == STATE_AND_CONV else site.split(".")[0]]
        held_mib = 8 * len(layers) * math.prod(sizes_of(model).shape(record, 1, n_positions)) / 2**20
        rows = max(1, min(rows, int(1024 / held_mib)))
    wanted = chunk_count(model, len(pairs) * len(layers))
    if chunks_wanted(model) is None:
        # Each group rolls the states forward anew, which only long work is cut for.
        cells = len(layers) * n_positions / 4
        wanted = min(wanted, int(cells * pass_work(model, len(pairs), n_positions) / LEAST_WORK))
    n_groups = min(wanted // -(-len(pairs) // rows), len(layers) // LAYERS_OF_A_CHUNK)
    return rows, max(1, n_groups)


def _spread(model, pairs: Pairs, site: str, layers, n_positions: int, ablation: Ablation) -> Spread:
    """That of a site's clean values, by layer."""
    rows, _ = _cut(model, pairs, site, layers)
    groups, bare, chunks = groups_of(pairs, ablation), pairs.without_text(), []
    # A mean by role is one over all positions, also over those that are not swept.
    width = pairs.clean.shape[1] if ablation.over == "role" else n_positions
    for first in range(0, len(pairs) if ablation.over is not None else 0, rows):
        part = slice(first, first + rows)
        chunks.append((bare[part], site, layers, width, groups[part], int(groups.max()) + 1, ablation.draws))
    return gathered(ablation, groups, each_chunk(model, _sums, chunks))


def _of_layers(spread: Spread, layers: Sequence[int]) -> Spread:
    return replace(spread, sums={layer: sums for layer, sums in spread.sums.items() if layer in layers})


def _sums(
    model,
    pairs: Pairs,
    site: str,
    layers: Sequence[int],
    n_positions: int,
    groups: Tensor,
    n_groups: int,
    squares: bool,
    *,
    progress: Progress | None = None,
) -> dict[int, tuple[Tensor, ...]]:
    """The sums of some pairs, by layer; a function for `each_chunk`."""
    found: dict[int, tuple[Tensor, ...]] = {}
    with torch.no_grad():
        for moment in _moments(model, pairs.clean.to(device_of(model)), site, layers, n_positions):
            for layer in layers:
                of_groups, before = groups[:, moment.position], found.get(layer)
                found[layer] = sums_of(moment.values[layer], of_groups, n_groups, squares, before)
    return {layer: tuple(each.cpu() for each in sums) for layer, sums in found.items()}


def _sweep_chunk(
    model,
    pairs: Pairs,
    site: str,
    layers,
    positions,
    spread: Spread,
    first: int,
    resume: bool,
    *,
    progress: Progress | None = None,
) -> Tensor:
    """The cells of some pairs, of which the first is number `first` of all, in some layers."""
    with torch.no_grad():
        return _cells(model, pairs, site, layers, positions, spread, first, resume, progress).cpu()


def _cells(
    model,
    pairs: Pairs,
    site: str,
    layers,
    positions,
    spread: Spread,
    first: int,
    resume: bool,
    progress: Progress | None,
) -> Tensor:
    clean, corrupted = pairs.clean.to(device_of(model)), pairs.corrupted.to(device_of(model))
    n = len(pairs)
    read_at = pairs.read_at.to(device_of(model))
    last = read_at.amax(1)
    answers = pairs.answer_tokens.to(device_of(model))
    streams = dict(zip(layers, block_sites("resid_pre", layers), strict=True))
    run = forward(model, clean, reads=streams.values(), logits_at=read_at, logits_of=answers, own_scan=True)
    out = _answer_scores(run["hook_logits"]).expand(len(layers), len(positions), -1, -1).clone()
    begins = pairs.first_difference.to(device_of(model))
    weights = _conv_weights(model, layers) if site == STATE_AND_CONV else {}
    by_position = not attends(model)
    # Of several positions that are read, some may lie before the one that is patched.
    resumes = resume and (pairs.readout is None or not by_position)
    # Not where all states of all rows of a pass would be made, or a past be shared that attention sees.
    pooled = resumes and by_position and site not in (*BY_STATES, STATE_AND_CONV)
    done = 0
    for moment in _moments(model, torch.cat((clean, corrupted)), site, layers, max(positions) + 1):
        p = moment.position
        begun = begins <= p if spread.ablation.like_corrupted else torch.ones_like(begins, dtype=torch.bool)
        alive = torch.nonzero(begun & (p <= last))[:, 0]
        begin = p if resumes and by_position else 0
        size = _layers_per_pass(model, len(alive), clean.shape[1] - begin) if pooled else 1
        for together in _groups(sorted(set(layers)) if p in positions else (), size):
            if len(alive):
                values, start = {}, None
                for layer in together:
                    here, there = (moment.values[layer][rows] for rows in (alive, n + alive))
                    values[layer] = spread.written(layer, here, there, first + alive.cpu(), p, seed=10_007 * layer + p)
                if resumes:
                    begun_at = {layer: run[streams[layer]][alive, begin:] for layer in together}
                    lowest, *_ = together
                    start = replace(moment.start(lowest, begun_at.pop(lowest), alive), above=begun_at)
                taps = None
                if site == STATE_AND_CONV:
                    (layer,) = together
                    taps = (weights[layer], moment.conv_inputs[layer][alive], moment.conv_inputs[layer][n + alive])
                logits = _patched(
                    model, clean[alive], read_at[alive], answers[alive], site, p, values, begin, start, taps
                )
                for layer, found in zip(together, _answer_scores(logits).split(len(alive)), strict=True):
                    for cell in _cells_of(layers, layer, positions, p):
                        out[(*cell, alive)] = found
            done += sum(layer in together for layer in layers)
            if progress:
                progress(done, len(positions) * len(layers))
    return out


TOKENS_OF_A_PASS = 2048
"""As many are enough to keep a processor busy for every weight that is read; of more, what is computed leaves its cache."""


def _layers_per_pass(model, n_rows: int, n_positions: int) -> int:
    """Of how many layers the rows, so many of each, go into one pass."""
    wanted = TOKENS_OF_A_PASS // max(1, n_rows * n_positions)
    return max(1, min(wanted, rows_per_pass(model, n_positions) // max(1, n_rows)))


def _groups(layers: Sequence[int], size: int) -> list[Sequence[int]]:
    return [layers[k : k + size] for k in range(0, len(layers), size)]


def _cells_of(layers: Sequence[int], layer: int, positions: Sequence[int], p: int) -> Iterator[tuple[int, int]]:
    """Where a layer and a position stand among those of a sweep, which may name one twice."""
    for row, column in product(range(len(layers)), range(len(positions))):
        if (layers[row], positions[column]) == (layer, p):
            yield row, column


def _answer_scores(logits: Tensor) -> Tensor:
    """What (answer, wrong) score, [row, 2], of the logits [row, k, 2] of their tokens; float32 or above."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).sum(1)


@portable
@dataclass(frozen=True)
class _Moment:
    """One position of some prompts: what a sweep takes from there.

    values: per layer of the sweep the site's value [row, 1, ...], or of states [row, ...]. conv_inputs: per layer the last
    K-1 inputs of the convolution up to here. start: the resume point of a pass, of (layer, resid_pre, rows).
    """

    position: int
    values: dict[int, Tensor]
    conv_inputs: dict[int, Tensor]
    start: Callable[[int, Tensor, Tensor], Start]


def _moments(model, tokens: Tensor, site: str, layers: Sequence[int], n_positions: int) -> Iterator[_Moment]:
    """The first positions of these prompts, one after the other."""
    of_states = site in ("h", STATE_AND_CONV)
    if attends(model):
        yield from _kept_moments(model, tokens, "h" if of_states else site, site == STATE_AND_CONV, layers, n_positions)
        return
    names = dict(zip(layers, block_sites("h.0" if of_states else site, layers), strict=True))
    roll = Roll.begin(model, tokens)
    for p in range(n_positions):
        here = roll
        roll, at = here.step(list(names.values()))
        yield _Moment(p, {layer: at[name] for layer, name in names.items()}, roll.conv_start, here.start)


def _kept_moments(
    model, tokens: Tensor, site: str, with_conv: bool, layers: Sequence[int], n_positions: int
) -> Iterator[_Moment]:
    """The same of a model with attention, whose values are those of one pass over all positions."""
    names = dict(zip(layers, block_sites(site, layers), strict=True))
    inputs = dict(zip(layers, block_sites("in_proj", layers), strict=True)) if with_conv else {}
    reads = [*names.values(), *inputs.values()]
    kept = forward(model, tokens, reads=reads, logits_at=tokens[:, :0], own_scan=True)
    reach = sizes_of(model).conv_width - 1
    padded = {i: F.pad(kept[name], (0, 0, reach, 0)) for i, name in inputs.items()}
    for p in range(n_positions):
        values = {i: kept[name][:, p] if site == "h" else kept[name][:, p : p + 1] for i, name in names.items()}
        before = {i: value[:, p + 1 : p + 1 + reach] for i, value in padded.items()}
        yield _Moment(p, values, before, _from_layer)


def _from_layer(layer: int, resid_pre: Tensor, rows: Tensor) -> Start:
    """A pass that begins at a layer, and at the first position."""
    return Start(layer, resid_pre, {}, {})


def _conv_weights(model, layers) -> dict[int, Tensor]:
    """The weights of each layer's convolution, [channel, K], as a pass hands them over: a server may show no parameters."""
    with model.trace(torch.zeros(1, 1, dtype=torch.int64, device=device_of(model)), use_cache=False):
        weights = nnsight.save({i: open_layer(model, i, alone=True).conv_weight() for i in sorted(set(layers))})
    return weights


def _patched(
    model,
    tokens,
    read_at,
    answers,
    site: str,
    p: int,
    values: dict[int, Tensor],
    begin: int,
    start: Start | None,
    taps,
) -> Tensor:
    """Logits [row, k, 2] of `answers` at `read_at` with a layer's value (position axis of length 1) written at p.

    Of several layers each has rows of its own, those of the lowest first.
    begin: the first position that is run, from `start` where one is given.
    taps: (weights [channel, K], clean, corrupted conv inputs [row, K-1, channel] up to p), to be exchanged for the positions after
    p, or None.
    """
    at = p - begin

    def writing(value: Tensor) -> Callable[[Tensor], Tensor]:
        def write(x: Tensor) -> Tensor:
            # The rows of this layer are those that came last.
            x[-len(value) :, at] = value[:, 0]
            return x

        return write

    edits: dict[str, Edit] = {}
    for layer, value in values.items():
        if site in ("h", STATE_AND_CONV):
            edits[f"blocks.{layer}.hook_h.{at}"] = value
        else:
            edits[f"blocks.{layer}.hook_{site}"] = writing(value)
        if taps is not None:
            weight, *inputs = taps
            edits |= _exchange_taps(weight, layer, at, *inputs)
    n_sets = len(values)
    return forward(
        model,
        tokens[:, begin:],
        edits,
        logits_at=(read_at - begin).repeat(n_sets, 1),
        logits_of=answers.repeat(n_sets, 1, 1),
        start=start,
    )["hook_logits"]


def _exchange_taps(weight: Tensor, layer: int, at: int, clean: Tensor, corrupted: Tensor) -> dict:
    """Edits of the conv output after position `at` that make it see the corrupted run's inputs up to `at`."""
    width = weight.shape[-1]

    def exchange(x: Tensor) -> Tensor:
        for ahead in range(1, min(width, x.shape[1] - at)):
            # The output `ahead` positions after `at` reads inputs up to `at` through its oldest width - ahead taps.
            taps = weight[:, : width - ahead].T
            x[:, at + ahead] += (taps * (corrupted - clean)[:, ahead - 1 :]).sum(1)
        return x

    return {f"blocks.{layer}.hook_conv": exchange}
