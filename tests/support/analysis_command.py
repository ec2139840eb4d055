"""`python -m analysis` without the start of an interpreter: a server process forks for every command.

A process in which polars has run must not fork: the child waits for polars' threads, which are not there. So
the commands are forked by a process of their own, in which everything is imported and polars has never run.
It starts with the first command and ends when the tests do, because its standard input is then closed.
"""

import json
import os
import pickle
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from support.fuzzing import MEMORY, Outcome, outcome

ROOT = Path(__file__).parents[2]


class CommandServer:
    """Runs `analysis.__main__.main(argv)`, each time in a fresh fork."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "support.analysis_command"], text=True, cwd=ROOT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        )  # fmt: skip

    def run(self, *words: object, memory: int | None = None, seconds: int = 120) -> Outcome:
        """memory: bytes that the command may ask for beyond those of an idle process; None: any number."""
        assert self._server.stdin is not None and self._server.stdout is not None
        request = {"argv": [str(word) for word in words], "memory": memory, "seconds": seconds}
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return Outcome(**json.loads(self._server.stdout.readline()))


@cache
def server() -> CommandServer:
    return CommandServer()


def run_command(*words: object, memory: int | None = None, seconds: int = 120) -> Outcome:
    return server().run(*words, memory=memory, seconds=seconds)


def run_hostile(*words: object, seconds: int = 30) -> Outcome:
    """For input that is made to do harm: within MEMORY and `seconds`."""
    return server().run(*words, memory=MEMORY, seconds=seconds)


def _prepare() -> None:
    """Import all that a command may need, and load the compiled loops, so that no fork has to."""
    from support.made_traces import training

    import analysis.perfetto.chrome  # noqa: F401
    import analysis.perfetto.view  # noqa: F401
    import analysis.report.compare  # noqa: F401

    with tempfile.TemporaryDirectory() as scratch:
        run, listed = Path(scratch) / "run", Path(scratch) / "loops"
        made = training(0, 1, steps=3)
        made.span("counter", "loss", 5, 0, value=0.5)
        made.write(run)
        for argv in (
            ["check", run],
            ["perfetto", run],
            ["report", run],
            ["perfetto", run, "--format", "json"],
        ):
            done = outcome(_run_and_list_loops, [listed, *argv], memory=None, seconds=600)
            assert done.code in (0, 1), done.err
            for module, name, signatures in pickle.loads(listed.read_bytes()):
                for signature in signatures:
                    getattr(sys.modules[module], name).compile(signature)


def _run_and_list_loops(argv: list[str]) -> int:
    """Run a command, and write to the file argv[0] which compiled functions it used, with which types."""
    from numba.core.dispatcher import Dispatcher

    from analysis.__main__ import main

    code = main(argv[1:])
    used = [
        (module, name, function.signatures)
        for module in sorted(sys.modules)
        if module.startswith("analysis.")
        for name, function in vars(sys.modules[module]).items()
        if isinstance(function, Dispatcher) and function.__module__ == module
    ]
    Path(argv[0]).write_bytes(pickle.dumps(used))
    return code


def _serve() -> None:
    from analysis.__main__ import main

    answers = sys.stdout
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    _prepare()
    for line in sys.stdin:
        request = json.loads(line)
        done = outcome(main, request["argv"], request["memory"], request["seconds"])
        print(json.dumps(vars(done)), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
