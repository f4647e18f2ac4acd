"""The families of models that can be taken apart, and what is asked of an open model by way of its family's record."""

from __future__ import annotations

from typing import Any

from ioi_mamba.errors import InputError
from ioi_mamba.model.families.bamba import BAMBA
from ioi_mamba.model.families.falcon_h1 import FALCON_H1
from ioi_mamba.model.families.falcon_mamba import FALCON_MAMBA
from ioi_mamba.model.families.granite import GRANITE
from ioi_mamba.model.families.jamba import JAMBA
from ioi_mamba.model.families.mamba import MAMBA
from ioi_mamba.model.families.mamba2 import MAMBA2
from ioi_mamba.model.families.nemotron_h import NEMOTRON_H
from ioi_mamba.model.families.zamba import ZAMBA
from ioi_mamba.model.families.zamba2 import ZAMBA2
from ioi_mamba.model.family import Block, Family, Sizes, at
from ioi_mamba.model.jobs import config_of
from ioi_mamba.model.sites import Hooks

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (MAMBA, FALCON_MAMBA, JAMBA, MAMBA2, BAMBA, GRANITE, FALCON_H1, NEMOTRON_H, ZAMBA, ZAMBA2)
}


def family_of(model) -> Family:
    """The record of the model's family. Raises InputError for a model of none of them."""
    kind = config_of(model).model_type
    if kind not in FAMILIES:
        raise InputError(f"A {kind} model has none of these sites: open one of {', '.join(FAMILIES)}.")
    return FAMILIES[kind]


def sizes_of(model) -> Sizes:
    """How large the model is."""
    return family_of(model).sizes(config_of(model))


def block_of(model, layer: int) -> Block:
    """The kind of one of the model's blocks."""
    return family_of(model).block(config_of(model), layer)


def hooks_of(model, n_positions: int) -> Hooks:
    """The hook names of the model on prompts of so many positions."""
    return family_of(model).hooks(config_of(model), n_positions)


def layers_with(model, site: str) -> list[int]:
    """The layers whose blocks have a site, named with or without its index."""
    name = site.split(".")[0]
    return [i for i, block in enumerate(hooks_of(model, 1).blocks) if name in block]


def mixer_layer(model, layer: Any) -> int:
    """A layer with a state-space mixer, counted from the first. Raises InputError for anything else."""
    own, n_layers = layers_with(model, "h"), sizes_of(model).n_layers
    if not isinstance(layer, int) or layer not in range(-n_layers, n_layers) or layer % n_layers not in own:
        raise InputError(f"layer is {layer!r}: give one with a state-space mixer, of {', '.join(map(str, own))}.")
    return layer % n_layers


def attends(model) -> bool:
    """Whether a position sees earlier ones otherwise than by convolution and state, in any block.

    Where it does not, a pass can begin at any position, from a constant-size past.
    """
    family, config = family_of(model), config_of(model)
    return any(family.kinds[kind].attends for kind in set(family.blocks(config)))


def open_layer(model, layer: int, *, alone: bool) -> Any:
    """A pass through one layer, for use inside a trace: a `LayerPass`, or what a mixer makes of it.

    alone: the trace has one invoke and no cache, so that what is replaced need not run.
    """
    family, block = family_of(model), block_of(model, layer)
    return block.layer_pass(family, block, model, layer, alone=alone)


def blocks_of(model) -> Any:
    """The model's blocks, in order."""
    return at(model, family_of(model).tree.blocks)


def head_of(model) -> Any:
    """What turns the last norm's output into logits."""
    return at(model, family_of(model).tree.head)


def skip(model, layer: int, stream: Any) -> None:
    """Leave a block out, inside a trace: what comes out of it is this stream."""
    returns = family_of(model).tree.returns
    blocks_of(model)[layer].skip((stream, *[None] * (returns - 1)) if returns else stream)


def check_labels(model) -> None:
    """Touch `.source` of every mixer and verify that its operation labels are there.

    nnsight instruments a module when its source is first touched; doing so before the first trace is what makes
    the operations reachable. Raises RuntimeError naming the label that moved.
    """
    family = family_of(model)
    for i, block in enumerate(blocks_of(model)):
        path = block_of(model, i).mixer
        if path is None:
            continue
        source = at(block, path).source
        for label in family.mixer.operations:
            try:
                getattr(source, label)
            except AttributeError:
                import transformers

                raise RuntimeError(
                    f"Operation {label!r} is not in layer {i}'s mixer under transformers {transformers.__version__}: "
                    "the label moved; `ioi-mamba doctor` says which versions were tested, take one of them."
                ) from None
