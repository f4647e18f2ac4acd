"""Where the numbers of a report come from, in lines for its head, read off the manifests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ioi_mamba.experiments.needs import limits_of
from ioi_mamba.model.families import FAMILIES
from ioi_mamba.results import baseline


def lines(manifests: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(what, value) for the head of the page; values that differ between experiments stand side by side."""

    def each(read) -> str:
        return ", ".join(dict.fromkeys(str(read(manifest)) for manifest in manifests))

    wall = sum(manifest["wall_seconds"] for manifest in manifests)
    model: Mapping[str, Any] = manifests[0]["model"]
    sizes = model["config"]
    shape = [f"{sizes['num_hidden_layers']} layers"] if "num_hidden_layers" in sizes else []
    shape += [f"width {sizes['hidden_size']}"] if "hidden_size" in sizes else []
    shape += [f"state {sizes['state_size']}"] if "state_size" in sizes else []
    versions = manifests[0]["versions"]
    peaks = [m["peak_memory_mib"] for m in manifests if m["peak_memory_mib"] is not None]
    return [
        ("Model", each(lambda m: m["model"]["id"])),
        ("Architecture", ", ".join([model["architecture"], *shape])),
        ("Weights (SHA-256)", each(lambda m: m["model"]["weights_sha256"][:12])),
        ("Device", each(lambda m: f"{m['device']}, {m['dtype']}")),
        *_server_lines(manifests),
        ("Compiled kernels", each(lambda m: ", ".join(m["kernels"]) or "none")),
        ("Selective scan", each(lambda m: m["scan"])),
        ("Seed", each(lambda m: m["seed"])),
        *_clean_scores(manifests),
        ("Time", f"{wall:.1f} s for {len(manifests)} analys{'is' if len(manifests) == 1 else 'es'}"),
        *([("Peak memory", f"{max(peaks):,.0f} MiB")] if peaks else []),
        *_limits(model["architecture"]),
        ("Made", max(m["created"] for m in manifests).replace("T", " ").replace("+00:00", " UTC")),
        ("Versions", ", ".join(f"{package} {number}" for package, number in versions.items())),
    ]


def _limits(architecture: str) -> list[tuple[str, str]]:
    """What cannot be done with models of this kind, and why; nothing for a kind that is none of ours."""
    limits = limits_of(FAMILIES[architecture]) if architecture in FAMILIES else []
    return [("Not possible", "; ".join(f"{what} ({why})" for what, why in limits))] if limits else []


def _server_lines(manifests: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What was asked of a server, and a warning where its numbers are coarser than float32."""
    lines = []
    asked = [manifest["requests"] for manifest in manifests if "requests" in manifest]
    if asked:
        total = {name: sum(each[name] for each in asked) for name in asked[0]}
        names = ", ".join(dict.fromkeys(manifest["backend"] for manifest in manifests))
        lines.append(
            (
                f"Server ({names})",
                f"{total['count']} request{'' if total['count'] == 1 else 's'}, {total['bytes_up'] / 1e6:.2f} MB up, "
                f"{total['bytes_down'] / 1e6:.2f} MB down; {total['queue_seconds']:.1f} s queued, "
                f"{total['run_seconds']:.1f} s running, {total['transfer_seconds']:.1f} s on the way",
            )
        )
    coarse = sorted({manifest["dtype"] for manifest in manifests} & {"bfloat16", "float16"})
    if coarse:
        note = f"weights in {', '.join(coarse)}: expect differences of about 1 % from float32; the scan runs in float32"
        lines.append(("Precision", note))
    return lines


def _clean_scores(manifests: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What the unpatched model does on the prompts: its accuracy, and what the task measures besides."""
    found: dict[str, list[float]] = {}
    for manifest in manifests:
        for what, value in manifest.get("clean", {}).items():
            if what not in baseline.TOLD:
                found.setdefault(f"Unpatched: {what}", []).append(value)
    bounds = dict.fromkeys(
        manifest["clean"]["bound"] for manifest in manifests if manifest.get("clean", {}).get("bound_given")
    )
    given = [("Bound of that accuracy, as given", ", ".join(f"{bound:g}" for bound in bounds))] if bounds else []
    return given + [(what, " to ".join(f"{v:.3f}" for v in sorted({min(vs), max(vs)}))) for what, vs in found.items()]
