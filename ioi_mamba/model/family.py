"""What a family of models is made of, one record a family. The families themselves: `families.py`.

Whatever differs between state-space models stands in such a record: where things are in the module tree, the values
that can be read and written, the ways through a layer that circuits take apart, and what a pass costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ioi_mamba.model.portable import portable
from ioi_mamba.model.sites import MODEL_SITES, Hooks, Site

SCAN = "scan"
"""The stage of a layer's pass in which its recurrence runs; every family has it."""


@portable
class Sizes(NamedTuple):
    """How large a model is.

    Attributes:
        n_layers: Layers.
        letters: How much each letter of the glossary stands for ("D", "E", "N", "K", ..., "vocab").
        stream_in_fp32: Whether the residual stream is float32 whatever the weights are in.
    """

    n_layers: int
    letters: Mapping[str, int]
    stream_in_fp32: bool

    @property
    def conv_width(self) -> int:
        """Taps of the causal convolution, K."""
        return self.letters["K"]

    def shape(self, site: Site, batch: int, n_positions: int) -> tuple[int, ...]:
        """The shape of a site's value."""
        sizes = {**self.letters, "batch": batch, "pos": n_positions, "K-1": self.conv_width - 1}
        return tuple(sizes[letter] for letter in site.shape.split())


@portable
class Tree(NamedTuple):
    """Where a model of transformers has its parts: paths from the model, and of the mixer from its block."""

    blocks: str
    embeddings: str
    last_norm: str
    head: str
    mixer: str


@portable
@dataclass(frozen=True, eq=False)
class Part:
    """A way through a layer that can be patched by itself: an item of circuits inside a layer.

    Attributes:
        name: As in tables.
        meaning: What it is, in words.
        site: Where patching it is written, and where its gradient is taken.
        own: The site of its own value. Where this is another than `site`, the value there is a sum that it is a term of.
        corrupted: The sites that what is put in its place takes from the corrupted run.
        now: The sites that it takes from the patched pass itself.
        made: What is put in its place, [row, pos, width], where that is not just the corrupted run's value: of
            (corrupted values by site [pair, ...], values of this pass by site [row, ...], the pair of each row).
        leads_to: The part that it reaches the layer's output through; None: reaches it by itself.
        on_path: Whether the path of integrated gradients, in its published form, moves along it too.
    """

    name: str
    meaning: str
    site: str
    own: str
    corrupted: tuple[str, ...]
    now: tuple[str, ...] = ()
    made: Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Tensor], Tensor] | None = None
    leads_to: str | None = None
    on_path: bool = False

    @property
    def is_term(self) -> bool:
        """Whether the value at `site` is a sum that it is a term of."""
        return self.own != self.site


@portable
@dataclass(frozen=True, eq=False)
class Family:
    """A family of models.

    Attributes:
        name: Its `model_type` in config.json.
        label: In sentences.
        published: Ids of checkpoints, to be named where an unknown name is near; the one that is meant most, first.
        tree: Where its parts are in the module tree.
        operations: The labels by which nnsight finds the calls inside a mixer, see `families.check_labels`.
        stages: Of the pass through one layer, in order; sites of one stage are served by one place in the module tree.
        inside: Those of them that need the mixer to run.
        sites: By name, in the order in which a pass reaches them.
        config_names: The entries of its config that say how large it is.
        sizes: The sizes of (config).
        layer_pass: The class of a pass through one layer, made of (family, model, layer, alone).
        recurrence_terms: (decay, drive) of (A_bar, B_bar, x), each of the shape of h: h_t = decay_t h_(t-1) + drive_t.
        parts: The parts of a layer, in the order of tables, of (conv width).
        row_floats: How many numbers one more pair takes in a pass, of (sizes, positions, kind of pass); see `memory.py`.
        refusal: Why a config of this family cannot be read, in a sentence after the model's name; None where it can be.
    """

    name: str
    label: str
    published: tuple[str, ...]
    tree: Tree
    operations: tuple[str, ...]
    stages: tuple[str, ...]
    inside: tuple[str, ...]
    sites: Mapping[str, Site]
    config_names: tuple[str, ...]
    sizes: Callable[[Any], Sizes]
    layer_pass: Callable[..., Any]
    recurrence_terms: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    parts: Callable[[int], tuple[Part, ...]]
    row_floats: Callable[[Sizes, int, str], float]
    refusal: Callable[[Mapping[str, Any]], str | None]

    def stage(self, site: str) -> int:
        """The number of the stage that serves a site, named with or without its index."""
        return self.stages.index(self.sites[site.split(".")[0]].stage)

    def listed(self) -> list[tuple[str, str, str, str]]:
        """Every hook name with its shape, its place and its meaning; I stands for the layer."""
        places = {"embed": self.tree.embeddings, "norm": self.tree.last_norm, "logits": self.tree.head}
        whole = [
            (f"hook_{name}", shape, f"{places[name]}.output", meaning) for name, (shape, meaning) in MODEL_SITES.items()
        ]
        sites = [
            (f"blocks.I.hook_{site.spelled}", site.shape, site.place, site.meaning) for site in self.sites.values()
        ]
        return [whole[0], *sites, *whole[1:]]

    def hooks(self, config: Any, n_positions: int) -> Hooks:
        """The hook names of a model of this config, on prompts of so many positions."""
        sizes = self.sizes(config)
        return Hooks(self.sites, sizes.n_layers, n_positions, sizes.conv_width)
