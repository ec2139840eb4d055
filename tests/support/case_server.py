"""Functions of a test file, each called in a fork of a process in which nothing has run yet.

The tests' own process cannot fork once torch or polars has run in it (see `command_server`).

    cases = CaseServer(__file__)
    cases.run("read_store", path)    read_store([str(path)]) of this file: its exit code and what it printed
"""

import importlib
import os
import sys
from pathlib import Path

from support.command_server import CommandServer, import_programs, serve
from support.fuzzing import MEMORY, Outcome


class CaseServer:
    """Starts with the first case."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._server: CommandServer | None = None

    def run(self, function: str, *words: object, memory: int | None = MEMORY, seconds: float = 30) -> Outcome:
        if self._server is None:
            self._server = CommandServer("support.case_server", self._file)
        return self._server.run(function, *words, memory=memory, seconds=seconds)


def _serve_file(file: Path) -> None:
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # the others reserve a gigabyte of addresses at once
    sys.path[:0] = [str(file.parent)]
    module = importlib.import_module(file.stem)
    serve(lambda argv: getattr(module, argv[0])(argv[1:]), import_programs)


if __name__ == "__main__":
    _serve_file(Path(sys.argv[1]))
