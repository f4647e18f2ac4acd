"""The command `ioi-mamba`: commands by name, each in a module that is imported when it is called.

What a user got wrong is one sentence on stderr and exit code 2; Ctrl-C is 130.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from ioi_mamba.cli.wrapped import Wrapped
from ioi_mamba.errors import InputError, ServerError, Submitted
from ioi_mamba.model.threads import wait_passively

CODES = (
    "Exit codes: 0 done; 1 the doctor found something, or a part of a study failed; 2 bad input; 3 the server failed; "
    "4 a claim fails (compare --strict); 130 interrupted."
)


def _version() -> str:
    from ioi_mamba.versions import version

    return f"ioi-mamba {version('ioi-mamba') or '(not installed)'}"


app = App(
    name="ioi-mamba",
    help="Take a Mamba apart and report what is found.",
    help_epilogue=CODES,
    help_format="plaintext",
    help_formatter=Wrapped(),
    version=_version,
    suppress_keyboard_interrupt=False,
)
COMMANDS = {
    "run": "Run experiments, or a study of many runs, and write a report.",
    "report": "Write the report of finished tables again.",
    "compare": "Hold finished tables against the published numbers.",
    "sites": "List the hook names: every value that can be read and written.",
    "doctor": "Say what is installed and whether it works.",
    "completion": "Print the script that completes commands in a shell.",
}
for _name, _help in COMMANDS.items():
    app.command(f"ioi_mamba.cli.commands.{_name}:{_name}", name=_name, help=_help)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; its exit codes are CODES."""
    wait_passively()
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            if not given:
                raise InputError("No command is given: `ioi-mamba --help` lists them.")
            code = app(
                given,
                console=_console() if {"--help", "-h"} & set(given) else None,
                exit_on_error=False,
                print_error=False,
                result_action="return_value",
            )
            return code if isinstance(code, int) else 0
        finally:
            # Here and not when Python ends, where a reader that has gone could not be caught any more.
            sys.stdout.flush()
    except CycloptsError as error:
        from ioi_mamba.cli.sentences import sentence

        return _say(sentence(error), 2)
    except InputError as error:
        return _say(str(error), 2)
    except ServerError as error:
        return _say(str(error), 3)
    except Submitted as jobs:
        print(f"Submitted: {jobs}\nRun the same with --collect in place of --submit to fetch the results.")
        return 0
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _say("interrupted; finished tables are kept, --resume with --out takes the run up again.", 130)


def _console():
    """What help is written to: rich's, which ends the process with 1 where the reader of a pipe has gone."""
    from rich.console import Console

    class _HelpConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return _HelpConsole()


def _say(text: str, code: int) -> int:
    print(f"ioi-mamba: {' '.join(text.split())}", file=sys.stderr)
    return code
