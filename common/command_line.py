"""Command lines of all programs: a mistake is one line that names the option or command that was meant.

In: what argparse takes. Out: its namespace, or a UserError.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from common.errors import USAGE, UserError, printable

RELATIVE_TO_HELP = "relative paths among these options are relative to this folder [the current one]"
LIKE = 0.6  # from 0 to 1: how like a wrong word the word is that is suggested


def path_text(text: str) -> str:
    """The type of an option that names a file or a folder, where its value stays a str."""
    return text


class CommandLineParser(argparse.ArgumentParser):
    """Takes options by their whole names only. A program with commands prints its help if it gets no word."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **settings})
        self.other_names: Mapping[str, str] = {}  # options of programs like this one -> what they are here
        self._words: list[str] = []

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Options that no command knows are reported by the command that they were given to."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self._find_command(found).error(f"unrecognized arguments: {' '.join(unknown)}")
        return found

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        self._words = list(sys.argv[1:] if args is None else args)
        if not self._words and self._subparsers is not None:
            self.print_help(sys.stderr)
            self.exit(USAGE)
        return super().parse_known_args(args, namespace)

    def resolve_paths(self, found: argparse.Namespace, folder: str | None) -> None:
        """Make relative paths among the options' values paths below `folder`, if there is one."""
        for action in self._actions:
            value = getattr(found, action.dest, None)
            if folder and value and action.type in (Path, path_text):
                setattr(found, action.dest, type(value)(Path(folder, value)))

    def _find_command(self, found: argparse.Namespace) -> argparse.ArgumentParser:
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return action.choices[getattr(found, action.dest)]
        return self

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            meant = find_similar(str(value), map(str, action.choices or ()))
            error.message += f"; did you mean {meant}?" if meant else ""
            raise

    def error(self, message: str) -> NoReturn:
        options = [option for action in self._actions for option in action.option_strings]
        wrong = [word.partition("=")[0] for word in self._words if re.match("--[A-Za-z]", word)]
        for word in wrong:
            if word not in options and (meant := self.other_names.get(word) or find_similar(word, options)):
                message += f"; did you mean {meant} instead of {word}?"
        error = UserError(f"{printable(message)} ({self.prog} --help lists the options)")
        error.shared = True  # every rank has the same command line
        raise error


def find_similar(wrong: str, known: Iterable[str]) -> str:
    """The known word that is most like a wrong one, or nothing; hyphens count as underscores."""
    # without the two hyphens before them, which would make all short options alike
    plain = {word.lower().lstrip("-").replace("-", "_"): word for word in known}
    close = difflib.get_close_matches(wrong.lower().lstrip("-").replace("-", "_"), plain, n=1, cutoff=LIKE)
    return plain[close[0]] if close else ""
