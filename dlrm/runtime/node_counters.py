"""Counters of this node beside the trace (NODE_COUNTERS=yes): DFTracer's service, one on each node.

In: the run folder and this rank. Out: RUN/node_counters/HOST-SECONDS-PID/ of each launch, with the service's
records (*.pfw.gz), once a second, and node.json, which says whose they are: host, cores, boot_time, without
which its shares of processors mean nothing (docs/traces.md), and error, why there are no more records.

The service puts itself into the background, where nobody would end it. So a process of this module adopts it
(PR_SET_CHILD_SUBREAPER), and ends it when the rank says so or is gone, whatever the cause.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError, printable
from common.owned import discard_empty_folder, discard_file, write_whole
from dlrm.runtime.ranks import Ranks

FOLDER = "node_counters"  # of the run folder
RECORDS = "service"  # the beginning of the name of the service's file
START_SECONDS, STOP_SECONDS = 10, 10  # that the service may take
POLL_SECONDS = 0.25  # how soon the end of the rank is noticed
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER


def wants_node_counters(environ: Mapping[str, str], traced: bool) -> bool:
    """NODE_COUNTERS; UserError for another value than yes or no, or where there is no trace to be beside."""
    asked = environ.get("NODE_COUNTERS", "")
    if asked not in ("", "yes", "no"):
        raise UserError(f"NODE_COUNTERS={printable(asked)}: wanted yes or no")
    if asked == "yes" and not traced:
        raise UserError("NODE_COUNTERS=yes: the counters stand beside a trace: leave TRACE=no out")
    return asked == "yes"


def find_service() -> Path | None:
    """DFTracer's program, without importing DFTracer; None where its wheel has none."""
    found = importlib.util.find_spec("dftracer")
    for place in (found.submodule_search_locations or ()) if found else ():
        program = Path(place) / "bin" / "dftracer_service"
        if os.access(program, os.X_OK):
            return program
    return None


class NodeCounters:
    """The counters of this node, while the training goes on."""

    def __init__(self, run_dir: Path, here: Ranks) -> None:
        """Start them, and do not wait. To be called before the tracer starts: it is no event of the trace."""
        pid = str(os.getpid())
        self.folder = run_dir.absolute() / FOLDER / f"{here.host}-{int(time.time())}-{pid}"
        words = [sys.executable, "-m", "dlrm.runtime.node_counters", str(self.folder), here.host, pid]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DFTRACER_")}
        root = str(Path(__file__).parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
        try:
            self.keeper: subprocess.Popen[bytes] | None = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            self.keeper = None
            warn(here.host, f"{sys.executable}: {error.strerror}")

    def stop(self) -> None:
        """End them. When this returns their files are complete, unless the service hangs."""
        keeper, self.keeper = self.keeper, None
        if keeper is None or keeper.stdin is None:
            return
        with contextlib.suppress(OSError):  # it has ended
            keeper.stdin.write(b"stop")  # closing is not enough: forked workers have the pipe, too
            keeper.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it kills a service that hangs
            keeper.wait(STOP_SECONDS)

    def discard(self) -> None:
        """Stop, and remove what this process's node has left: its run was refused the folder."""
        self.stop()
        for path in self.folder.glob("*"):
            discard_file(path)
        discard_empty_folder(self.folder)
        discard_empty_folder(self.folder.parent)


def warn(host: str, reason: str) -> None:
    print(f"dlrm: {host} has no node counters: {printable(reason)}", file=sys.stderr, flush=True)


# --- the process that adopts the service


class ServiceFailed(Exception):
    """Why the service does not run."""


def read_boot_time() -> float:
    """When this node started, in seconds since 1970."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def start_service(program: Path, folder: Path) -> int:
    """Start it, with its records in this folder. Returns its pid, as a child of this process."""
    # blocks of records are compressed when they are complete, and all at the end
    environment = dict(os.environ, DFTRACER_ENABLE="1", DFTRACER_LOG_FILE=str(folder / RECORDS))
    try:
        said = subprocess.run(
            [program, "start", folder], env=environment, cwd=folder, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=START_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ServiceFailed(f"{program.name} did not start within {START_SECONDS} s") from None
    except OSError as error:
        raise ServiceFailed(f"{program}: {error.strerror}") from None
    deadline = time.monotonic() + START_SECONDS
    while said.returncode == 0 and time.monotonic() < deadline:
        for note in folder.glob("*.pid"):
            text = note.read_text()
            if text.strip().isdecimal() and any(folder.glob(f"{RECORDS}*")):
                return int(text)
        time.sleep(0.02)
    words = said.stdout.decode(errors="replace").split("\n")[0][:200]
    raise ServiceFailed(f"{program.name} did not start" + (f": {words}" if words else ""))


def watch(service: int, rank: int) -> str:
    """Wait until the rank says so through stdin, or has ended. Returns why it was sooner, else nothing."""
    ended = select.poll()
    ended.register(0, select.POLLIN | select.POLLHUP)
    while os.getppid() == rank and not ended.poll(POLL_SECONDS * 1000):
        if has_ended(service):
            return "the service ended before the run"
    return ""


def has_ended(service: int) -> bool:
    try:
        return os.waitpid(service, os.WNOHANG)[0] == service
    except ChildProcessError:
        return True


def stop_service(service: int) -> str:
    """Make it write what it has and end. Returns what went wrong, else nothing."""
    if has_ended(service):
        return ""
    for number, seconds in ((signal.SIGINT, STOP_SECONDS), (signal.SIGKILL, 1)):
        os.kill(service, number)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if has_ended(service):
                return "" if number == signal.SIGINT else "the service did not end and was killed"
            time.sleep(0.01)
    return "the service cannot be killed"


def tidy(folder: Path) -> None:
    """Leave out of the folder what the service keeps for itself, unless it has said something."""
    for path in folder.glob("dftracer_server_*"):
        if path.suffix == ".pid" or not path.stat().st_size:
            discard_file(path)


def keep(folder: Path, host: str, rank: int) -> None:
    """Start the service, and end it with the rank."""
    note: dict[str, Any] = {"host": host, "boot_time": round(read_boot_time(), 3), "cores": os.cpu_count()}
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    program = find_service()
    if program is None:
        raise ServiceFailed("DFTracer's wheel for this machine has no dftracer_service")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "node.json", json.dumps(note).encode() + b"\n")
    service = start_service(program, folder)
    os.dup2(os.open(os.devnull, os.O_RDWR), 2)  # a launcher waits until nobody has the rank's stderr any more
    error = watch(service, rank) or stop_service(service)
    tidy(folder)
    if error:
        write_whole(folder / "node.json", json.dumps({**note, "error": error}).encode() + b"\n")


def main() -> None:
    folder, host, rank = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # meant for the rank, after which this process ends
    try:
        keep(Path(folder), host, int(rank))
    except (ServiceFailed, UserError, OSError) as error:
        warn(host, str(error))


if __name__ == "__main__":
    main()
