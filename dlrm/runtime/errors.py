"""The user's mistakes: one line that names the file, option or rank and the remedy."""

import sys

from common.errors import USAGE as USAGE
from common.errors import UserError as UserError

STOPPED = 75  # EX_TEMPFAIL: run it again and it goes on


class Stopped(Exception):
    """Told to stop, by a signal or the clock, and stopped in good order. Exit code 75."""

    shared = False


class NotSaved(Exception):
    """The training is over, and a checkpoint that was asked for could not be written. Exit code 1."""

    shared = True  # all ranks know


class LostRank(Exception):
    """Another rank is gone, or never came: its text names it."""

    code = 1  # what this rank exits with: the other's code when it ended with an error of its own
    told = False  # another rank says it


SET_UP = ("numpy", "torch", "torchrec", "polars", "numba")  # what a shell lacks that has not read env.sh


def missing_environment(error: ModuleNotFoundError) -> UserError | None:
    """One of these is missing: the line that a user needs, once. None: it is another module."""
    if error.name not in SET_UP:
        return None
    found = UserError(
        f"{sys.executable} has no {error.name}: source ./env.sh first (./0_setup_env.sh makes it)"
    )
    found.shared = True
    return found
