"""The named values of a model's layers, and the hook names by which they are asked for.

A *site* is a value of one layer, named as MambaLens names it: `blocks.{layer}.hook_{site}`. Two sites take an index:
`hook_h.{pos}` (the state after token pos) and `hook_conv_slice.{s}` (one tap of the convolution, s in -(K-1)..0). Three
hooks belong to the whole model (`MODEL_SITES`). Which sites there are stands in the record of the model's family.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from ioi_mamba.errors import InputError
from ioi_mamba.model.portable import portable

Index = Literal["position", "slice"]


@portable
class Site(NamedTuple):
    """One named value of a layer.

    Attributes:
        name: As in `blocks.{layer}.hook_{name}`.
        stage: Which of the family's stages serves it.
        shape: In letters of the glossary.
        place: Where it lives in the module tree of transformers.
        meaning: What it is, in words.
        indexed_by: What its index counts: a position, which may be left out, or a conv slice, which may not.
    """

    name: str
    stage: str
    shape: str
    place: str
    meaning: str
    indexed_by: Index | None = None

    @property
    def by_row(self) -> bool:
        """Whether it has a value of its own in every row; a parameter has none."""
        return "batch" in self.shape.split()

    @property
    def by_position(self) -> bool:
        """Whether it has a value of its own at every position."""
        return "pos" in self.shape.split()

    @property
    def spelled(self) -> str:
        """Its name with the place of its index, as tables show it."""
        return self.name + {"position": "[.POS]", "slice": ".S"}.get(self.indexed_by or "", "")


MODEL_SITES = {
    "embed": ("batch pos D", "token embedding"),
    "norm": ("batch pos D", "after the last norm"),
    "logits": ("batch pos vocab", "logits"),
}
"""The hooks of the whole model: shape and meaning by name."""

_HOOK = re.compile(r"(?:blocks\.(?P<layer>-?\d+)\.)?hook_(?P<name>[A-Za-z_0-9]+?)(?:\.(?P<index>-?\d+))?")


@portable
class Address(NamedTuple):
    """A parsed hook name. `layer` is None for the three hooks of the whole model."""

    layer: int | None
    site: str
    index: int | None  # type: ignore[assignment]  # tuple's own `index` is not used


@portable
class Hooks(NamedTuple):
    """The hook names that a model has on prompts of so many positions.

    blocks: the sites of each block, by name.
    """

    blocks: Sequence[Mapping[str, Site]]
    n_positions: int
    conv_width: int

    def address(self, hook: str) -> Address:
        """The address of a hook name. Negative layers and positions count from the end.

        Raises:
            InputError: For an unknown name (with the nearest known one), a layer, position or slice out of range.
        """
        if not isinstance(hook, str):
            raise InputError(f"{hook!r} is no hook name: `ioi-mamba sites` lists them all.")
        match = _HOOK.fullmatch(hook)
        if match is None:
            raise self._unknown(hook)
        layer, index = (None if match[part] is None else int(match[part]) for part in ("layer", "index"))
        name, n_layers = match["name"], len(self.blocks)
        if layer is None:
            if name not in MODEL_SITES or index is not None:
                raise self._unknown(hook)
            return Address(None, name, None)
        outside = not -n_layers <= layer < n_layers
        of_any = {each: site for block in self.blocks for each, site in block.items()}
        site = of_any.get(name) if outside else self.blocks[layer].get(name)
        if site is None or (index is not None) > (site.indexed_by is not None):
            if not outside and site is None and name in of_any:
                has = [i for i, block in enumerate(self.blocks) if name in block]
                raise InputError(f"{hook!r}: block {layer % n_layers} has no such value; blocks {_ranges(has)} have.")
            raise self._unknown(hook)
        if site.indexed_by == "slice" and index is None:
            raise self._unknown(hook)
        if outside:
            raise InputError(f"{hook!r}: the model has layers 0 to {n_layers - 1}, not {layer}.")
        if index is not None and site.indexed_by == "slice":
            if not -self.conv_width < index <= 0:
                raise InputError(f"{hook!r}: conv slices are {1 - self.conv_width} to 0, not {index}.")
        elif index is not None:
            if not -self.n_positions <= index < self.n_positions:
                raise InputError(f"{hook!r}: the prompt has positions 0 to {self.n_positions - 1}, not {index}.")
            index %= self.n_positions
        return Address(layer % n_layers, name, index)

    def expanded(self, names: str | Iterable[str]) -> list[str]:
        """The names with each that holds a `*` replaced by all it matches, in the order of a pass; each name once.

        Raises:
            InputError: Where a pattern matches nothing.
        """
        found: dict[str, None] = {}
        for name in [names] if isinstance(names, str) else names:
            if not isinstance(name, str) or "*" not in name:
                found[name] = None
                continue
            # What counts from the end is counted from the start, as the names that are matched are.
            placed = re.sub(r"(?<=blocks\.)-\d+", lambda found: str(int(found[0]) % len(self.blocks)), name)
            placed = re.sub(r"(?<=hook_h\.)-\d+$", lambda found: str(int(found[0]) % self.n_positions), placed)
            pattern = re.compile(re.escape(placed).replace(r"\*", "[^.]*"))
            matches = [each for each in self._all() if pattern.fullmatch(each)]
            if not matches:
                raise InputError(f"No hook name matches {name!r}: `ioi-mamba sites` lists them all.")
            found |= dict.fromkeys(matches)
        return list(found)

    def _unknown(self, hook: str) -> InputError:
        indexed = {"position": ".0", "slice": ".-1"}
        examples = self._names(lambda site: ["", indexed[site.indexed_by]] if site.indexed_by else [""])
        nearest = difflib.get_close_matches(hook, examples, n=1, cutoff=0.0)[0]
        return InputError(f"Unknown hook name {hook!r}: did you mean {nearest!r}? `ioi-mamba sites` lists them all.")

    def _all(self) -> list[str]:
        """Every name there is, in the order of a pass, block by block."""
        positions = ["", *(f".{p}" for p in range(self.n_positions))]
        slices = [f".{s}" for s in range(1 - self.conv_width, 1)]
        endings = {"position": positions, "slice": slices}
        return self._names(lambda site: endings[site.indexed_by] if site.indexed_by else [""])

    def _names(self, endings: Callable[[Site], list[str]]) -> list[str]:
        names = [f"hook_{name}" for name in MODEL_SITES]
        for i, block in enumerate(self.blocks):
            names += [f"blocks.{i}.hook_{name}{end}" for name, site in block.items() for end in endings(site)]
        return names


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers in words: "0, 2 and 5"."""
    texts = list(map(str, numbers))
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
