"""Zamba: Mamba-1 mixers of several heads, some of which also read what shared attention makes of the stream (arXiv 2405.16712)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ioi_mamba.errors import InputError
from ioi_mamba.model import blocks
from ioi_mamba.model.families.bamba import listed
from ioi_mamba.model.families.zamba2 import EMBEDDINGS_LIMIT, write_copies
from ioi_mamba.model.family import End, Family, Part, Sizes, Tree
from ioi_mamba.model.layer_pass import LayerPass
from ioi_mamba.model.mamba import kind
from ioi_mamba.model.mamba.calls import CONV_OP, STEP_CONV_OP, Calls
from ioi_mamba.model.mamba.layer import MambaLayer
from ioi_mamba.model.scan import selective_scan

# Its forward pass calls a scan a head, in a loop; what goes into all of them and what comes out is named before and after.
X, PROJECTED, DT, BIAS, A = "hidden_states_B_C_7", "torch_split_0", "time_step_0", "time_proj_bias_0", "A_0"
SCANNED, STEP_SCANNED, LAST_STATE = "scan_output_2", "scan_output_1", "torch_stack_0"
OPERATIONS = (CONV_OP, STEP_CONV_OP, X, PROJECTED, DT, BIAS, A, SCANNED, STEP_SCANNED, LAST_STATE)


Terms = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""x, delta, A, B, C"""


def _of_heads(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Iterator[tuple[slice, Terms]]:
    """The channels of each head, and its own x, delta, A, B and C, as those of a Mamba-1 of one head."""
    width = A.shape[0] // B.shape[2]
    for head in range(B.shape[2]):
        own = slice(head * width, (head + 1) * width)
        yield own, (x[..., own], delta[..., own], A[own], B[:, :, head], C[:, :, head])


def _by_channel(value: Tensor, n_channels: int) -> Tensor:
    """B or C of heads, [batch, pos, H, N], for each channel, [batch, pos, E, N]."""
    return value.repeat_interleave(n_channels // value.shape[2], dim=2)


class _Calls(Calls):
    """What a mixer's forward pass has named of itself, taken in the order in which it gets there, each once."""

    def __init__(self, mixer: Any, alone: bool):
        Calls.__init__(self, mixer, alone)
        self.gate: Any = None  # from in_proj on
        self._seen: dict[str, Any] = {}

    def scan(self) -> Any:
        """The scans of this pass, all heads together."""
        return _Scans(self)

    def take(self, label: str) -> Any:
        """What is there at a label; those before it are taken on the way, since they cannot be had afterwards."""
        order = (X, PROJECTED, DT, BIAS, A)
        for each in order[: order.index(label) + 1]:
            if each not in self._seen:
                self._seen[each] = getattr(self.mixer.source, each).output
        return self._seen[label]

    def put(self, label: str, value: Any) -> None:
        """Put a value in the place of what was taken last."""
        self._seen[label] = getattr(self.mixer.source, label).output = value


class _Scans:
    """The scans of all heads as one: attributes as of `mamba.calls.FullScan`, but B and C [batch, pos, H, N]."""

    def __init__(self, calls: _Calls):
        self.calls, self.ran = calls, False
        x, (_, B, C), dt, bias, A_ = (calls.take(label) for label in (X, PROJECTED, DT, BIAS, A))
        H, rows, width, _ = x.shape
        if (rows, H * width) != (calls.gate.shape[0], calls.gate.shape[2]) or A_.shape[0] != H:
            raise InputError(
                "A Zamba puts heads before rows, which several invokes of one trace cannot be told apart by: use one."
            )
        joined = lambda value: value.permute(1, 3, 0, 2).flatten(2)  # [H, batch, P, pos] -> [batch, pos, E]
        self.dtype = x.dtype
        wide = torch.promote_types(x.dtype, torch.float32)
        self.x, self.delta_2 = joined(x).to(wide), joined(dt).to(wide)
        self.B, self.C = (value.permute(1, 2, 0, 3).to(wide) for value in (B, C))
        self.A, self.bias = A_.flatten(0, 1), bias.flatten().to(wide)
        module = calls.mixer._module
        if module is None:
            raise InputError(
                "This server shows values but not the model, and no call of a Zamba shows its D: open it here."
            )
        self.D = module.D.flatten().to(wide)
        kept = calls.cache.layers[module.layer_idx].recurrent_states[0] if calls.is_step else None
        self._kept = kept
        nothing = self.x.new_zeros(self.x.shape[0], *self.A.shape)
        # A copy, since the calls move the kept state on in place.
        self.start = nothing if kept is None else kept.flatten(1, 2).to(wide).clone()
        self.z: Tensor = calls.gate.to(wide)

    def _out(self) -> Any:
        self.ran = True
        return getattr(self.calls.mixer.source, STEP_SCANNED if self.calls.is_step else SCANNED)

    def output(self) -> Tensor:
        """[batch, pos, E], with D x and the gate in it."""
        return self._out().output.transpose(1, 2)

    def give(self, value: Tensor, state: Callable[[], Tensor | None]) -> None:
        """Replace the output [batch, pos, E]; `state` gives the last state [batch, E, N], or None to leave it."""
        self._out().output = value.to(self.dtype).transpose(1, 2)
        written = state()
        if written is None or self.calls.cache is None:
            return
        H = self.B.shape[2]
        if self._kept is not None:
            self._kept.copy_(written.unflatten(1, (H, -1)))
        else:
            place = getattr(self.calls.mixer.source, LAST_STATE)
            place.output = written.unflatten(1, (H, -1)).to(place.output.dtype)


class ZambaLayer(MambaLayer):
    """A pass through one block with a Mamba-1 mixer of several heads, each with a delta, B and C of its own."""

    calls = _Calls

    def _open(self, stage: str) -> None:
        values, calls = self._values, self._made_calls()
        if stage == "in_proj" or calls.gate is None:
            # Channels of x and of the gate stand by turns.
            given = self._mixer.in_proj.output.unflatten(-1, (-1, 2))
            calls.gate = given[..., 1]
            if stage == "in_proj":
                values["in_proj"], values["skip"] = given[..., 0], given[..., 1]
        if stage == "conv":
            self._call = calls.conv()
        elif stage == "x_proj":
            parts = (value.permute(1, 2, 0, 3) for value in calls.take(PROJECTED))
            values.update(zip(("delta_1", "B", "C"), parts, strict=True))
        elif stage == "scan":
            self._call = calls.scan()

    def _close(self, stage: str) -> None:
        values, calls = self._values, self._made_calls()
        if stage == "in_proj":
            calls.gate = values["skip"]
            self._mixer.in_proj.output = torch.stack((values["in_proj"], values["skip"]), -1).flatten(2)
        elif stage == "x_proj":
            calls.put(PROJECTED, tuple(values[name].permute(2, 0, 1, 3) for name in ("delta_1", "B", "C")))
        else:
            MambaLayer._close(self, stage)

    def _B_bar(self) -> Tensor:
        return self.get("delta")[..., None] * _by_channel(self._call.B, self._letters["E"])

    def _read_out(self, h: Tensor) -> Tensor:
        return (h * _by_channel(self._call.C, self._letters["E"])).sum(-1)

    def _scanned(self) -> tuple[Tensor, Tensor]:
        call, start = self._call, self.get("h_start")
        heads = _of_heads(call.x, self.get("delta"), self.get("A"), call.B, call.C)
        found = [selective_scan(*own, start[:, channels]) for channels, own in heads]
        return torch.cat([y for y, _ in found], -1), torch.cat([last for _, last in found], 1)


class ZambaHybrid(ZambaLayer):
    """A pass through a block whose mixer reads the sum of its copy of the stream and what attention makes of that copy."""

    def _leave(self, stage: str) -> None:
        if stage == "norm_input":
            write_copies(self._module.shared_transf, self._module.mamba_decoder, self._values["layer_input"])
        else:
            LayerPass._leave(self, stage)


def _unrolled(delta: Tensor, A: Tensor, B: Tensor, C: Tensor, channels: Tensor) -> Tensor:
    """As of a Mamba-1, each channel with B and C of its head."""
    width = A.shape[0] // B.shape[2]
    one = [
        kind.unrolled(delta, A, B[:, :, int(channel) // width], C[:, :, int(channel) // width], channel[None])
        for channel in channels
    ]
    return torch.cat(one, 1)


def _corrupted_read_out(corrupted: Mapping[str, Tensor], now: Mapping[str, Tensor], of_pair: Tensor) -> Tensor:
    """As of a Mamba-1, head by head."""
    x, delta, B = (corrupted[site][of_pair] for site in kind.READ_OUT_FROM)
    wide = delta.dtype
    heads = _of_heads(x.to(wide), delta, now["A"], B.to(wide), now["C"].to(wide))
    return torch.cat([selective_scan(*own[:4], own[4].contiguous())[0] for _, own in heads], -1)


def _flow_read_out(weight: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """As of a Mamba-1, head by head; weight: [batch, H, target, source], or one for all heads."""
    by_head = weight.expand(-1, B.shape[2], -1, -1)
    heads = enumerate(_of_heads(x, delta, A, B, C))
    return torch.cat([kind.flow_read_out(by_head[:, head, None], *own) for head, (_, own) in heads], -1)


def _flow_products(gradient: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """As of a Mamba-1, [batch, H, target, source]."""
    heads = _of_heads(x, delta, A, B, C)
    return torch.cat([kind.flow_products(gradient[..., channels], *own) for channels, own in heads], 1)


def _parts(conv_width: int) -> tuple[Part, ...]:
    return kind.parts_of_mixer(conv_width, _corrupted_read_out)


def _sizes(config: Any) -> Sizes:
    letters = {
        "D": config.hidden_size,
        "E": config.mamba_expand * config.hidden_size,
        "H": config.n_mamba_heads,
        "N": config.mamba_d_state,
        "R": config.mamba_dt_rank,
        "K": config.mamba_d_conv,
        "vocab": config.vocab_size,
    }
    return Sizes(config.num_hidden_layers, letters, False)


def _refusal(config: Mapping[str, Any]) -> str | None:
    return kind.refusal({"hidden_act": config.get("hidden_mamba_act", "silu")})


_BY_HEAD = {
    "in_proj": {"place": "mixer.in_proj.output, even channels"},
    "skip": {"place": "mixer.in_proj.output, odd channels"},
    "delta_1": {"shape": "batch pos H R", "place": f"mixer.{PROJECTED}.output"},
    "B": {"shape": "batch pos H N", "place": f"mixer.{PROJECTED}.output"},
    "C": {"shape": "batch pos H N", "place": f"mixer.{PROJECTED}.output"},
}
_MIXER = kind.MIXER._replace(
    sites=[site._replace(**_BY_HEAD.get(site.name, {})) for site in kind.SITES],
    layer_pass=ZambaLayer,
    operations=OPERATIONS,
    unrolled=_unrolled,
    flow_read_out=_flow_read_out,
    flow_products=_flow_products,
    parts=_parts,
)
_HYBRID = blocks.mamba(
    _MIXER._replace(layer_pass=ZambaHybrid), norm="mamba_decoder.input_layernorm", path="mamba_decoder.mamba"
)
_HYBRID.ends["layer_input"] = End("shared_transf", "input")

ZAMBA = Family(
    name="zamba",
    label="Zamba",
    published=("Zyphra/Zamba-7B-v1",),
    tree=Tree("model.layers", "model.embed_tokens", "model.final_layernorm", "lm_head"),
    kinds={
        "linear_attention": blocks.block(blocks.mamba(_MIXER, norm="input_layernorm", path="mamba")),
        "hybrid": blocks.block(_HYBRID, attends=True),
    },
    blocks=listed,
    config_names=(
        "num_hidden_layers",
        "hidden_size",
        "mamba_expand",
        "n_mamba_heads",
        "mamba_d_state",
        "mamba_dt_rank",
        "mamba_d_conv",
        "vocab_size",
    ),
    sizes=_sizes,
    mixer=_MIXER,
    refusal=_refusal,
    limits=(
        EMBEDDINGS_LIMIT,
        (
            "several invokes of one trace that open a mixer",
            "it puts heads before rows, and nnsight tells invokes apart by rows",
        ),
    ),
)
