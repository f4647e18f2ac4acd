"""What a command says while it works: through the package's logger, on stderr and, if asked, in a file."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from ioi_mamba.errors import InputError

PACKAGE = "ioi_mamba"
_OTHERS = ("transformers", "nnsight", "huggingface_hub", "accelerate")
_GROUP = Group("Messages", sort_key=9)


@dataclass(frozen=True)
class Logging:
    """Flags that every command has."""

    quiet: Annotated[
        bool, Parameter(help="say nothing on stderr but what went wrong", negative=(), group=_GROUP, show_default=False)
    ] = False
    log_file: Annotated[Path | None, Parameter(help="also write messages and progress there", group=_GROUP)] = None


class _OneLine(logging.Formatter):
    """The message alone: where an error was raised is for the file."""

    def format(self, record: logging.LogRecord) -> str:
        return record.getMessage()


class _Stderr(logging.Handler):
    """Writes to stderr as it is then, below a progress bar that may stand there."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def listen(flags: Logging) -> Iterator[None]:
    """Show what the package's logger hears inside the block, and nothing of the libraries below it."""
    package = logging.getLogger(PACKAGE)
    stderr = _Stderr(logging.WARNING if flags.quiet else logging.INFO)
    stderr.setFormatter(_OneLine())
    handlers: list[logging.Handler] = [stderr]
    if flags.log_file is not None:
        if flags.log_file.is_dir() or not os.access(flags.log_file.absolute().parent, os.W_OK):
            raise InputError(f"The log file {str(flags.log_file)!r} cannot be written: choose another place.")
        # Opened by the first message, so that bad input leaves no file.
        file = logging.FileHandler(flags.log_file, encoding="utf-8", delay=True)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handlers.append(file)
    before = package.level
    for handler in handlers:
        package.addHandler(handler)
    package.setLevel(logging.DEBUG)  # progress, which stands below messages, is for the file
    try:
        yield
    finally:
        package.setLevel(before)
        for handler in handlers:
            package.removeHandler(handler)
            handler.close()


def quieten() -> None:
    """Leave the terminal to our own messages: transformers and nnsight warn about kernels and show bars."""
    os.environ.setdefault("USE_HUB_KERNELS", "0")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in _OTHERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|nnsight|huggingface_hub|torch)\b")
