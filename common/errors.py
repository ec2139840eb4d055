"""Errors that are the user's to mend: one line that names the file or option, and the remedy."""

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager

USAGE = 2  # exit code of a usage error or of bad input


class UserError(Exception):
    """Ends the program with exit code 2 and its text as one line on stderr."""

    shared = False  # every rank raises the same error: only rank 0 prints it


@contextmanager
def os_errors_as_user_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError in the block becomes a UserError: the file's name and the system's message (no such file, no
    space left). `path` is named where the OSError names no file.
    """
    try:
        yield
    except OSError as error:
        named = error.filename2 or error.filename or path
        raise UserError(f"{printable(named)}: {error.strerror or error}") from None


def printable(path: object) -> str:
    """A path as one line of text; newlines, control characters and bytes that are not UTF-8 are escaped."""
    text = os.fsdecode(path) if isinstance(path, bytes | os.PathLike) else str(path)
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a pair of surrogates, which JSON can hold
        data = text.encode("utf-8", "backslashreplace")
    shown = data.decode("utf-8", "backslashreplace")
    return shown if shown.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)


def quote_for_shell(path: str | os.PathLike[str]) -> str:
    """The path as one word to be typed into bash, of printable characters only."""
    text = os.fsdecode(path)
    if printable(text) == text:
        return shlex.quote(text)
    return "$'" + printable(text.replace("\\", "\\\\")).replace("'", "\\'") + "'"
