"""A real Slurm of two nodes on this machine, from Debian's packages, for as long as a test needs it."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.debian import libraries_of, unpack_packages
from support.job_scripts import clean_environment
from support.ranks import free_port
from support.separate_hosts import Host, write_hosts

PACKAGES = (
    *("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins"),
    *("munge", "libmunge2", "libhwloc15", "liblua5.1-0"),
)
NODES = ("n1", "n2")
SIZE = "CPUs=8 RealMemory=8000"  # of each
CONFIG = """\
ClusterName=tests
SlurmctldHost={machine}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
PluginDir={folder}/plugins
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
KillWait=15
ReturnToService=2
MinJobAge=3600
SlurmdParameters=config_overrides
SlurmctldTimeout=30
SlurmdTimeout=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
PartitionName=tests Nodes=ALL Default=YES State=UP OverTimeLimit=0
"""


class Slurm:
    """The daemons, and how a user talks to them. `variables`: what every job gets."""

    def __init__(self, folder: Path, **variables: object) -> None:
        self.root = root = unpack_packages(PACKAGES)
        libraries = libraries_of(root)
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.hosts: dict[str, Host] = {}
        self.environment = clean_environment(
            SLURM_CONF=folder / "slurm.conf", MASTER_ADDR="127.0.0.1", **variables,
        )  # fmt: skip
        self.environment["PATH"] = f"{root}/usr/bin:{root}/usr/sbin:{self.environment['PATH']}"
        self.environment["LD_LIBRARY_PATH"] = f"{libraries}:{libraries}/slurm-wlm"
        (folder / "state").mkdir(parents=True)
        (folder / "plugins").symlink_to(libraries / "slurm-wlm")  # a path in its file cannot have a space
        self._write_config()
        try:
            self._start_daemons()
        except BaseException:
            self.stop()
            raise

    def _start_daemons(self) -> None:
        folder = self.folder
        self._start(
            "munged", "--foreground", "--force", f"--socket={folder}/munge.socket",
            f"--key-file={folder}/munge.key", f"--pid-file={folder}/munged.pid",
            f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munged.log", "--num-threads=1",
            "--group-check-mtime=-1",
        )  # fmt: skip
        self._until(lambda: (folder / "munge.socket").exists())
        self._start(self.root / "usr/sbin/slurmctld-wlm", "-D", "-c")
        write_hosts(folder / "hosts", *NODES)
        self.start_nodes(*NODES)

    def start_nodes(self, *names: str) -> None:
        """Nodes that have not run yet, or were lost."""
        for name in names:
            slurmd = [
                self.root / "usr/sbin/slurmd-wlm",
                "-N",
                name,
                "-d",
                self.root / "usr/sbin/slurmstepd-wlm",
            ]
            self.hosts[name] = Host(name, self.folder / "hosts", *slurmd, environment=self.environment)
        self._until(lambda: set(self.ask("sinfo", "-h", "-N", "-o", "%T").split()) == {"idle"})

    def _write_config(self) -> None:
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)
        text = CONFIG.format(machine=os.uname().nodename, port=free_port(), folder=self.folder)
        for name in NODES:
            text += f"NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={free_port()} {SIZE}\n"
        (self.folder / "slurm.conf").write_text(text)

    def _start(self, *command: object) -> None:
        self._daemons.append(
            subprocess.Popen(
                list(map(str, command)),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        )

    def _until(self, true: Callable[[], Any], seconds: float = 60) -> Any:
        given_up = time.monotonic() + seconds
        while time.monotonic() < given_up:
            if found := true():
                return found
            time.sleep(0.1)
        raise AssertionError(f"waited {seconds} s in vain; {self.ask('squeue')}")

    def ask(self, *command: object, **more: object) -> str:
        """What a command of Slurm, or any other, prints."""
        done = subprocess.run(
            list(map(str, command)), env=self.environment | {k: str(v) for k, v in more.items()},
            cwd=self.folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def submit(self, *words: object, **more: object) -> str:
        """The job's id."""
        return self.ask("sbatch", "--parsable", *words, **more)

    def facts(self, job: str) -> dict[str, str]:
        """What Slurm says of a job: JobState, ExitCode, Restarts, ..."""
        return dict(
            word.split("=", 1)
            for word in self.ask("scontrol", "-o", "show", "job", job).split()
            if "=" in word
        )

    def wait(self, job: str, seconds: float = 90) -> dict[str, str]:
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self._until(lambda: self.facts(job)["JobState"] in ended, seconds)
        self._until(lambda: not self.ask("squeue", "-h", "-j", job, "-t", "COMPLETING"))
        return self.facts(job)

    def restart_when_requeued(self, job: str) -> None:
        """Slurm waits two minutes, so that all nodes know that the old start is over; here two seconds do."""
        self._until(lambda: self.facts(job)["JobState"] == "PENDING")
        self._until(lambda: set(self.ask("sinfo", "-h", "-N", "-o", "%T").split()) == {"idle"})
        time.sleep(2)
        self.ask("scontrol", "update", f"jobid={job}", "starttime=now")

    def analysis_of(self, run: Path) -> str:
        """The id of the job that analyses this run."""
        jobs = self.ask("squeue", "-h", "-a", "-t", "all", "-n", "dlrm-analysis", "-o", "%i").split()
        for job in jobs:
            self.wait(job)
        [job] = [job for job in jobs if str(run) in (self.folder / f"dlrm-analysis.o{job}").read_text()]
        return job

    def until_step(self, run: Path, step: int) -> None:
        self._until(lambda: last_step(run) >= step)

    def stop(self) -> None:
        for host in self.hosts.values():
            host.stop()
        for process in reversed(self._daemons):
            process.terminate()
            process.wait(20)


def last_step(run: Path) -> int:
    """The newest step of metrics.jsonl, 0 if there is none."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)
