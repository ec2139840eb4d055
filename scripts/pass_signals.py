"""Run a command that kills its children when it gets SIGTERM or Ctrl-C, so that it gets SIGUSR1 instead.

usage: pass_signals.py COMMAND [ARG...]

Open MPI's mpiexec and srun pass SIGUSR1 on to the ranks, which then save and end with code 75. The command
has a session of its own: neither a terminal's Ctrl-C nor PBS's signal to the job reaches it. If this
process is killed, the command gets SIGTERM. Exits with the command's code; standard library only.
"""

import ctypes
import os
import signal
import subprocess
import sys
from types import FrameType

PR_SET_PDEATHSIG = 1


def main(command: list[str]) -> int:
    parent = os.getpid()
    libc = ctypes.CDLL(None)

    def end_with_parent() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it was killed before the call
            os._exit(1)

    def pass_on(number: int, frame: FrameType | None) -> None:
        if process is None:  # nothing to save yet
            sys.exit(128 + number)
        process.send_signal(signal.SIGUSR1)

    process = None
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, pass_on)
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=end_with_parent)
    code = process.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"usage: {(__doc__ or '').split('usage: ')[1].splitlines()[0]}")
    sys.exit(main(sys.argv[1:]))
