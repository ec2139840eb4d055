"""Ranks without the start of an interpreter: a server process that has imported the trainer forks each.

In: a module, its words, its environment, two files for what it prints. Out: a `ForkedRank`, which has what
the tests use of `subprocess.Popen`. Imports take seconds of a core for each rank, and few tests are about
them. `support.ranks` says which ranks are processes of their own.
"""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

from support.command_server import import_programs, run_module

ROOT = Path(__file__).parents[2]
MODULES = (
    "dlrm.train", "dlrm.bert4rec", "dlrm.bench", "dlrm.scripts.main", "dlrm.scripts.dlrm_train_eval",
    "support.model_ranks", "support.forming_ranks",
)  # fmt: skip
LOADED_WITH = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # read when libraries are loaded


class ForkedRank:
    """A child of the server."""

    def __init__(self, server: "RankServer", pid: int) -> None:
        self._server, self.pid = server, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        given_up = time.monotonic() + timeout if timeout is not None else None
        while (code := self.poll()) is None:
            if given_up is not None and time.monotonic() > given_up:
                raise subprocess.TimeoutExpired(f"rank with pid {self.pid}", timeout or 0)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class RankServer:
    """Ends when the tests do: its socket is then closed. preload: a library loaded before all others."""

    def __init__(self, preload: str) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            subprocess.Popen(
                [sys.executable, "-m", "support.forked_ranks", str(theirs.fileno())], cwd=ROOT,
                stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
                env=os.environ | LOADED_WITH | {
                    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "LD_PRELOAD": preload,
                },
            )  # fmt: skip

    def ask(self, request: dict[str, Any], files: Sequence[IO[str]] = ()) -> Any:
        socket.send_fds(self._socket, [json.dumps(request).encode()], [file.fileno() for file in files])
        return json.loads(self._socket.recv(1 << 16))

    def start(
        self, module: str, words: Sequence[str], environment: Mapping[str, str], out: IO[str], err: IO[str]
    ) -> ForkedRank:
        request = {"module": module, "words": [*words], "environment": {**environment}}
        return ForkedRank(self, self.ask(request, (out, err)))


@cache
def rank_server(preload: str = "") -> RankServer:
    return RankServer(preload)


def serve(requests: socket.socket) -> None:
    import_programs()
    gc.freeze()  # or a collection in a fork would copy all pages that the imports have filled
    while True:
        message, files, _, _ = socket.recv_fds(requests, 1 << 20, 2)
        if not message:
            return
        request = json.loads(message)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                requests.close()
                run_rank(request, *files)
            for file in files:
                os.close(file)
        requests.send(json.dumps(answer).encode())


def run_rank(request: dict[str, Any], out: int, err: int) -> None:
    """Become `python -m MODULE WORD...` in a session of its own."""
    os.setsid()
    for file, number in ((out, 1), (err, 2)):
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(request["environment"])
    run_module([request["module"], *request["words"]])
    os._exit(0)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
