"""What is installed, and which versions this project was tested with: read from its own metadata."""

from __future__ import annotations

import importlib.metadata
import platform

from packaging.requirements import Requirement

__all__ = ["__version__", "requirements", "version", "versions"]


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


def requirements() -> list[Requirement]:
    """The packages a run needs and the versions of them that were tested, as the installed project's metadata has them.

    Empty where the project runs from its sources: nothing is installed then that could be asked.
    """
    try:
        found = [Requirement(line) for line in importlib.metadata.requires("ioi-mamba") or ()]
    except importlib.metadata.PackageNotFoundError:
        return []
    return [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]


__version__ = version("ioi-mamba") or "0+sources"
