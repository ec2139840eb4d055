"""How a rank ends other than by success: one exception class for each exit code.

Each exception's text is one line that names the file, option or rank, and the remedy. `entry.run_entry`
prints it. `shared` means that all ranks raise the same error, so only rank 0 prints it.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from common.errors import USAGE as USAGE
from common.errors import UserError as UserError

STOPPED = 75  # exit code EX_TEMPFAIL: the same command again resumes the run


class Stopped(Exception):
    """A signal or the walltime stopped the run cleanly. Exit code 75."""

    shared = False


class NotSaved(Exception):
    """The training is done, but its last checkpoint could not be written. Exit code 1."""

    shared = True


class LostRank(Exception):
    """Another rank is gone, or never connected; the text names it."""

    code = 1  # what this rank exits with: the other rank's code, if that one ended with an error of its own
    is_printed = False  # another rank prints the reason


@contextmanager
def share_user_errors(gather_from_all: Callable[[str], list[str]]) -> Iterator[None]:
    """A UserError that one rank raises in this block is raised on all ranks, and printed once.

    Without it the others would wait for that rank in their next collective. If several ranks raise one, the
    lowest rank's counts. The block must not contain a collective that only some ranks reach.
    gather_from_all: a collective; gives the texts of all ranks.
    """
    mine = ""
    try:
        yield
    except UserError as error:
        mine = str(error)
    if text := next((each for each in gather_from_all(mine) if each), None):
        error = UserError(text)
        error.shared = True
        raise error


ENVIRONMENT_MODULES = ("numpy", "torch", "torchrec", "polars", "numba")


def explain_missing_module(error: ModuleNotFoundError) -> UserError | None:
    """The error for a shell in which env.sh was not sourced; None where another module is missing."""
    if error.name not in ENVIRONMENT_MODULES:
        return None
    found = UserError(
        f"{sys.executable} has no {error.name}: source ./env.sh first (./0_setup_env.sh makes it)"
    )
    found.shared = True
    return found
