"""Dictionaries: sparse autoencoders and transcoders, read from files of others, written, and trained.

A dictionary of features is linear maps with an activation between them:

    f = activation((u - shift) W_enc + b_enc)          value is near f W_dec + b_dec

`Dictionary` is ours; whatever else has `encode` and `decode` serves as well. `channels` and `principal_components` are
dictionaries without error, to compare features with.

Training is our own few lines, a TopK autoencoder (Gao et al., arXiv 2406.04093). The trainer of `eai-sparsify` takes the
outputs of named modules, and what is inside a mixer is in none; its files are read here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ioi_mamba.errors import InputError
from ioi_mamba.files import written_whole
from ioi_mamba.model.families import hooks_of
from ioi_mamba.model.jobs import call
from ioi_mamba.model.memory import rows_per_pass
from ioi_mamba.model.portable import portable
from ioi_mamba.passes.forward import forward
from ioi_mamba.passes.sweep import Progress
from ioi_mamba.tasks.base import Pairs

CONFIG = "cfg.json"
WEIGHTS = ("sae_weights.safetensors", "sae.safetensors")
"""The files of SAELens and of sparsify, beside CONFIG."""
_BATCH, _RATE, _IDLE = 512, 2e-3, 100
"""Rows of a step, the learning rate, and after how many steps without use a feature is revived."""


@portable
@dataclass(frozen=True, eq=False)
class Dictionary:
    """A sparse autoencoder or a transcoder.

    Attributes:
        W_enc: Float[width read, feature].
        b_enc: Float[feature].
        W_dec: Float[feature, width].
        b_dec: Float[width].
        shift: What is taken off before encoding, Float[width read]; None: nothing.
        k: How many features are active at a time, the largest; None: all.
        threshold: Below which a feature is 0, Float[feature] (JumpReLU); None: 0.
        linear: Activations are the sums themselves, also negative ones.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    shift: Tensor | None = None
    k: int | None = None
    threshold: Tensor | None = None
    linear: bool = False

    def encode(self, value: Tensor) -> Tensor:
        """Activations [..., feature] of a value [..., width read]."""
        if self.shift is not None:
            value = value - self.shift.to(value)
        sums = value @ self.W_enc.to(value) + self.b_enc.to(value)
        if self.linear:
            return sums
        active = sums.relu()
        if self.threshold is not None:
            active = active * (sums > self.threshold.to(value).relu())
        if self.k is not None:
            largest = active.topk(self.k, dim=-1)
            active = torch.zeros_like(active).scatter(-1, largest.indices, largest.values)
        return active

    def decode(self, activations: Tensor) -> Tensor:
        """The value [..., width] that activations [..., feature] give."""
        return activations @ self.W_dec.to(activations) + self.b_dec.to(activations)


def channels(width: int) -> Dictionary:
    """The channels of a value themselves, as features that leave no error."""
    one, none = torch.eye(width), torch.zeros(width)
    return Dictionary(one, none, one, none, linear=True)


def principal_components(values: Tensor) -> Dictionary:
    """The principal components of values [row, width], the strongest first, as features that leave no error."""
    values = values.double()
    mean = values.mean(0)
    # Of so many rows the covariance is small; its eigenvectors come in rising order.
    _, vectors = torch.linalg.eigh((values - mean).T @ (values - mean))
    vectors = vectors.flip(1)
    signs = vectors.gather(
        0, vectors.abs().argmax(0, keepdim=True)
    ).sign()  # one of two, so that they are the same again
    vectors, mean = (vectors * signs).float(), mean.float()
    return Dictionary(vectors, torch.zeros(len(mean)), vectors.T.contiguous(), mean, shift=mean, linear=True)


def values_of(model: Any, pairs: Pairs, names: Sequence[str]) -> list[dict[str, dict[str, Tensor]]]:
    """Values of hooks by layout, side ("clean", "corrupted") and name, each Float32[pair, pos, width], as one job."""
    parts = [part.without_text() for part in pairs.layouts()]
    return call(model, _values, parts, list(names))


def _values(model, parts: list[Pairs], names: list[str], *, progress=None) -> list[dict[str, dict[str, Tensor]]]:
    found = []
    for part in parts:
        rows, sides = rows_per_pass(model, part.clean.shape[1], "parts"), {}
        for side, tokens in (("clean", part.clean), ("corrupted", part.corrupted)):
            with torch.no_grad():
                got = [
                    forward(model, some, reads=names, logits_at=some[:, :0], own_scan=True)
                    for some in tokens.split(rows)
                ]
            sides[side] = {name: torch.cat([each[name] for each in got]).float().flatten(2).cpu() for name in names}
        found.append(sides)
    return found


def activations(values: Sequence[Mapping[str, Mapping[str, Tensor]]], name: str) -> Tensor:
    """What `values_of` read of a hook at every token of the clean and the corrupted prompts, [token, width].

    A prompt that is there several times counts as often.
    """
    return torch.cat([side[name].flatten(0, 1) for sides in values for side in sides.values()])


def train_dictionary(
    model: Any,
    pairs: Pairs,
    layer: int,
    *,
    site: str = "out_proj",
    reads: str | None = None,
    size: int = 512,
    k: int = 16,
    steps: int = 300,
    seed: int = 27,
    progress: Progress | None = None,
) -> Dictionary:
    """A TopK dictionary of a site's values on these prompts.

    Args:
        model: As `open_model` gives it.
        pairs: Prompts; every token of the clean and the corrupted ones is an example.
        layer: The block.
        site: The site whose value is split.
        reads: Of a transcoder, the site that is encoded; None: an autoencoder.
        size: How many features.
        k: How many are active at a token.
        steps: Of Adam, on 1024 tokens each.
        seed: Of the first weights and of the order of tokens.
        progress: Called with (done, total).

    Raises:
        InputError: For a layer or site that the model does not have, and for k or a size out of range.
    """
    names = [f"blocks.{layer}.hook_{name}" for name in dict.fromkeys([reads or site, site])]
    for name in names:
        hooks_of(model, pairs.clean.shape[1]).address(name)
    values = values_of(model, pairs, names)
    inputs, targets = (activations(values, name) for name in (names[0], names[-1]))
    return trained(inputs, targets, size=size, k=k, steps=steps, seed=seed, progress=progress)


def trained(
    inputs: Tensor,
    targets: Tensor,
    *,
    size: int,
    k: int,
    steps: int,
    seed: int = 27,
    progress: Progress | None = None,
) -> Dictionary:
    """A TopK dictionary that makes targets [row, width] of inputs [row, width read]; the same tensor for an autoencoder."""
    if not 1 <= k <= size:
        raise InputError(f"k is {k} and the size {size}: of so many features 1 to {size} are active at a time.")
    if steps < 1:
        raise InputError(f"steps is {steps}, and must be at least 1.")
    generator = torch.Generator().manual_seed(seed)
    shift, middle = inputs.mean(0), targets.mean(0)
    scale_in, scale_out = ((each - each.mean(0)).norm(dim=1).mean().clamp(min=1e-12) for each in (inputs, targets))
    x, y = (inputs - shift) / scale_in, (targets - middle) / scale_out
    spread = y.pow(2).sum(1).mean()
    decoder = torch.nn.functional.normalize(torch.randn(size, y.shape[1], generator=generator), dim=1)
    encoder = (
        decoder.T if x.shape == y.shape else torch.randn(x.shape[1], size, generator=generator) / x.shape[1] ** 0.5
    )
    weights = [each.clone().requires_grad_() for each in (encoder, torch.zeros(size), decoder, torch.zeros(y.shape[1]))]
    optimizer = torch.optim.Adam(weights, lr=_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / steps)))
    idle = torch.zeros(size, dtype=torch.long)
    with torch.inference_mode(False), torch.enable_grad():
        for step in range(steps):
            rows = torch.randint(len(x), (min(_BATCH, len(x)),), generator=generator)
            one = Dictionary(*weights, k=k)
            active = one.encode(x[rows])
            error = y[rows] - one.decode(active)
            loss = error.pow(2).sum(1).mean() / spread
            used = (active > 0).any(0)
            idle = torch.where(used, 0, idle + 1)
            asleep = idle > _IDLE
            if asleep.any():
                # What sleeps learns from what is left over ("AuxK", section 2.4).
                sums = torch.where(asleep, x[rows] @ weights[0] + weights[1], 0.0).relu()
                left = error.detach() - sums @ weights[2]
                loss = loss + left.pow(2).sum(1).mean() / spread / 32
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                weights[2] /= weights[2].norm(dim=1, keepdim=True).clamp(min=1e-12)
            if progress:
                progress(step + 1, steps)
    W_enc, b_enc, W_dec, b_dec = (each.detach() for each in weights)
    return Dictionary(W_enc / scale_in, b_enc, W_dec * scale_out, b_dec * scale_out + middle, shift=shift, k=k)


def unexplained(dictionary: Any, inputs: Tensor, targets: Tensor) -> float:
    """The share of the variance of targets [row, width] that a dictionary of inputs [row, width read] leaves."""
    with torch.no_grad():
        left = targets - dictionary.decode(dictionary.encode(inputs))
    return float(left.pow(2).sum() / (targets - targets.mean(0)).pow(2).sum())


# -- files ----------------------------------------------------------------------------------------------------------


def save_dictionary(dictionary: Dictionary, directory: str | Path) -> None:
    """Write a dictionary as SAELens does: cfg.json and sae_weights.safetensors, each beside and then renamed.

    Raises InputError for a linear one, and for one that takes off before encoding what it does not add again, which such
    a file has no place for.
    """
    from safetensors.torch import save

    d, directory = dictionary, Path(directory)
    if d.linear:
        raise InputError("Channels and components are no sparse autoencoder that such a file could hold.")
    # (u - shift) W_enc + b_enc, with the shift taken into the bias.
    b_enc = d.b_enc if d.shift is None else d.b_enc - d.shift @ d.W_enc
    tensors = {"W_enc": d.W_enc, "b_enc": b_enc, "W_dec": d.W_dec, "b_dec": d.b_dec}
    if d.threshold is not None:
        tensors["threshold"] = d.threshold
    kind = "jumprelu" if d.threshold is not None else "standard" if d.k is None else "topk"
    config = {
        "architecture": kind,
        "d_in": d.W_enc.shape[0],
        "d_sae": d.W_enc.shape[1],
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {},
    }
    if d.k is not None:
        config |= {"k": d.k, "rescale_acts_by_decoder_norm": False}
    if d.W_dec.shape[1] != d.W_enc.shape[0]:
        config["d_out"] = d.W_dec.shape[1]
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in (
        (WEIGHTS[0], save({name: each.detach().float().cpu().contiguous() for name, each in tensors.items()})),
        (CONFIG, json.dumps(config, indent=1).encode()),
    ):
        with written_whole(directory / name) as beside:
            beside.write_bytes(data)


def load_dictionary(path: str | Path) -> Dictionary:
    """Read a dictionary from a directory of SAELens (cfg.json, sae_weights.safetensors) or of sparsify (sae.safetensors).

    Of SAELens the kinds standard, topk, jumprelu and transcoders of them, without normalization at run time; of sparsify
    TopK autoencoders and transcoders. What a skip connection of a transcoder gives is left to the error.

    Raises:
        InputError: For a directory without these files, another kind, and weights that do not fit each other.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    weights = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if weights is None or not (path / CONFIG).is_file():
        raise InputError(f"{str(path)!r} holds no dictionary: it must have {CONFIG} and {' or '.join(WEIGHTS)}.")
    try:
        config = json.loads((path / CONFIG).read_text())
        tensors = {name: value.float() for name, value in load_file(weights).items()}
        found = (_of_sparsify if weights.name == WEIGHTS[1] else _of_saelens)(config, tensors, path)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{str(path)!r} holds no dictionary that can be read ({error}).") from None
    _check(found, path)
    return found


def _of_sparsify(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> Dictionary:
    if config.get("activation", "topk") != "topk":
        raise InputError(f"{str(path)!r} has the activation {config['activation']!r}, and only topk can be read.")
    transcodes = bool(config.get("transcode", False))
    return Dictionary(
        tensors["encoder.weight"].T.contiguous(),
        tensors["encoder.bias"],
        tensors["W_dec"],
        tensors["b_dec"],
        shift=None if transcodes else tensors["b_dec"],
        k=int(config["k"]),
    )


def _of_saelens(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> Dictionary:
    kind = config.get("architecture", "standard")
    *_, activation = kind.rpartition("_") if "transcoder" not in kind else ("standard",)
    activation = "jumprelu" if kind.startswith("jumprelu") else activation
    if activation not in ("standard", "topk", "jumprelu"):
        raise InputError(f"{str(path)!r} is of the kind {kind!r}, and standard, topk and jumprelu can be read.")
    for name, plain in (("normalize_activations", "none"), ("reshape_activations", "none")):
        if config.get(name, plain) not in (plain, None):
            raise InputError(f"{str(path)!r} has {name} {config[name]!r}: fold it into the weights first.")
    W_dec, scale = tensors["W_dec"], None
    if config.get("rescale_acts_by_decoder_norm"):
        scale = W_dec.norm(dim=1)
    shifted = "transcoder" not in kind and config.get("apply_b_dec_to_input", True)
    k = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k")) if activation == "topk" else None
    return Dictionary(
        tensors["W_enc"] if scale is None else tensors["W_enc"] * scale,
        tensors["b_enc"] if scale is None else tensors["b_enc"] * scale,
        W_dec if scale is None else W_dec / scale[:, None],
        tensors["b_dec"],
        shift=tensors["b_dec"] if shifted else None,
        k=None if k is None else int(k),
        threshold=tensors["threshold"] if activation == "jumprelu" else None,
    )


def _check(found: Dictionary, path: Path) -> None:
    """Raise InputError where the weights do not fit each other."""
    width, n = found.W_enc.shape
    shapes = {
        "b_enc": (found.b_enc, (n,)),
        "W_dec": (found.W_dec, (n, found.b_dec.shape[0])),
        "threshold": (found.threshold, (n,)),
        "b_dec taken off before encoding": (found.shift, (width,)),
    }
    for name, (value, shape) in shapes.items():
        if value is not None and tuple(value.shape) != shape:
            raise InputError(f"{str(path)!r}: {name} has the shape {tuple(value.shape)}, and {shape} would fit W_enc.")
    if found.k is not None and not 1 <= found.k <= n:
        raise InputError(f"{str(path)!r}: k is {found.k}, of {n} features.")
