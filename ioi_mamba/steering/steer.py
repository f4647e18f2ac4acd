"""Make a model read another name than the prompt has, by writing one average vector into one layer.

mamba-370m's bottleneck layer takes a name in one token after it, as `ssm_input`. Averaged over many prompts with the
same name in the same place, that vector stands for the name alone (paper section 4.3). `averages` makes these
vectors, `steering_edit` writes them, and `steer` does both for one prompt:

    steer(model, "Then, Ana, Ivan and Leah went to the office. Ana and Ivan gave a bone to", {"n3": "Mary"})

`n1`, `n2`, ... are the names in order of mention. Two methods: "replace" writes the new name's average in
place of what is there, "subtract-add" adds the new name's and subtracts the old one's, which leaves the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import nnsight
import torch
from torch import Tensor, nn

from ioi_mamba.errors import InputError
from ioi_mamba.model.families import blocks_of, head_of, open_layer, sizes_of
from ioi_mamba.model.jobs import call, conduct, device_of, each_chunk
from ioi_mamba.model.memory import rows_per_chunk
from ioi_mamba.model.portable import portable
from ioi_mamba.passes.forward import forward
from ioi_mamba.passes.probe import weights_of
from ioi_mamba.passes.sweep import Progress, layer_count
from ioi_mamba.steering.bottleneck import find_layer, find_offset
from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import ABSENT, Pairs
from ioi_mamba.tasks.prompts import find_roles, is_name, read, single_token_ids, words_of

METHODS = ("replace", "subtract-add")

# With 2,000 pairs each of the 203 names is in each of five places in some 20 prompts.
_PAIRS_FOR_STEER = 2000


@portable
@dataclass(frozen=True)
class Averages:
    """The mean `ssm_input` of a layer `offset` tokens after a name, for each name in each slot.

    slots: role names, "n1", .... names: Int64[name], token ids, ascending (of a longer name its first token).
    mean: Float32[name, slot, E]; count: Int64[name, slot], the prompts behind each mean, 0 where there are
    none. All on the CPU.
    """

    layer: int
    offset: int
    slots: tuple[str, ...]
    names: Tensor
    mean: Tensor
    count: Tensor

    def seen(self, names: Tensor, slot: str) -> Tensor:
        """Bool[row]: whether there is a mean for these names (Int64[row]) in this slot."""
        index = self._index(names)
        return (self.names[index] == names) & (self.count[index, self._slot(slot)] > 0)

    def look_up(self, names: Tensor, slot: str) -> Tensor:
        """Float32[row, E], the means of these names (Int64[row]) in this slot; InputError for a missing one."""
        missing = names[~self.seen(names, slot)]
        if len(missing):
            raise InputError(
                f"The name with token {int(missing[0])} is never in {slot} of the averaged prompts; average over more."
            )
        return self.mean[self._index(names), self._slot(slot)]

    def _index(self, names: Tensor) -> Tensor:
        return torch.searchsorted(self.names, names).clamp(max=len(self.names) - 1)

    def _slot(self, slot: str) -> int:
        if slot not in self.slots:
            raise InputError(f"There are no averages for {slot!r}; there are for {', '.join(self.slots)}.")
        return self.slots.index(slot)


def name_slots(pairs: Pairs) -> tuple[str, ...]:
    """The roles that are names, in order of mention. Raises InputError where there are none."""
    slots = sorted(filter(is_name, pairs.roles), key=lambda role: int(role[1:]))
    if not slots:
        raise InputError("These pairs have no roles n1, n2, ...: steering needs to know where the names are.")
    return tuple(slots)


def averages(
    model,
    pairs: Pairs,
    layer: int,
    *,
    offset: int = 1,
    leave_out: Tensor | None = None,
    progress: Progress | None = None,
) -> Averages:
    """Mean `ssm_input` of `layer` `offset` tokens after each name, over the clean and corrupted prompts of `pairs`.

    Every prompt counts as often as it stands there (in a symmetric set each stands there twice) but is run once.
    offset: 1 is one token after the name, as in the paper; 0 the name itself. leave_out: Int64[prompt, pos], prompts
    not to be averaged over. Raises InputError for a layer out of range, a negative offset, pairs without names and
    when nothing is left.
    """
    if not 0 <= layer < layer_count(model):
        raise InputError(f"The model has layers 0 to {layer_count(model) - 1}, not {layer}.")
    if offset < 0:
        raise InputError(f"offset is {offset}; give 0 for the name itself, 1 for one token after it, and so on.")
    slots = name_slots(pairs)
    at = torch.stack([pairs.roles[slot] for slot in slots], 1).cpu()
    at = torch.where(at + offset <= pairs.last.cpu()[:, None], at, ABSENT)
    width = min(pairs.clean.shape[1], int(at.max()) + offset + 1)
    prompts, times = _distinct(pairs, at, leave_out)
    at, prompts = prompts[:, -len(slots) :], prompts[:, :width]
    present = at != ABSENT
    ids = torch.where(present, prompts.gather(1, at.clamp(min=0)), 0)
    names = ids[present].unique()
    # Each mention adds to the cell of its name and slot; a prompt without the slot adds with weight 0.
    cell = torch.searchsorted(names, ids).clamp(max=len(names) - 1) * len(slots) + torch.arange(len(slots))
    weight = times[:, None] * present
    read_at = (at.clamp(min=0) + offset).clamp(max=width - 1)
    n_cells = len(names) * len(slots)
    total = conduct(model, _totals, prompts, read_at, cell, weight, n_cells, layer, progress=progress)
    count = torch.zeros(n_cells, dtype=torch.int64).index_add_(0, cell.flatten(), weight.flatten())
    mean = (total / count.clamp(min=1)[:, None]).float()
    shape = (len(names), len(slots))
    return Averages(layer, offset, slots, names, mean.reshape(*shape, -1), count.reshape(shape))


def _totals(
    model, prompts: Tensor, read_at: Tensor, cell: Tensor, weight: Tensor, n_cells: int, layer: int, *, progress=None
) -> Tensor:
    """Float64[cell, E]: the sum of `ssm_input` at `read_at` [prompt, slot], times `weight`, by `cell`."""
    total = torch.zeros(n_cells, sizes_of(model).letters["E"], dtype=torch.float64)
    parts = torch.arange(len(prompts)).split(rows_per_chunk(model, len(prompts), prompts.shape[1]))
    found = each_chunk(model, _values, [(prompts[rows], read_at[rows], layer) for rows in parts], progress=progress)
    for rows, values in zip(parts, found, strict=True):
        total.index_add_(0, cell[rows].flatten(), (values.double() * weight[rows][..., None]).flatten(0, 1))
    return total


def _values(model, prompts: Tensor, read_at: Tensor, layer: int, *, progress=None) -> Tensor:
    """`ssm_input` [prompt, slot, E] of some prompts, on the CPU."""
    with torch.no_grad():
        x = read_up_to(model, prompts, layer, "ssm_input").cpu()
    return x[torch.arange(len(x))[:, None], read_at]


def steering_edit(
    averages: Averages, method: str, positions: Tensor, new: Tensor, old: Tensor, slot: str
) -> Callable[[Tensor], Tensor]:
    """The edit of `blocks.{averages.layer}.hook_ssm_input` that turns one name of each row into another.

    positions: Int64[row], where the name's first token is; the edit is `averages.offset` tokens later. new, old:
    Int64[row], token ids; `old` is used by "subtract-add" only. slot: whose averages are taken. Raises InputError for an
    unknown method or slot, and for a name that has no average there.
    """
    if method not in METHODS:
        raise InputError(f"method is {method!r}; use one of {', '.join(METHODS)}.")
    vector = averages.look_up(new, slot)
    if method == "subtract-add":
        vector = vector - averages.look_up(old, slot)
    return writing(vector, positions + averages.offset, method)


def writing(vector: Tensor, positions: Tensor, method: str) -> Callable[[Tensor], Tensor]:
    """The edit that puts each row's vector (Float[row, E]) at its position (Int64[row]), or adds it with "subtract-add"."""

    def write(x: Tensor) -> Tensor:
        rows, at, value = torch.arange(len(x), device=x.device), positions.to(x.device), vector.to(x)
        x[rows, at] = value if method == "replace" else x[rows, at] + value
        return x

    return write


def steer(
    model,
    prompt: str,
    names: Mapping[str, str],
    *,
    layer: int | None = None,
    offset: int | None = None,
    method: str = "subtract-add",
    averages: Averages | None = None,
    max_new_tokens: int = 8,
) -> str:
    """How the model continues `prompt` (greedily, until the end of the text) when names in it are rewritten.

    names: which names become what, as {"Leah": "Mary"} for every mention of Leah, or {"n2": "Mary"} for the second name
    that is mentioned. {}: how the model continues without an edit. The old name is read off the prompt.
    layer, offset: where to write, so many tokens after the name; None takes those of `averages`, and without these
    what `find_layer` and `find_offset` find.
    averages: of the names, from the function `averages`; they are those of the weights they were made with. None: made
    from 2,000 generated pairs of the paper's templates and kept for the next call with this model, layer and offset,
    as long as the weights stay the same: their hash is taken at every call (mamba-370m: a second).
    Raises InputError for a slot the prompt has not, a name that is not one token or has no average, and a `layer`
    or `offset` that is not that of `averages`.
    """
    if not isinstance(prompt, str) or not isinstance(names, Mapping):
        raise InputError(
            'The prompt must be a text and names a dict, such as {"Leah": "Mary"}; give one prompt at a time.'
        )
    if averages is None:
        averages = _kept_averages(model, layer, offset)
    elif layer not in (None, averages.layer) or offset not in (None, averages.offset):
        raise InputError(
            f"The averages are those of layer {averages.layer} and offset {averages.offset}: leave layer and offset out."
        )
    tokens, roles = _read_prompt(model.tokenizer, prompt, averages)
    names = _by_slot(model.tokenizer, names, tokens, roles)
    new_ids = single_token_ids(model.tokenizer, names.values()) if names else {}
    edits = []
    for slot, name in names.items():
        if slot not in roles or not is_name(slot):
            mentioned = ", ".join(filter(is_name, roles)) or "none"
            raise InputError(f"The prompt has no name {slot!r}; it has {mentioned}.")
        if name not in new_ids:
            raise InputError(f"{f' {name}'!r} is not one token of this tokenizer; use another name.")
        position = torch.tensor([roles[slot]])
        if roles[slot] + averages.offset >= len(tokens):
            raise InputError(
                f"The prompt ends before {averages.offset} tokens after {slot}, where the edit is: add words."
            )
        new = torch.tensor([new_ids[name]])
        edits.append(steering_edit(averages, method, position, new, tokens[position], slot))

    following = call(model, _continued, tokens, averages.layer, edits, max_new_tokens, model.tokenizer.eos_token_id)
    return model.tokenizer.decode(following)


def _by_slot(tokenizer: Any, names: Mapping[str, str], tokens: Tensor, roles: Mapping[str, int]) -> dict[str, str]:
    """The new name of each slot, where a key may be a slot or a name that the prompt mentions.

    Raises InputError for what is neither, and for a slot that two keys mean.
    """
    mentioned: dict[int, list[str]] = {}
    for role in filter(is_name, roles):
        mentioned.setdefault(int(tokens[roles[role]]), []).append(role)
    ids = single_token_ids(tokenizer, [key for key in names if isinstance(key, str) and key not in roles])
    found: dict[str, str] = {}
    for key, name in names.items():
        if not isinstance(key, str) or not isinstance(name, str):
            raise InputError(f"{key!r}: {name!r} is no change of a name; give texts, such as {{'Leah': 'Mary'}}.")
        for slot in [key] if key in roles or is_name(key) else mentioned.get(ids.get(key, -1), [key]):
            if slot in found:
                raise InputError(f"{slot} is changed twice, to {found[slot]!r} and to {name!r}; change it once.")
            found[slot] = name
    return found


def _continued(
    model,
    tokens: Tensor,
    layer: int,
    edits: list[Callable[[Tensor], Tensor]],
    n_tokens: int,
    end: int,
    *,
    progress=None,
) -> Tensor:
    """Int64[pos], what follows `tokens` [pos], with the edits of `ssm_input` of `layer`; up to the token `end`."""

    def write(x: Tensor) -> Tensor:
        for edit in edits:
            x = edit(x)
        return x

    row = tokens[None]
    hook = {f"blocks.{layer}.hook_ssm_input": write} if edits else {}
    with torch.no_grad():
        for _ in range(n_tokens):
            last = torch.tensor([[row.shape[1] - 1]])
            logits = forward(model, row, hook, logits_at=last, own_scan=True)["hook_logits"]
            following = logits[0, 0].argmax().cpu()
            if int(following) == end:
                break
            row = torch.cat([row, following.reshape(1, 1)], 1)
    return row[0, len(tokens) :]


def read_up_to(model, tokens: Tensor, layer: int, site: str) -> Tensor:
    """The value of a site of `layer`, from a pass that ends there. tokens: Int64[row, pos]."""
    blocks, head, n_layers = blocks_of(model), head_of(model), layer_count(model)
    with model.trace(tokens.to(device_of(model)), use_cache=False):
        for i in range(layer):
            below = open_layer(model, i, alone=True)
            below.own_scan()
            below.finish()
        here = open_layer(model, layer, alone=True)
        value = nnsight.save(here.get(site))
        here.own_scan()
        here.finish()
        # Nothing above is needed. (Stopping the pass here would be simpler, but in a server's sandbox it also stops the
        # next one.)
        after = blocks[layer].output
        for i in range(layer + 1, n_layers):
            blocks[i].skip(after)
        head.input = head.input[:, :1]
    return value


class _OfModel(WeakKeyDictionary):
    """What was found out about each model. Code sent to a server takes none of it along."""

    def __reduce__(self):
        return WeakKeyDictionary, ()


_kept: WeakKeyDictionary[nn.Module, tuple[str, dict[Any, Any]]] = _OfModel()


def _of_weights(model) -> dict[Any, Any]:
    """What was found out about a model with the weights it has now: empty where they are others than last time.

    The weights on a server cannot be changed from here.
    """
    weights = weights_of(model)
    kept = _kept.get(model._module)
    if kept is None or kept[0] != weights:
        kept = _kept[model._module] = (weights, {})
    return kept[1]


def _kept_averages(model, layer: int | None, offset: int | None) -> Averages:
    """Averages over generated pairs, made once for the weights of a model, a layer and an offset as asked for."""
    kept = _of_weights(model)
    if layer is None:
        if "layer" not in kept:
            kept["layer"] = find_layer(model)
        layer = kept["layer"]
    if (layer, offset) not in kept:
        where = find_offset(model, layer) if offset is None else offset
        pairs = ioi.generate(model.tokenizer, _PAIRS_FOR_STEER, 27, symmetric=True)
        kept[layer, offset] = averages(model, pairs, layer, offset=where)
    return kept[layer, offset]


def _read_prompt(tokenizer: Any, text: str, averages: Averages) -> tuple[Tensor, dict[str, int]]:
    """Int64[pos] with BOS in front, and the roles of a prompt, in which the averaged names are the names."""
    if not text.strip():
        raise InputError("The prompt is empty; give a text with names in it.")
    averaged = set(averages.names.tolist())
    ids_of = single_token_ids(tokenizer, dict.fromkeys(words_of(text)))
    (prompt,) = read(tokenizer, [text])
    return torch.tensor(prompt.tokens), find_roles(prompt, [word for word, i in ids_of.items() if i in averaged])


def _distinct(pairs: Pairs, at: Tensor, leave_out: Tensor | None) -> tuple[Tensor, Tensor]:
    """Every prompt once, Int64[prompt, pos + slot] (tokens, then name positions); how often, [prompt]."""
    sides = [torch.cat([side.cpu(), at], 1) for side in (pairs.clean, pairs.corrupted)]
    prompts, times = torch.cat(sides).unique(dim=0, return_counts=True)
    if leave_out is None:
        return prompts, times
    out = {tuple(row) for row in leave_out.tolist()}
    kept = torch.tensor([tuple(row[: leave_out.shape[1]]) not in out for row in prompts.tolist()])
    if not kept.any():
        raise InputError("Every prompt is left out of the averages; give more pairs.")
    return prompts[kept], times[kept]
