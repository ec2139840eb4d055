"""python -m dlrm.traced [--output_dir RUN] SCRIPT ARGS: run a training script with everything it does traced.

Under launcher.sh, torchrun, mpiexec or srun, or alone. The exit code is the script's; 2 for a mistake in the
words before SCRIPT.
"""

import atexit
import os
import sys

from common.errors import USAGE, UserError
from dlrm.runtime import entry, trace
from dlrm.runtime.ranks import Ranks, find_ranks
from dlrm.runtime.tracer_variables import wants_trace
from dlrm.traced import hooks, options, process, run_folder, script
from dlrm.traced.steps import steps


def prepare(here: Ranks, words: list[str]) -> tuple[script.Program, run_folder.OpenedFolder | None]:
    """The program to run, with its run folder made and this process traced; UserError for a mistake."""
    chosen = options.parse_words(words)
    program = script.find_program(chosen)
    if not wants_trace(os.environ):
        return program, None
    opened = run_folder.choose_folder(chosen, here)
    if here.first:
        run_folder.open_run_folder(opened, program, here)
    process.start(opened.path, here, "train")
    if chosen.profile_steps:
        steps.profile(opened.path, here, chosen.profile_steps)
    hooks.install(quiet=not here.first)
    return program, opened


def discard_run(opened: run_folder.OpenedFolder | None) -> None:
    """Where the script does not take its words: nothing was trained, and nothing stays in the run folder."""
    if opened is not None and not steps.step:
        trace.discard_tracing()
        opened.discard()


def main() -> None:
    here = find_ranks()
    atexit.register(script.end_by_signal)  # the first to be registered is the last to be called
    try:
        program, opened = prepare(here, sys.argv[1:])
    except UserError as error:
        if here.first or not error.shared:
            entry.print_error(Ranks() if error.shared else here, str(error))
        trace.discard_tracing()
        sys.exit(USAGE)
    script.run_program(program, when_refused=lambda: discard_run(opened))


if __name__ == "__main__":
    main()
