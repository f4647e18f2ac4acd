"""Where names pass through a model: the layer that everything goes through, and how late it takes a name in."""

from __future__ import annotations

import torch
from torch import Tensor

from ioi_mamba.errors import InputError
from ioi_mamba.model.families import layers_with, sizes_of
from ioi_mamba.passes.metrics import effect
from ioi_mamba.passes.ranges import usable
from ioi_mamba.passes.sweep import layer_count, swept_logit_diffs
from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import Pairs
from ioi_mamba.tasks.draws import drawn_apart
from ioi_mamba.tasks.prompts import is_name


def find_layer(model, pairs: Pairs | None = None) -> int:
    """The bottleneck: of the layers after 0, the one whose resampled input has the largest effect (4.1.1).

    Measured on 8 pairs of each corruption of the paper's templates with equal positions, or, where `pairs` are of a
    task without names, on up to 40 of these: of a layer, the largest |1 - normalized logit diff| before the last
    position (where every layer can write the answer straight to the output), mean over corruptions. Raises InputError
    for a model of one layer, and where no pair has a range.
    """
    if layer_count(model) < 2:
        raise InputError("The bottleneck is looked for after layer 0; this model has no other layer.")
    given = _sample(model) if pairs is None or any(map(is_name, pairs.roles)) else pairs
    # A position is one word only in pairs of one layout.
    found = usable(model, max(given.layouts(), key=len)).pairs
    pairs = found[:40] if given is pairs else found
    layers = [layer for layer in layers_with(model, "layer_input") if layer > 0]
    positions = list(range(pairs.clean.shape[1] - 1))
    effects = _by_corruption(
        pairs, effect(**swept_logit_diffs(model, pairs, "layer_input", layers=layers, positions=positions))
    )
    return layers[int(torch.stack([one.amax(-1) for one in effects.values()]).mean(0).argmax())]


def find_offset(model, layer: int) -> int:
    """How many tokens after a name `layer` takes it in: where its resampled `ssm_input` has the largest effect.

    As far as the convolution reaches, 0 to K-1; |1 - normalized logit diff|, mean over the corruptions. Raises InputError
    where no pair has a range.
    """
    pairs, reach = usable(model, _sample(model)).pairs, sizes_of(model).conv_width
    names = pairs.first_difference
    positions = list(range(int(names.min()), min(int(names.max()) + reach, pairs.clean.shape[1])))
    effects = effect(**swept_logit_diffs(model, pairs, "ssm_input", layers=[layer], positions=positions))[0]
    # Of each pair from its own name's place, which is another one in another layout; past the end there is no effect.
    after = (names - positions[0] + torch.arange(reach)[:, None]).clamp(max=len(positions))
    by_offset = _by_corruption(pairs, torch.cat([effects, torch.zeros_like(effects[:1])]).gather(0, after))
    return int(torch.stack(list(by_offset.values())).mean(0).argmax())


def _sample(model) -> Pairs:
    return drawn_apart(model.tokenizer, 8, 27, [(ioi.ALIGNED_TEMPLATES, [c]) for c in ioi.CORRUPTIONS])


def _by_corruption(pairs: Pairs, effects: Tensor) -> dict[str, Tensor]:
    """|mean of effects [..., pair]| over the pairs of each corruption, Float[...]."""
    corruptions = pairs.labels.get("corruption", ("all",) * len(pairs))
    here = {c: torch.tensor([other == c for other in corruptions]) for c in dict.fromkeys(corruptions)}
    return {c: effects[..., rows].mean(-1).abs() for c, rows in here.items()}
