"""The one exception that means "the person asked for something that cannot be"."""


class InputError(ValueError):
    """Bad input, told in one line that names what was wrong and what is allowed.

    `run.py` prints the message alone and exits with code 2; as a library it is an
    ordinary `ValueError`.
    """
