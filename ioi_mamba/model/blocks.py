"""Kinds of block, put together from what each sub-block of them has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ioi_mamba.model.family import ATTENTION_WRITER, MAMBA_WRITER, MLP_WRITER, Block, End, Mixer, Writer
from ioi_mamba.model.layer_pass import LayerPass
from ioi_mamba.model.sites import Site

STREAM = "batch pos D"


class SubBlock(NamedTuple):
    """What a sub-block has: its sites in order, where those of modules are, and how it reads and writes the stream.

    mixer: the path of its state-space mixer; None where it has none. layer_pass: see `Block`.
    """

    sites: Sequence[Site]
    ends: dict[str, End]
    writer: Writer
    mixer: str | None = None
    layer_pass: type[Any] = LayerPass


def _place(end: End) -> str:
    inside = ".".join(filter(None, ("layers[i]", end.path, end.side)))
    return inside if end.times is None else f"{inside} * {end.times}"


def mamba(mixer: Mixer, *, norm: str, path: str, times: str | None = None) -> SubBlock:
    """A state-space mixer behind its norm. path: the mixer's; times: what multiplies its output, in the config."""
    ends = {
        "layer_input": End(norm, "input"),
        "normalized_input": End(norm, "output"),
        **{name: end._replace(path=f"{path}.{end.path}") for name, end in mixer.ends.items()},
        "out_proj": End(path, "output", times),
    }
    sites = [
        Site(
            "layer_input",
            "norm_input",
            STREAM,
            _place(ends["layer_input"]),
            "the layer's own copy of resid_pre; edits reach this layer only",
        ),
        Site("normalized_input", "norm_output", STREAM, _place(ends["normalized_input"]), "after RMSNorm"),
        *mixer.sites,
        Site("out_proj", "mixer_output", STREAM, _place(ends["out_proj"]), "what the layer adds to the stream"),
    ]
    return SubBlock(sites, ends, MAMBA_WRITER, path, mixer.layer_pass)


def _plain(name: str, writer: Writer, norm: str, path: str, times: str | None) -> SubBlock:
    ends = {writer.reads: End(norm, "input"), writer.adds: End(path, "output", times)}
    sites = [
        Site(writer.reads, f"{name}_input", STREAM, _place(ends[writer.reads]), f"the {name}'s own copy of the stream"),
        Site(writer.adds, f"{name}_output", STREAM, _place(ends[writer.adds]), f"what the {name} adds to the stream"),
    ]
    return SubBlock(sites, ends, writer)


def attention(*, norm: str, path: str, times: str | None = None) -> SubBlock:
    """Attention behind its norm."""
    return _plain("attention", ATTENTION_WRITER, norm, path, times)


def mlp(*, norm: str, path: str, times: str | None = None) -> SubBlock:
    """An MLP, or a mixture of experts, behind its norm."""
    return _plain("MLP", MLP_WRITER, norm, path, times)


def block(*subs: SubBlock | Sequence[SubBlock], attends: bool = False) -> Block:
    """A block of sub-blocks, one after the other; those of an inner list read the same stream, side by side.

    attends: whether there is attention in it that is no sub-block of its own.
    """
    groups = [[sub] if isinstance(sub, SubBlock) else list(sub) for sub in subs]
    ends = {"resid_pre": End("", "input"), "resid_post": End("", "output")}
    sites = [Site("resid_pre", "block_input", STREAM, _place(ends["resid_pre"]), "residual stream entering the layer")]
    for number, group in enumerate(groups):
        for sub in group:
            sites += sub.sites
            ends |= sub.ends
        if number == 0 and len(groups) > 1:
            sites.append(
                Site(
                    "resid_mid", sites[-1].stage, STREAM, "not in a module: a sum", "the stream between the sub-blocks"
                )
            )
    added = [sub.writer.adds for group in groups for sub in group]
    sites.append(
        Site("resid_post", "block_output", STREAM, _place(ends["resid_post"]), " + ".join(["resid_pre", *added]))
    )
    writers = tuple(tuple(sub.writer for sub in group) for group in groups)
    attends = attends or any(sub.writer == ATTENTION_WRITER for group in groups for sub in group)
    mixed = [sub for group in groups for sub in group if sub.mixer is not None]
    mixer, layer_pass = (mixed[0].mixer, mixed[0].layer_pass) if mixed else (None, LayerPass)
    return Block({site.name: site for site in sites}, ends, writers, mixer, layer_pass, attends)
