"""What a user meets: bad input (the command line exits with 2), a failing server (3), requests not waited for (0).

The message is one sentence that says what is wrong and what to do; the command line prints it.
"""


class InputError(ValueError):
    """Something the caller passed cannot be used; the message says what, and what to do instead."""


class ServerError(Exception):
    """A server did not answer or failed; the text is one sentence that says what happened and what to do."""


class Submitted(Exception):
    """Requests were handed to a server and not waited for; the text says which."""
