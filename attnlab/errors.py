"""`InputError`, the exception for invalid user input."""


class InputError(ValueError):
    """Invalid input. The message is one line with the field, its value and the allowed values.

    `run.py` prints only the message and exits with code 2. For library users it is an ordinary
    `ValueError`.
    """
