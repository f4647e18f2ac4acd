"""`ioi-mamba completion`."""

from __future__ import annotations

from typing import Literal


def completion(shell: Literal["bash", "zsh", "fish", "powershell"], /) -> None:
    """Print the script that completes commands, flags, experiments and models.

    Parameters
    ----------
    shell
        Which shell it is for. In bash: eval "$(ioi-mamba completion bash)"
    """
    from ioi_mamba.cli.main import app

    print(app.generate_completion(shell=shell))
