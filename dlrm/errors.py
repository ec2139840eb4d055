"""The user's mistakes: one line that names the file, option or rank and the remedy."""

USAGE = 2


class UserError(Exception):
    """Ends the program with exit code 2 and its text as one line on stderr."""

    shared = False  # every rank raises the same one: rank 0 alone tells it
