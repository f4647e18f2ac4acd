"""Every named value inside a Mamba, and where nnsight finds it. The one file with operation labels.

A *site* is a value of one layer, named as MambaLens names it: `blocks.{layer}.hook_{site}`. Two families take an
index: `hook_h.{pos}` (the state after token pos) and `hook_conv_slice.{s}` (one tap of the convolution, s in
-(K-1)..0). Three hooks belong to the whole model: `hook_embed`, `hook_norm`, `hook_logits`.

Sites are listed in the order a forward pass reaches them. Sites of one *stage* are served together by one place
in the module tree; a pass visits the stages in order (see `mixer.py`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import NamedTuple

from ioi_mamba.errors import InputError
from ioi_mamba.model.portable import portable

# Operations inside MambaMixer.forward as nnsight's `.source` labels them, in every transformers that pyproject.toml allows.
# `check_labels` verifies them when a model is opened, so that a moved label is named and never silently dead.
CONV_OP = "causal_conv1d_fn_0"
SCAN_OP = "mamba_selective_scan_0"
# What stands in their place in a step of a generation with a cache.
STEP_CONV_OP = "causal_conv1d_update_0"
STEP_SCAN_OP = "mamba_selective_state_update_0"
OPS = (CONV_OP, SCAN_OP, STEP_CONV_OP, STEP_SCAN_OP)

STAGES = (
    "block_input",
    "norm_input",
    "norm_output",
    "in_proj",
    "conv",
    "x_proj",
    "scan",
    "mixer_output",
    "block_output",
)


@portable
class Site(NamedTuple):
    """One named value of a layer."""

    name: str  # as in `blocks.{layer}.hook_{name}`
    stage: str  # which of STAGES serves it
    shape: str  # in letters of the glossary
    place: str  # where it lives in the transformers module tree
    meaning: str


_SITES = (
    Site("resid_pre", "block_input", "batch pos D", "layers[i].input", "residual stream entering the layer"),
    Site(
        "layer_input",
        "norm_input",
        "batch pos D",
        "layers[i].norm.input",
        "the layer's own copy of resid_pre; edits reach this layer only",
    ),
    Site("normalized_input", "norm_output", "batch pos D", "layers[i].norm.output", "after RMSNorm"),
    Site("in_proj", "in_proj", "batch pos E", "mixer.in_proj.output, first half", "SSM branch, before the conv"),
    Site("skip", "in_proj", "batch pos E", "mixer.in_proj.output, second half", "gate branch, before SiLU"),
    Site(
        "conv_start",
        "conv",
        "batch K-1 E",
        "not in the module: zeros",
        "conv inputs before the first position (not in MambaLens)",
    ),
    Site(
        "conv_slice",
        "conv",
        "batch pos E",
        "weight[:, K-1+s] * in_proj shifted by |s|",
        "one tap of the convolution, before bias and SiLU; takes an index s (not in MambaLens)",
    ),
    Site(
        "conv",
        "conv",
        "batch pos E",
        f"recomputed from {CONV_OP}.inputs",
        "conv output after bias, before SiLU",
    ),
    Site("ssm_input", "conv", "batch pos E", f"{CONV_OP}.output", "x, the input of the SSM"),
    Site("delta_1", "x_proj", "batch pos R", "mixer.x_proj.output[..., :R]", "low-rank delta"),
    Site("B", "x_proj", "batch pos N", "mixer.x_proj.output[..., R:R+N]", "B_t (equation 8)"),
    Site("C", "x_proj", "batch pos N", "mixer.x_proj.output[..., R+N:]", "C_t (equation 9)"),
    Site(
        "delta_2",
        "scan",
        "batch pos E",
        f"from {SCAN_OP}.inputs",
        "projected delta with its bias, before softplus",
    ),
    Site("delta", "scan", "batch pos E", f"from {SCAN_OP}.inputs", "softplus(delta_2) (equation 10)"),
    Site("A", "scan", "E N", f"{SCAN_OP}.inputs", "-exp(A_log)"),
    Site("A_bar", "scan", "batch pos E N", f"from {SCAN_OP}.inputs", "exp(delta A) (equation 7)"),
    Site("B_bar", "scan", "batch pos E N", f"from {SCAN_OP}.inputs", "delta B (equation 8)"),
    Site("h_start", "scan", "batch E N", "not in the module: zeros", "the state before the first position"),
    Site(
        "h",
        "scan",
        "batch pos E N",
        f"from {SCAN_OP}.inputs",
        "states after each token (equation 5); with an index, one of them [batch E N]",
    ),
    Site("y", "scan", "batch pos E", f"from {SCAN_OP}.inputs", "C h (equation 6), before D x"),
    Site("ssm_output", "scan", "batch pos E", f"from {SCAN_OP}.inputs", "y + D x"),
    Site("after_skip", "scan", "batch pos E", f"{SCAN_OP}.output", "ssm_output * SiLU(skip)"),
    Site(
        "out_proj",
        "mixer_output",
        "batch pos D",
        "layers[i].mixer.output",
        "what the layer adds to the stream",
    ),
    Site("resid_post", "block_output", "batch pos D", "layers[i].output", "resid_pre + out_proj"),
)

SITES: dict[str, Site] = {site.name: site for site in _SITES}
MODEL_SITES = {
    "embed": "backbone.embeddings.output",
    "norm": "backbone.norm_f.output",
    "logits": "output.logits",
}

_HOOK = re.compile(r"(?:blocks\.(?P<layer>-?\d+)\.)?hook_(?P<name>[A-Za-z_0-9]+?)(?:\.(?P<index>-?\d+))?")


@portable
class Address(NamedTuple):
    """A parsed hook name. `layer` is None for the three hooks of the whole model."""

    layer: int | None
    site: str
    index: int | None  # type: ignore[assignment]  # tuple's own `index` is not used


def _known_names(n_layers: int) -> list[str]:
    names = [f"hook_{name}" for name in MODEL_SITES]
    for site in SITES:
        names += [f"blocks.{i}.hook_{site}" for i in range(n_layers)]
    return names


def parse(hook: str, n_layers: int, n_positions: int, conv_width: int) -> Address:
    """The address of a MambaLens hook name.

        >>> parse("blocks.3.hook_h.7", n_layers=8, n_positions=20, conv_width=4)
        Address(layer=3, site='h', index=7)
        >>> parse("blocks.3.hook_B_baar", n_layers=8, n_positions=20, conv_width=4)
        Traceback (most recent call last):
        ioi_mamba.errors.InputError: Unknown hook name 'blocks.3.hook_B_baar': did you mean 'blocks.3.hook_B_bar'? `ioi-mamba sites` lists them all.

    Negative layers and positions count from the end. Raises InputError for an unknown name (with the nearest known one),
    a layer, position or slice out of range.
    """
    if not isinstance(hook, str):
        raise InputError(f"{hook!r} is no hook name: `ioi-mamba sites` lists them all.")
    match = _HOOK.fullmatch(hook)
    address = None
    if match:
        layer, name = match["layer"], match["name"]
        index = None if match["index"] is None else int(match["index"])
        known = name in MODEL_SITES if layer is None else name in SITES
        takes_index = name in ("h", "conv_slice")
        if known and (takes_index or index is None) and not (name == "conv_slice" and index is None):
            address = Address(None if layer is None else int(layer), name, index)
    if address is None:
        examples = [*_known_names(n_layers), "blocks.0.hook_h.0", "blocks.0.hook_conv_slice.-1"]
        nearest = difflib.get_close_matches(hook, examples, n=1, cutoff=0.0)[0]
        raise InputError(f"Unknown hook name {hook!r}: did you mean {nearest!r}? `ioi-mamba sites` lists them all.")
    if address.layer is not None:
        if not -n_layers <= address.layer < n_layers:
            raise InputError(f"{hook!r}: the model has layers 0 to {n_layers - 1}, not {address.layer}.")
        address = address._replace(layer=address.layer % n_layers)
    if address.site == "h" and address.index is not None:
        if not -n_positions <= address.index < n_positions:
            raise InputError(f"{hook!r}: the prompt has positions 0 to {n_positions - 1}, not {address.index}.")
        return address._replace(index=address.index % n_positions)
    if address.site == "conv_slice" and not -conv_width < (address.index or 0) <= 0:
        raise InputError(f"{hook!r}: conv slices are {1 - conv_width} to 0, not {address.index}.")
    return address


def expanded(names: str | Iterable[str], n_layers: int, n_positions: int, conv_width: int) -> list[str]:
    """The names with each that holds a `*` replaced by all it matches, in the order of a pass; each name once.

    Raises InputError where a pattern matches nothing.
    """
    found: dict[str, None] = {}
    for name in [names] if isinstance(names, str) else names:
        if not isinstance(name, str) or "*" not in name:
            found[name] = None
            continue
        # What counts from the end is counted from the start, as the names that are matched are.
        placed = re.sub(r"(?<=blocks\.)-\d+", lambda found: str(int(found[0]) % n_layers), name)
        placed = re.sub(r"(?<=hook_h\.)-\d+$", lambda found: str(int(found[0]) % n_positions), placed)
        pattern = re.compile(re.escape(placed).replace(r"\*", "[^.]*"))
        known = _known_names(n_layers)
        for i in range(n_layers):
            known += [f"blocks.{i}.hook_h.{p}" for p in range(n_positions)]
            known += [f"blocks.{i}.hook_conv_slice.{s}" for s in range(1 - conv_width, 1)]
        # Without its index, a conv slice is no value.
        matches = [each for each in known if pattern.fullmatch(each) and not each.endswith("hook_conv_slice")]
        if not matches:
            raise InputError(f"No hook name matches {name!r}: `ioi-mamba sites` lists them all.")
        found |= dict.fromkeys(matches)
    return list(found)


def check_labels(model) -> None:
    """Touch `.source` of every mixer and verify that its operation labels are there.

    nnsight instruments a module when its source is first touched; doing so before the first trace is what makes
    the operations reachable. Raises RuntimeError naming the label that moved.
    """
    for i, block in enumerate(model.backbone.layers):
        source = block.mixer.source
        for label in OPS:
            try:
                getattr(source, label)
            except AttributeError:
                import transformers

                raise RuntimeError(
                    f"Operation {label!r} is not in layer {i}'s mixer under transformers {transformers.__version__}: "
                    "the label moved; `ioi-mamba doctor` says which versions were tested, take one of them."
                ) from None
