"""What a user meets: bad input (the command line exits with 2), a failing server (3), requests not waited for (0).

The message is one sentence that says what is wrong and what to do; the command line prints it.
"""

from types import TracebackType

_INSIDE = ("torch", "transformers", "accelerate", "nnsight", "ioi_mamba")
"""Packages whose frames say nothing of what the caller passed."""


class InputError(ValueError):
    """Something the caller passed cannot be used; the message says what, and what to do instead."""

    def with_traceback(self, tb: TracebackType | None) -> "InputError":
        """As of any exception, but only with the caller's own frames, where there are some.

        nnsight calls it on what was raised inside a trace. The frames of the model that ran meanwhile, some 70 lines,
        would stand above the sentence.
        """
        own, kept = tb, []
        while own is not None:
            if own.tb_frame.f_globals.get("__name__", "").split(".")[0] not in _INSIDE:
                kept.append(own)
            own = own.tb_next
        linked = None
        for entry in reversed(kept):
            linked = TracebackType(linked, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
        return ValueError.with_traceback(self, linked or tb)


class ServerError(Exception):
    """A server did not answer or failed; the text is one sentence that says what happened and what to do."""


class Submitted(Exception):
    """Requests were handed to a server and not waited for; the text says which."""
