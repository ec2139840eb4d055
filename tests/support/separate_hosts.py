"""Hosts on this machine: a host has a name and processes of its own, and all of them can die at once.

A namespace of Linux each (`unshare`): a rank there cannot see the processes of another host, as on a cluster.
The network is this machine's. Needs root.
"""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

# The first process of a host: it outlives what it starts, and its end ends everything on the host.
FIRST = """
echo "$1" > /proc/sys/kernel/hostname
mount --bind "$2" /etc/hosts
echo "$1 is up"
"${@:3}"
while :; do sleep 1000; done
"""


def write_hosts(path: Path, *names: str) -> Path:
    """An /etc/hosts in which these names are this machine."""
    path.write_text(Path("/etc/hosts").read_text() + "".join(f"127.0.0.1 {name}\n" for name in names))
    return path


@contextmanager
def start_hosts(folder: Path, *names: str) -> Iterator[dict[str, "Host"]]:
    """Skips the test where this user may not make them. folder: for their /etc/hosts."""
    if os.geteuid() or subprocess.run(["unshare", "--uts", "--pid", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make namespaces")
    file = write_hosts(folder / "hosts", *names)
    with ExitStack() as stack:
        hosts = {}
        for name in names:
            hosts[name] = Host(name, file, environment=dict(os.environ))
            stack.callback(hosts[name].stop)
        yield hosts


class Host:
    """Until `cut_power` or `stop`."""

    def __init__(self, name: str, hosts: Path, *command: object, environment: dict[str, str]) -> None:
        """hosts: its /etc/hosts; command: what it runs first of all."""
        self.name = name
        unshare = ["unshare", "--uts", "--pid", "--mount-proc", "--fork", "--kill-child"]
        self._process = subprocess.Popen(
            [*unshare, "bash", "-c", FIRST, "host", name, str(hosts), *map(str, command or ("true",))],
            env=environment, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdout and self._process.stdout.readline() == f"{name} is up\n"

    @property
    def pid(self) -> int:
        """Of its first process, as this machine counts."""
        return int(
            Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()[0]
        )

    def enter(self) -> list[str]:
        """What to write before a command to run it there."""
        return ["nsenter", "-t", str(self.pid), "--uts", "--pid", "--mount"]

    def cut_power(self) -> None:
        """All of its processes die, without a message to anybody."""
        os.kill(self.pid, signal.SIGKILL)
        self._process.wait(10)

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.kill()  # --kill-child: the first process dies with it
        self._process.wait(10)
