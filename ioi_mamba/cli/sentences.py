"""What is wrong with a command line, as one sentence."""

from __future__ import annotations

from cyclopts import CycloptsError
from pydantic import ValidationError

from ioi_mamba.study.settings import in_words


def sentence(error: CycloptsError) -> str:
    """What the parser, or the model of settings, refuses, and where to look."""
    cause = error.__cause__
    if isinstance(cause, ValidationError):
        return str(in_words(cause))
    command = " ".join(("ioi-mamba", *(error.command_chain or ())))
    said = " ".join(str(error).split())
    return said if said.endswith("?") else f"{said.rstrip('.')}: see `{command} --help`."
