"""Falcon-Mamba: a Mamba-1 with norms on delta_1, B and C (arXiv 2410.05355)."""

from __future__ import annotations

from ioi_mamba.model import blocks
from ioi_mamba.model.families.mamba import CONFIG_NAMES, TREE, alike, sizes
from ioi_mamba.model.family import Family
from ioi_mamba.model.mamba import kind

_MIXER = kind.NORMED_MIXER

FALCON_MAMBA = Family(
    name="falcon_mamba",
    label="Falcon-Mamba",
    published=("tiiuae/falcon-mamba-7b",),
    tree=TREE,
    kinds={"mamba": blocks.block(blocks.mamba(_MIXER, norm="norm", path="mixer"))},
    blocks=alike,
    config_names=CONFIG_NAMES,
    sizes=sizes,
    mixer=_MIXER,
    refusal=kind.refusal,
)
