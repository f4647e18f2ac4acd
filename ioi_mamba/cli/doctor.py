"""What is installed, whether this project supports it, and whether the embedded model works."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterator
from typing import NamedTuple

import torch
from packaging.requirements import Requirement

from ioi_mamba.passes.probe import KERNELS
from ioi_mamba.versions import requirements, version, versions


class Check(NamedTuple):
    """One line of the doctor's report; `good` False means that something needs attention."""

    good: bool
    subject: str
    says: str


def device_name(device: torch.device) -> str:
    """A device in words: "cpu", or "cuda:0 (its model)"."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _check_version(wanted: Requirement) -> Check:
    found, supported = version(wanted.name), f"supported: {wanted.specifier}"
    if found is None:
        return Check(False, wanted.name, f"not installed ({supported})")
    inside = wanted.specifier.contains(found, prereleases=True)
    return Check(inside, wanted.name, found if inside else f"{found}, outside the range ({supported})")


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
    n = torch.get_num_threads()
    return Check(True, "device", f"no GPU; the CPU with {n} thread{'s' if n > 1 else ''}")


def _check_mini() -> Check:
    """Open the embedded model and let it solve one prompt."""
    prompt, answer = (
        "Then, Lauren, Isaac and Lucas went to the office. Isaac and Lucas gave a necklace to",
        " Lauren",
    )
    try:
        from ioi_mamba.model.opening import open_model

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


def _check_model(name: str) -> Iterator[Check]:
    """Open a model that is here, and say what it is and what cannot be done with it."""
    from ioi_mamba.errors import InputError
    from ioi_mamba.experiments.needs import limits_of_model
    from ioi_mamba.model.families import family_of, sizes_of
    from ioi_mamba.model.opening import open_model

    try:
        model = open_model(name, device="cpu")
    except InputError as error:
        yield Check(False, "model", str(error))
        return
    sizes = sizes_of(model)
    says = f"{sizes.n_layers} layers, width {sizes.letters['D']}, vocabulary {sizes.letters['vocab']}"
    yield Check(True, "model", f"{name} opens: a {family_of(model).label}, {says}")
    yield from (Check(True, "limit", f"{what}: {why}") for what, why in limits_of_model(model))


def _check_server(name: str, backend: str, host: str | None) -> Iterator[Check]:
    """What this server allows with this model, as far as it answers."""
    from ioi_mamba.errors import InputError, ServerError
    from ioi_mamba.model.opening import open_model
    from ioi_mamba.passes.probe import probe

    try:
        model = open_model(name, backend=backend, host=host)
        if backend == "ndif":
            yield _check_deployed(model)
        found = probe(model)
    except (InputError, ServerError) as error:
        yield Check(False, "server", str(error))
        return
    ours = versions()
    for package, theirs in found["versions"].items():
        # Of Python only the code's source travels; the others decide what the numbers and the module tree are.
        same = package == "python" or ours[package].split("+")[0] == theirs.split("+")[0]
        yield Check(same, f"server's {package}", theirs if same else f"{theirs}; here it is {ours[package]}")
    yield Check(True, "server's device", f"{found['device']}, kernels: {', '.join(found['kernels']) or 'none'}")
    says = found["dtype"] if found["dtype"] == "float32" else f"{found['dtype']}: numbers differ from float32 ones"
    yield Check(True, "server's dtype", says)
    yield Check(
        True,
        "gradients",
        "allowed" if found["gradients"] else "refused: circuit experiments patch each item instead (method=exact)",
    )
    shown = found["weights_sha256"]
    yield Check(True, "weights", f"SHA-256 {shown[:12]}" if shown else "not shown by the server")


def _check_deployed(model) -> Check:
    import httpx

    from ioi_mamba.remote.client import without_secrets

    host = without_secrets(model.jobs.host)
    try:
        answer = httpx.get(f"{model.jobs.host}/status", timeout=30)
        answer.raise_for_status()
        deployments = answer.json().get("deployments", {}).values()
    except (httpx.HTTPError, ValueError) as error:
        reason = without_secrets(str(error))
        return Check(False, "server", f"{host} does not answer ({reason}): check --host and that it runs")
    levels = [d.get("deployment_level") for d in deployments if d.get("model_key") == model.jobs.model_key]
    state = f"holds the model ({levels[0]})" if levels else "will have to load the model"
    return Check(True, "server", f"{host} answers and {state}")


def examine(name: str = "mini", backend: str = "local", host: str | None = None) -> Iterator[Check]:
    """Every check, one after the other (the last take seconds); with another backend, what it allows with a model."""
    yield Check(True, "python", platform.python_version())
    yield Check(
        version("ioi-mamba") is not None,
        "ioi-mamba",
        version("ioi-mamba") or "runs from its sources, not installed",
    )
    for wanted in requirements():
        yield _check_version(wanted)
    yield _check_kernels()
    yield _check_device()
    if backend == "local":
        yield _check_mini()
        if name != "mini":
            yield from _check_model(name)
    else:
        yield from _check_server(name, backend, host)
