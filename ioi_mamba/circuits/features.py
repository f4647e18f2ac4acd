"""Features as items of circuits: the value of a site split into what a dictionary finds in it, and an error.

    value = decode(f) + error          f = encode(what the encoder reads)

A dictionary is a sparse autoencoder, which encodes the value that it decodes, or a transcoder, which encodes another. It is
anything with `encode` and `decode`; `dictionaries` has one of our own, reads files of others and trains.

A feature that is patched takes its activation from the corrupted run, the error node takes the error (Marks et al., arXiv
2403.19647). Whatever the dictionary is worth, all of its features and the error patched are the site patched. Features are
those of the value as the pass has it, after what is patched upstream and after parts that are written at the same site.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ioi_mamba.errors import InputError
from ioi_mamba.model.families import block_of, sizes_of
from ioi_mamba.model.jobs import device_of
from ioi_mamba.model.portable import portable

ERROR = "error"


@portable
@dataclass(frozen=True, eq=False)
class Features:
    """The features of a dictionary at one node of the graph, as `features_at` makes them.

    Attributes:
        node: The node whose value it splits, as in tables.
        layer: Its block.
        reads: The site that is encoded.
        writes: The site whose value is split; the same of an autoencoder.
        coder: What has `encode`, [..., width] to [..., feature], and `decode` back.
        n: How many features it has.
        name: What its items are called.
    """

    node: str
    layer: int
    reads: str
    writes: str
    coder: Any
    n: int
    name: str

    @property
    def parts(self) -> list[str]:
        """The names of its items: the features by number, and the error."""
        return [f"{self.name}.{which}" for which in (*range(self.n), ERROR)]

    def described(self) -> dict[str, Any]:
        """What it is, for files: everything but the dictionary, of which a hash."""
        return {
            "node": self.node,
            "reads": self.reads,
            "writes": self.writes,
            "n": self.n,
            "name": self.name,
            "sha256": fingerprint(self.coder),
        }

    def encoded(self, value: Tensor) -> Tensor:
        """Activations [row, pos, feature] of what the encoder reads, [row, pos, ...]; never below float32."""
        return self.coder.encode(_wide(value.flatten(2)))

    def decoded(self, activations: Tensor) -> Tensor:
        """What activations [row, pos, feature] give, [row, pos, width]."""
        return self.coder.decode(activations)

    def patched(self, mask: Tensor, now: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> Tensor:
        """The value of `writes` in which items take what the corrupted run has, by so much of the way.

        Args:
            mask: Float[set, item, pos], the error last.
            now: The values of the pass by site, rows of sets x pairs.
            there: Those of the corrupted run, rows of pairs.
        """
        n_sets, value = len(mask), now[self.writes]
        here, other = self.encoded(now[self.reads]), self.encoded(there[self.reads])
        by_row = lambda share: share.repeat_interleave(len(value) // n_sets, 0)
        wide, target = _wide(value.flatten(2)), _wide(there[self.writes].flatten(2))
        moved = here + by_row(mask[:, :-1].movedim(1, -1)) * (other.repeat(n_sets, 1, 1) - here)
        found = self.decoded(here)
        change = self.decoded(moved) - found
        if mask[:, -1].any():
            error = (target - self.decoded(other)).repeat(n_sets, 1, 1) - (wide - found)
            change = change + by_row(mask[:, -1])[..., None] * error
        return (wide + change).to(value.dtype).view_as(value)

    def scores(self, gradient: Tensor, now: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> Tensor:
        """Gradient times change of every item, Float[pair, item, pos]; gradient: that at `writes`.

        now, there: as of `patched`. Where the dictionary decodes by a linear map, the items sum to the score of the whole site.
        """
        at_value = _wide(gradient.flatten(2))
        with torch.enable_grad():
            here = self.encoded(now[self.reads].detach()).detach().requires_grad_()
            found = self.decoded(here)
            (at_features,) = torch.autograd.grad(found, here, at_value)
        with torch.no_grad():
            other = self.encoded(there[self.reads])
            values = [_wide(each[self.writes].flatten(2)) for each in (now, there)]
            error = (values[1] - self.decoded(other)) - (values[0] - found)
            of_features = at_features * (other - here)
            return torch.cat((of_features, (at_value * error).sum(-1, keepdim=True)), -1).movedim(-1, 1)


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def features_at(
    model: Any, layer: int, coder: Any, *, site: str = "out_proj", reads: str | None = None, name: str | None = None
) -> Features:
    """The features that a dictionary finds at a site, to be given to `attribute`, `acdc`, `patch_edges` and `universe_of`.

    Args:
        model: As `open_model` gives it.
        layer: The block.
        coder: Anything with `encode` and `decode`, such as a `Dictionary` or an SAE of SAELens; what follows the
            positions in the site's shape is one axis for it.
        site: The site whose value is split, one that has a value at every position.
        reads: Of a transcoder, the site that is encoded, in the same block and not later in the pass; None: the same.
        name: What its items are called; None: the site, of a transcoder both sites. Several dictionaries of one site need
            names of their own; of those patched at once each sees what the ones before it made.

    Raises:
        InputError: For a layer or a site that the model does not have, a site of the stream, which belongs to no node, a
            transcoder that reads what comes later, and a dictionary of another width or without encode and decode.
    """
    n_layers = sizes_of(model).n_layers
    if type(layer) is not int or not -n_layers <= layer < n_layers:
        raise InputError(f"layer is {layer!r}: the model has layers 0 to {n_layers - 1}.")
    layer %= n_layers
    reads, block = reads or site, block_of(model, layer)
    known = [name for name, each in block.sites.items() if each.by_row and each.by_position and not each.indexed_by]
    own = [name for name in known if not name.startswith("resid_")]
    for wanted, fits in ((site, own), (reads, known)):
        if wanted not in fits:
            raise InputError(f"Block {layer} has no site {wanted!r} with features: give one of {', '.join(fits)}.")
    if known.index(reads) > known.index(site):
        raise InputError(f"A transcoder of block {layer} cannot read {reads!r}, which comes after {site!r}.")
    if not (callable(getattr(coder, "encode", None)) and callable(getattr(coder, "decode", None))):
        raise InputError(f"{type(coder).__name__} is no dictionary: it must have encode and decode.")
    widths = [_width(model, block, each) for each in (reads, site)]
    with torch.no_grad():
        try:
            found = coder.encode(torch.zeros(1, 1, widths[0], device=device_of(model)))
            width = coder.decode(found).shape[-1]
            coder.decode(found)  # some keep what they scaled by for one decoding only
        except (RuntimeError, TypeError, AttributeError, IndexError) as error:
            raise InputError(
                f"The dictionary cannot encode and decode {reads!r} of block {layer}, {widths[0]} wide ({error}): give one "
                "of that width, whose encode gives one tensor of all activations."
            ) from None
    if width != widths[1]:
        raise InputError(f"The dictionary decodes to {width} numbers, and {site!r} of block {layer} has {widths[1]}.")
    name = name or (site if reads == site else f"{reads}>{site}")
    return Features(_node(block, layer, site), layer, reads, site, coder, found.shape[-1], name)


def _width(model: Any, block: Any, site: str) -> int:
    shape = sizes_of(model).shape(block.sites[site], 1, 1)
    return int(torch.Size(shape).numel())


def _node(block: Any, layer: int, site: str) -> str:
    """The node that a site is in: that of the sub-block which reads or adds it, else the mixer's."""
    writers = block.all_writers()
    of_site = next((writer.name for writer in writers if site in (writer.reads, writer.adds)), "mamba")
    return str(layer) if len(writers) == 1 else f"{layer}.{of_site}"


def columns_of(features: Sequence[Features]) -> list[slice]:
    """Where the items of each stand in a mask of all of them."""
    ends, first = [], 0
    for each in features:
        ends.append(slice(first, first + each.n + 1))
        first += each.n + 1
    return ends


def check_features(features: Iterable[Features]) -> tuple[Features, ...]:
    """The features as a tuple. Raises InputError for what is none, and for two of one name at a node."""
    found = tuple(features)
    for each in found:
        if not isinstance(each, Features):
            raise InputError(f"{each!r} are no features: give what im.features_at(model, layer, dictionary) makes.")
    names = [(each.node, each.name) for each in found]
    for node, name in names:
        if names.count((node, name)) > 1:
            raise InputError(f"Node {node} has two dictionaries called {name}: give one of them another name.")
    return found


def row_floats(features: Iterable[Features], n_positions: int) -> int:
    """How many numbers one more row takes in a pass, beyond what the pass takes without features."""
    return sum(6 * n_positions * each.n for each in features)


def fingerprint(coder: Any) -> str:
    """A hash of a dictionary's tensors: of its state, or of its attributes."""
    tensors = coder.state_dict() if callable(getattr(coder, "state_dict", None)) else vars(coder)
    found = hashlib.sha256(type(coder).__name__.encode())
    for name in sorted(tensors):
        value = tensors[name]
        found.update(name.encode())
        if isinstance(value, Tensor):
            found.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, int | float | str | None):
            found.update(repr(value).encode())
    return found.hexdigest()
