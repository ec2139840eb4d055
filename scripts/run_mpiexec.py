"""Run mpiexec or srun: pass signals on to it, and name the nodes that it has lost.

usage: run_mpiexec.py [--nodes NODE,NODE... [--nproc N]] MPIEXEC [ARG...]

Open MPI's mpiexec and srun kill the ranks when they get SIGTERM or Ctrl-C. They get SIGUSR1 instead, and pass
it on to the ranks, which then save and end with code 75. The command has a session of its own: neither a
terminal's Ctrl-C nor PBS's signal to the job reaches it. If this process is killed, the command gets SIGTERM.

--nodes: the command is mpich's, on these nodes; --nproc: with so many ranks on each, in the order of the
nodes. It gets the signals as they are. When its connection to a node breaks it ends at once, with code 255,
and takes the ranks along before one of them can tell why. So each node is then asked for a sign of life.

Exits with the command's code; standard library only.
"""

import argparse
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

PR_SET_PDEATHSIG = 1
LOST_CONNECTION = 255  # mpich's code for it
ANSWER_SECONDS = 10  # for each node to start a process


def run_command(command: Sequence[str], send_usr1: bool) -> int:
    """Returns the command's code. send_usr1: it gets SIGUSR1 in the place of other signals."""
    parent = os.getpid()
    libc = ctypes.CDLL(None)

    def end_with_parent() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it was killed before the call
            os._exit(1)

    def pass_on(number: int, frame: FrameType | None) -> None:
        if process is None:  # nothing to save yet
            sys.exit(128 + number)
        process.send_signal(signal.SIGUSR1 if send_usr1 else number)

    process = None
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, pass_on)
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=end_with_parent)
    code = process.wait()
    return code if code >= 0 else 128 - code


def find_silent_nodes(mpiexec: str, nodes: Sequence[str]) -> list[str]:
    """The nodes on which mpiexec starts no process any more."""
    asked = [
        subprocess.Popen(
            ["timeout", "-k", "1", str(ANSWER_SECONDS), mpiexec, "-hosts", node, "-n", "1", "true"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for node in nodes
    ]  # fmt: skip
    codes = [process.wait() for process in asked]
    return [node for node, code in zip(nodes, codes, strict=True) if code]


def describe_loss(nodes: Sequence[str], nproc: int | None, silent: Sequence[str]) -> str:
    """nproc: ranks on each node; None: not known."""
    if not silent or len(silent) == len(nodes):
        return f"mpiexec lost its connection to one of the nodes {' '.join(nodes)}, or failed itself"
    lost = []
    for node in silent:
        if nproc is None:
            lost.append(node)
            continue
        first = nodes.index(node) * nproc
        ranks = f"rank {first}" if nproc == 1 else f"ranks {first}-{first + nproc - 1}"
        lost.append(f"{node} ({ranks})")
    return f"mpiexec lost its connection to {', '.join(lost)}: no process can be started there any more"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--nodes", type=lambda text: text.split(","), help="of mpich's mpiexec")
    parser.add_argument("--nproc", type=int, help="ranks on each of these nodes, if that is known")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if not options.command:
        parser.error("no command")
    code = run_command(options.command, send_usr1=not options.nodes)
    if code == LOST_CONNECTION and options.nodes:
        silent = find_silent_nodes(options.command[0], options.nodes)
        print("launcher.sh:", describe_loss(options.nodes, options.nproc, silent), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
