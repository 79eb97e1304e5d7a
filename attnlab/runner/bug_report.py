"""Write the traceback of an unexpected exception to a file."""

import contextlib
import sys
import tempfile
import traceback

from attnlab.errors import one_line
from attnlab.provenance import version_line


def report_bug(error: BaseException) -> str:
    """Write the traceback of an exception to a new file and return one line that names it.

    The file also has the command line and the versions. It is in the folder for temporary files.
    """
    message = one_line(error, 300).encode("ascii", "backslashreplace").decode()
    try:
        lines = traceback.format_exception(error)
    except BaseException as second:  # an experiment file may define exceptions that cannot be printed
        lines = [*traceback.format_tb(error.__traceback__), f"{message} ({type(second).__name__})\n"]
    text = f"{version_line()}\n{' '.join(map(ascii, sys.argv))}\n\n{''.join(lines)}"
    with contextlib.suppress(OSError):
        with tempfile.NamedTemporaryFile(
            "w", prefix="attnlab-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(text)
        return f"error: unexpected {message}; the traceback is in {file.name}"
    return f"error: unexpected {message}; ATTNLAB_DEBUG=1 shows the traceback"
