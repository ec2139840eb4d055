"""Commands without the start of an interpreter: a server process forks for each of them.

A process in which torch or polars has run must not fork: the child waits for their threads, which are not
there, or crashes. The tests' own process is one. So commands are forked by a process of their own, in which
everything is imported and nothing has run. It starts with the first command and ends when the tests do,
because its standard input is then closed.

    run_program("dlrm.train", "--max_steps", 4)    as python -m dlrm.train --max_steps 4
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

from support.fuzzing import Outcome, outcome

ROOT = Path(__file__).parents[2]


class CommandServer:
    """Runs what the module `name`, started with these words, gives to `serve`, each time in a fresh fork."""

    def __init__(self, name: str, *words: str) -> None:
        self._command = [sys.executable, "-m", name, *words]
        self._server = self._start()

    def _start(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            self._command, text=True, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        )  # fmt: skip

    def run(self, *words: object, memory: int | None = None, seconds: float = 120) -> Outcome:
        """memory: bytes that the command may ask for beyond those of an idle process; None: any number."""
        assert self._server.stdin is not None and self._server.stdout is not None
        request = {"argv": [str(word) for word in words], "memory": memory, "seconds": seconds}
        try:
            print(json.dumps(request), file=self._server.stdin, flush=True)
            return Outcome(**json.loads(self._server.stdout.readline()))
        except BaseException:  # a test's time is over: its answer would be taken for the next test's
            self._server.kill()
            self._server.wait()
            self._server = self._start()
            raise


def serve(main: Callable[[list[str]], int | None], prepare: Callable[[], None]) -> None:
    """The server's side: `prepare` once, then `main(argv)` in a fork for each line of stdin."""
    answers = sys.stdout
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    prepare()
    for line in sys.stdin:
        request = json.loads(line)
        done = outcome(main, request["argv"], request["memory"], request["seconds"])
        print(json.dumps(vars(done)), file=answers, flush=True)


@cache
def _programs() -> CommandServer:
    return CommandServer("support.command_server")


def run_program(name: str, *words: object, memory: int | None = 8 << 30, seconds: float = 120) -> Outcome:
    """`python -m NAME WORD...` for dlrm.train, bert4rec, emulate, replay, prep and analysis."""
    return _programs().run(name, *words, memory=memory, seconds=seconds)


def import_programs() -> None:
    import analysis.report.compare  # noqa: F401
    import dlrm.emulate.__main__
    import dlrm.prep.__main__
    import dlrm.replay.__main__
    import dlrm.trainer.trainer  # noqa: F401
    from dlrm.models.registry import MODULES, find_model

    for name in MODULES:
        spec = find_model(name)
        (spec.load_program or spec.load_parts)()


def run_module(argv: list[str]) -> int | None:
    """`python -m` in this process, which may end with it."""
    name, *words = argv
    if name in ("dlrm.prep", "analysis"):
        return importlib.import_module(f"{name}.__main__").main(words)
    from dlrm.runtime import entry

    sys.argv = [f"python -m {name}", *words]
    program = f"{name}.__main__" if name in ("dlrm.emulate", "dlrm.replay") else name
    entry.run_entry(importlib.import_module(program).main)
    return None


if __name__ == "__main__":
    serve(run_module, import_programs)
