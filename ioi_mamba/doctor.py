"""What is installed, whether it was tested with this project, and whether the embedded model works."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator
from typing import NamedTuple

import torch

# The least version tested and the first one that is not, as (major, minor); None: no upper end.
TESTED: dict[str, tuple[tuple[int, int], tuple[int, int] | None]] = {
    "nnsight": ((0, 8), (0, 9)),
    "transformers": ((5, 15), (5, 24)),
    "torch": ((2, 9), (2, 14)),
    "altair": ((6, 0), (7, 0)),
    "pandas": ((2, 3), None),
    "vl-convert-python": ((1, 8), None),
}
KERNELS = ("mamba_ssm", "causal_conv1d")


class Check(NamedTuple):
    """One line of the doctor's report; `good` False means that something needs attention."""

    good: bool
    subject: str
    says: str


def version(package: str) -> str | None:
    """The installed version of a distribution, None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """The versions a run depends on, for its manifest."""
    found = {"python": platform.python_version()}
    for package in ("ioi-mamba", "torch", "nnsight", "transformers", "altair"):
        found[package] = version(package) or "not installed"
    return found


def kernels(device: torch.device | str = "cuda") -> list[str]:
    """The compiled kernels a Mamba on this device runs with; none on a CPU, where they cannot run."""
    if torch.device(device).type != "cuda":
        return []
    return [name for name in KERNELS if importlib.util.find_spec(name) is not None]


def device_name(device: torch.device) -> str:
    """A device in words: "cpu", or "cuda:0 (its model)"."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _check_version(package: str) -> Check:
    low, high = TESTED[package]
    found = version(package)
    tested = f"tested from {low[0]}.{low[1]}" + (f" to before {high[0]}.{high[1]}" if high else "")
    if found is None:
        return Check(False, package, f"not installed ({tested})")
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    inside = low <= numbers and (high is None or numbers < high)
    return Check(inside, package, found if inside else f"{found}, outside the tested range ({tested})")


def _check_kernels() -> Check:
    there = [name for name in KERNELS if importlib.util.find_spec(name) is not None]
    if not there:
        return Check(True, "compiled kernels", "not installed; transformers' own scan is used")
    if not torch.cuda.is_available():
        return Check(True, "compiled kernels", f"{', '.join(there)} installed, not in use without a GPU")
    return Check(True, "compiled kernels", f"in use: {', '.join(there)}")


def _check_device() -> Check:
    if torch.cuda.is_available():
        return Check(True, "device", device_name(torch.device("cuda", 0)))
    return Check(True, "device", f"no GPU; the CPU with {torch.get_num_threads()} threads")


def _check_mini() -> Check:
    """Open the embedded model and let it solve one prompt."""
    prompt, answer = (
        "Then, Lauren, Isaac and Lucas went to the office. Isaac and Lucas gave a necklace to",
        " Lauren",
    )
    try:
        from .models import open_model

        model = open_model("mini", device="cpu")
        tokenizer = model.tokenizer
        tokens = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            logits = model._module(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        said = tokenizer.decode([int(logits.argmax())])
    except Exception as error:  # whatever is broken, the doctor's job is to say so
        return Check(
            False,
            "mini",
            f"does not open: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
        )
    if said.strip() != answer.strip():
        return Check(False, "mini", f"opens, but continues {prompt!r} with {said!r} instead of {answer!r}")
    return Check(True, "mini", f'opens, and continues "... Isaac and Lucas gave a necklace to" with {said.strip()!r}')


def examine() -> Iterator[Check]:
    """Every check, one after the other (the last takes seconds)."""
    yield Check(True, "python", platform.python_version())
    yield Check(
        version("ioi-mamba") is not None,
        "ioi-mamba",
        version("ioi-mamba") or "runs from its sources, not installed",
    )
    for package in TESTED:
        yield _check_version(package)
    yield _check_kernels()
    yield _check_device()
    yield _check_mini()
