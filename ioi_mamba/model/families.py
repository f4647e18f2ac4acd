"""The families of models that can be taken apart, and what is asked of an open model by way of its family's record."""

from __future__ import annotations

from typing import Any

from ioi_mamba.errors import InputError
from ioi_mamba.model.family import Family, Sizes
from ioi_mamba.model.jobs import config_of
from ioi_mamba.model.mamba.record import MAMBA
from ioi_mamba.model.sites import Hooks

FAMILIES: dict[str, Family] = {family.name: family for family in (MAMBA,)}


def family_of(model) -> Family:
    """The record of the model's family. Raises InputError for a model of none of them."""
    kind = config_of(model).model_type
    if kind not in FAMILIES:
        known = " or ".join(family.label for family in FAMILIES.values())
        raise InputError(f"A {kind} model has none of these sites: open a {known} model.")
    return FAMILIES[kind]


def sizes_of(model) -> Sizes:
    """How large the model is."""
    return family_of(model).sizes(config_of(model))


def hooks_of(model, n_positions: int) -> Hooks:
    """The hook names of the model on prompts of so many positions."""
    return family_of(model).hooks(config_of(model), n_positions)


def open_layer(model, layer: int, *, alone: bool) -> Any:
    """A pass through one layer, for use inside a trace: a `LayerPass` of the model's family.

    alone: the trace has one invoke and no cache, so that what is replaced need not run.
    """
    family = family_of(model)
    return family.layer_pass(family, model, layer, alone=alone)


def at(model, path: str) -> Any:
    """What lies at a dotted path of the model's tree."""
    for name in path.split("."):
        model = getattr(model, name)
    return model


def blocks_of(model) -> Any:
    """The model's blocks, in order."""
    return at(model, family_of(model).tree.blocks)


def head_of(model) -> Any:
    """What turns the last norm's output into logits."""
    return at(model, family_of(model).tree.head)


def check_labels(model) -> None:
    """Touch `.source` of every mixer and verify that its operation labels are there.

    nnsight instruments a module when its source is first touched; doing so before the first trace is what makes
    the operations reachable. Raises RuntimeError naming the label that moved.
    """
    family = family_of(model)
    for i, block in enumerate(blocks_of(model)):
        source = at(block, family.tree.mixer).source
        for label in family.operations:
            try:
                getattr(source, label)
            except AttributeError:
                import transformers

                raise RuntimeError(
                    f"Operation {label!r} is not in layer {i}'s mixer under transformers {transformers.__version__}: "
                    "the label moved; `ioi-mamba doctor` says which versions were tested, take one of them."
                ) from None
