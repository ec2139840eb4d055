"""Hosts of an MPI job on one machine: namespaces with names of their own, which share files and network."""

import shutil
import subprocess
from pathlib import Path

import pytest
from support.ranks import MPIEXEC

# What mpiexec calls in the place of ssh: HOST COMMAND...
ENTER = """#!/bin/sh
host=$1
shift
exec unshare --uts sh -c 'hostname "$1"; shift; exec sh -c "$*"' sh "$host" "$@"
"""


def start_on_hosts(folder: Path, hosts: list[str]) -> tuple[tuple[object, ...], dict[str, str]]:
    """(an mpiexec command with a rank on each host, variables that it needs). Skips the test where this user
    may make no namespaces. folder: for a script.
    """
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "--uts", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make a namespace")
    enter = folder / "enter_host"
    enter.write_text(ENTER)
    enter.chmod(0o755)
    command = (MPIEXEC, "-hosts", ",".join(hosts), "-n", len(hosts), "-ppn", 1)
    variables = {
        "HYDRA_LAUNCHER": "rsh", "HYDRA_LAUNCHER_EXEC": str(enter), "MASTER_ADDR": "127.0.0.1",
        "DLRM_JOB_TOKEN": "x" * 32,
    }  # fmt: skip
    return command, variables
