"""python -m dlrm.emulate --from RUN OPTIONS: move a run's bytes again, without computing.

Alone it starts as many ranks as the run had (or --ranks N), by launcher.sh; under mpiexec it is one of them.
"""

import os
import sys
from pathlib import Path

from dlrm import train
from dlrm.config.parser import parse_options
from dlrm.emulate.options import count_ranks
from dlrm.emulate.spec import DESCRIPTION, SPEC
from dlrm.models.registry import name_program
from dlrm.runtime import entry
from dlrm.runtime.ranks import Ranks

LAUNCHER = Path(__file__).resolve().parents[2] / "launcher.sh"
STARTED = "DLRM_EMULATE_STARTED"  # set for the ranks that this program starts


def main(here: Ranks) -> None:
    if here.world_size == 1 and STARTED not in os.environ and LAUNCHER.is_file():
        options = parse_options(SPEC.options, sys.argv[1:], name_program(SPEC.name), DESCRIPTION)
        ranks = count_ranks(options)
        if ranks > 1:
            environment = {**os.environ, STARTED: "1", "NPROC": str(ranks)}
            command = [str(LAUNCHER), sys.executable, "-m", "dlrm.emulate", *sys.argv[1:]]
            os.execve(LAUNCHER, command, environment)
    train.main(here, default="emulate")


if __name__ == "__main__":
    entry.run_entry(main)
