"""What a family of models is made of, one record a family. The families themselves: `families.py`.

Whatever differs between state-space models stands in such a record: where things are in the module tree, the values
that can be read and written, the ways through a layer that circuits take apart, and what a pass costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ioi_mamba.model.portable import portable
from ioi_mamba.model.sites import MODEL_SITES, Hooks, Site

SCAN = "scan"
"""The stage of a layer's pass in which its recurrence runs; every family has it."""


def at(root: Any, path: str) -> Any:
    """What lies at a dotted path of a module tree; "" is its root."""
    for name in path.split(".") if path else ():
        root = getattr(root, name)
    return root


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
        positions = dict.fromkeys(("pos", "target", "source"), n_positions)
        sizes = {**self.letters, **positions, "batch": batch, "K-1": self.conv_width - 1}
        return tuple(sizes[letter] for letter in site.shape.split())


@portable
class Tree(NamedTuple):
    """Where a model of transformers has its parts: paths from the model.

    Attributes:
        blocks, embeddings, last_norm, head: The paths.
        embedded: The entry of the config by which the embeddings are multiplied; None for none.
        scaled: The entry of the config by which the head's output is multiplied, or "/name", divided.
        returns: How many values a block returns: 0, the stream itself, or a tuple of so many, the stream first.
    """

    blocks: str
    embeddings: str
    last_norm: str
    head: str
    embedded: str | None = None
    scaled: str | None = None
    returns: int = 0


@portable
class End(NamedTuple):
    """Where a site's value goes into a module or comes out of it.

    Attributes:
        path: The module's path from its block; "" for the block itself.
        side: "input" or "output"; of several values the first.
        times: The entry of the config by which what is there is multiplied to give the site's value; None for none.
        added: Modules that run before it and whose outputs are added to its own.
    """

    path: str
    side: Literal["input", "output"]
    times: str | None = None
    added: tuple[str, ...] = ()


@portable
class Writer(NamedTuple):
    """A sub-block that reads the residual stream and adds to it: a node of graphs.

    Attributes:
        name: "mamba", "attn" or "mlp".
        reads: The site of its own copy of the stream.
        adds: The site of what it adds.
    """

    name: str
    reads: str
    adds: str


MAMBA_WRITER = Writer("mamba", "layer_input", "out_proj")
EXPERTS_LIMIT = ("gradients through experts in float64", "the product of experts in torch takes float32 and below")
CACHE_LIMIT = (
    "text with a cache equal to text without one, where the ends of delta matter",
    "transformers leaves these ends out in the steps of a generation with a cache; both are served as they are",
)

ATTENTION_WRITER = Writer("attn", "attn_in", "attn_out")
MLP_WRITER = Writer("mlp", "mlp_in", "mlp_out")


@portable
@dataclass(frozen=True, eq=False)
class Block:
    """A kind of block.

    Attributes:
        sites: By name, in the order in which a pass reaches them; sites of one stage are served together.
        ends: Of the sites that a module takes or gives, where.
        writers: Its sub-blocks in order; those of an inner tuple read the same stream side by side.
        mixer: The path of its state-space mixer; None where it has none.
        layer_pass: The class of a pass through it, made of (family, block, model, layer, alone).
        attends: Whether a position sees earlier ones otherwise than by convolution and state, as in attention.
    """

    sites: Mapping[str, Site]
    ends: Mapping[str, End]
    writers: tuple[tuple[Writer, ...], ...]
    mixer: str | None
    layer_pass: type[Any]
    attends: bool = False

    def stages(self) -> list[str]:
        """The stages of a pass through it, in order."""
        return list(dict.fromkeys(site.stage for site in self.sites.values()))

    def all_writers(self) -> list[Writer]:
        """Its sub-blocks, one after the other."""
        return [writer for group in self.writers for writer in group]


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
class Mixer(NamedTuple):
    """A kind of state-space mixer: what is inside it, whatever block it stands in.

    Attributes:
        sites: The sites inside it, in order.
        ends: Of those that a module takes or gives, where; paths from the mixer.
        layer_pass: The class of a pass through a block that has it, see `Block`.
        operations: The labels by which nnsight finds the calls inside it, see `families.check_labels`.
        recurrence_terms: (decay, drive) of (A_bar, B_bar, x), each as wide as h: h_t = decay_t h_(t-1) + drive_t.
        unrolled: M [batch, channel, target, source] with y = M x, of (delta, A, B, C, channels): channels of a Mamba-1, heads
            of a Mamba-2, each with one decay at a position and column.
        flow_read_out: y in which what comes from each source to each target counts so often, of (weight, x, delta, A, B, C)
            with weight [batch, H, target, source], or one for all channels, [batch, 1, target, source].
        flow_products: The derivative of <gradient, y> by these weights, of (gradient, x, delta, A, B, C).
        parts: Its parts, in the order of tables, of (conv width).
        row_floats: How many numbers one more pair takes in a pass, of (sizes, positions, kind of pass); see `memory.py`.
    """

    sites: Sequence[Site]
    ends: Mapping[str, End]
    layer_pass: type[Any]
    operations: tuple[str, ...]
    recurrence_terms: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    unrolled: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    flow_read_out: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    flow_products: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    parts: Callable[[int], tuple[Part, ...]]
    row_floats: Callable[[Sizes, int, str], float]


@portable
@dataclass(frozen=True, eq=False)
class Family:
    """A family of models.

    Attributes:
        name: Its `model_type` in config.json.
        label: In sentences.
        published: Ids of checkpoints, to be named where an unknown name is near; the one that is meant most, first.
        tree: Where its parts are in the module tree.
        mixer: The kind of its state-space mixers.
        kinds: The kinds of block that its models can have, by the name that `blocks` gives.
        blocks: The kind of each block, of (config).
        config_names: The entries of its config that say how large it is.
        sizes: The sizes of (config).
        refusal: Why a config of this family cannot be read, in a sentence after the model's name; None where it can be.
        limits: (what, why) of what cannot be done with its models and is not told by its blocks; see `experiments.needs`.
    """

    name: str
    label: str
    published: tuple[str, ...]
    tree: Tree
    mixer: Mixer
    kinds: Mapping[str, Block]
    blocks: Callable[[Any], Sequence[str]]
    config_names: tuple[str, ...]
    sizes: Callable[[Any], Sizes]
    refusal: Callable[[Mapping[str, Any]], str | None]
    limits: tuple[tuple[str, str], ...] = ()

    def block(self, config: Any, layer: int) -> Block:
        """The kind of one block of a model of this config."""
        return self.kinds[self.blocks(config)[layer]]

    @property
    def sites(self) -> dict[str, Site]:
        """The sites of all its kinds of block, by name."""
        return {name: site for kind in self.kinds.values() for name, site in kind.sites.items()}

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
        of_blocks = tuple(self.kinds[kind].sites for kind in self.blocks(config))
        return Hooks(of_blocks, n_positions, self.sizes(config).conv_width)
