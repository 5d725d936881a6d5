"""The one error that means: the input is at fault, not the code."""


class InputError(ValueError):
    """What a user gave can't be used; the message is one line: the key and what is allowed.

    Jobs print it without a traceback, and a job that failed with it is not tried again.
    """
