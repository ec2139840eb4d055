"""`python -m analysis` by a server of its own, which has also loaded the compiled loops.

With `replay` as the first word it is the player, `python -m dlrm.replay`.
"""

import pickle
import sys
import tempfile
from functools import cache
from pathlib import Path

from support.command_server import CommandServer, serve
from support.fuzzing import MEMORY, Outcome, outcome


@cache
def server() -> CommandServer:
    return CommandServer("support.analysis_command")


def run_command(*words: object, memory: int | None = None, seconds: float = 120) -> Outcome:
    return server().run(*words, memory=memory, seconds=seconds)


def run_hostile(*words: object, seconds: float = 30) -> Outcome:
    """For input that is made to do harm: within MEMORY and `seconds`."""
    return server().run(*words, memory=MEMORY, seconds=seconds)


def _prepare() -> None:
    """Import all that a command may need, and load the compiled loops, so that no fork has to."""
    import pyarrow.compute  # noqa: F401
    from support.made_traces import training

    import analysis.perfetto.chrome  # noqa: F401
    import analysis.perfetto.view  # noqa: F401
    import analysis.report.compare  # noqa: F401
    import dlrm.replay.__main__  # noqa: F401

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


def _run_command(argv: list[str]) -> int:
    if argv[0] == "replay":
        from dlrm.replay import __main__ as player
        from dlrm.runtime import entry

        sys.argv = ["python -m analysis replay", *argv[1:]]
        entry.run_entry(player.main)
    from analysis.__main__ import main

    return main(argv)


if __name__ == "__main__":
    serve(_run_command, _prepare)
