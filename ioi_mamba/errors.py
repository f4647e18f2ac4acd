"""The one exception that a user's input can cause.

Its message is one sentence that names the input and the fix; the command line prints it and exits with 2.
"""


class InputError(ValueError):
    """Something the caller passed cannot be used; the message says what, and what to do instead."""
