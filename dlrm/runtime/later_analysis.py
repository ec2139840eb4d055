"""Submit a run's analysis as a job of one node, for ANALYSIS=later of 3_train.sh.

usage: python -m dlrm.runtime.later_analysis WHEN RUN

    before      in a batch job, before its training: a job that starts when this one has ended, however it
                ended. In an interactive job nothing
    after       in an interactive job, after the training: a job that starts at once. In a batch job nothing
    JOB         for a training that is in the queue: a job that starts when that job has ended
    cancel      RUN is here the id of an analysis' job: it is taken out of the queue

Prints the new job's id, if there is one. Its options are those of DLRM_QSUB_ANALYSIS or DLRM_SBATCH_ANALYSIS;
else those of the training's job with one node and without its GPUs. A mistake, or a scheduler that refuses:
one line and exit code 2.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import USAGE, UserError
from dlrm.runtime.batch_job import PBS, SLURM, find_batch_job

SCRIPT = Path(__file__).parents[2] / "scripts" / "analyse_run.sh"
ANSWER_SECONDS = 60
# Options of sbatch about how many nodes, ranks and GPUs, all with a value. One letter: -N 2 or -N2.
SIZES = (
    *("-N", "-n", "-c", "-G", "-w"),
    *("--nodes", "--ntasks", "--ntasks-per-node", "--ntasks-per-gpu", "--cpus-per-task", "--cpus-per-gpu"),
    *("--gres", "--gpus", "--gpus-per-node", "--gpus-per-task", "--gpus-per-socket", "--gpu-bind"),
    *("--mem-per-gpu", "--mem-per-cpu", "--nodelist", "--array", "-a"),
)
# What tells a process that it is in a job; the new job has its own.
OF_A_JOB = re.compile(r"(PBS|SLURM|SBATCH)_(?!CONF|DEFAULT|SERVER|EXEC)|SLURMD_|DLRM_JOB_START")


def choose_scheduler(environ: Mapping[str, str]) -> str:
    job = find_batch_job(environ)
    if "DLRM_SBATCH" in environ or "DLRM_QSUB" in environ:
        return SLURM if "DLRM_SBATCH" in environ else PBS
    if job is None:
        raise UserError("ANALYSIS=later: no batch job here, and site.sh has no DLRM_QSUB or DLRM_SBATCH")
    return job.scheduler


def make_command(scheduler: str, after: str, environ: Mapping[str, str]) -> list[str]:
    if scheduler == PBS:
        waits = ["-W", f"depend=afterany:{after}"] if after else []
        return ["qsub", "-V", *_choose_pbs_options(environ), *waits, str(SCRIPT)]
    waits = [f"--dependency=afterany:{after}"] if after else []
    return ["sbatch", "--parsable", "--export=ALL", *_choose_slurm_options(environ), *waits, str(SCRIPT)]


def _choose_pbs_options(environ: Mapping[str, str]) -> list[str]:
    if "DLRM_QSUB_ANALYSIS" in environ:
        return shlex.split(environ["DLRM_QSUB_ANALYSIS"])
    words = shlex.split(environ.get("DLRM_QSUB", "")) or _ask_pbs(environ.get("PBS_JOBID", ""))
    kept: list[str] = []
    select = "select=1"
    for word, value in _pair_options(words, ("-l", "-N", "-J")):
        if word != "-l" and value is None:
            kept.append(word)
        elif word == "-l" and value:
            if re.match(r"(select|nodes)=", value):
                select = _reduce_to_one_chunk(value)
            elif not re.match(r"(place|ncpus|ngpus|mpiprocs)=", value):
                kept += ["-l", value]
    return [*kept, "-l", select]


def _reduce_to_one_chunk(resource: str) -> str:
    """ "select=2:system=x:ngpus=4+1:y" as "select=1:system=x": one node, for one process."""
    name, _, value = resource.partition("=")
    parts = value.split("+")[0].split(":")
    parts = parts[1:] if parts[0].isdecimal() else parts
    return ":".join([f"{name}=1", *(part for part in parts if not re.match(r"(ngpus|mpiprocs|ppn)=", part))])


def _ask_pbs(job: str) -> list[str]:
    """The options of a job, from qstat; none where it does not answer or is not understood."""
    try:
        facts = next(iter(json.loads(_run(["qstat", "-f", "-F", "json", job], os.environ))["Jobs"].values()))
        resources = facts["Resource_List"]
        words = ["-q", facts["queue"]]
        account = facts.get("Account_Name") or facts.get("project", "")
        words += ["-A", account] if account and not account.startswith("_pbs") else []
        for name in ("select", "filesystems"):
            words += ["-l", f"{name}={resources[name]}"] if name in resources else []
        return words
    except (UserError, ValueError, KeyError, TypeError, StopIteration, AttributeError):
        return []


def _choose_slurm_options(environ: Mapping[str, str]) -> list[str]:
    if "DLRM_SBATCH_ANALYSIS" in environ:
        return shlex.split(environ["DLRM_SBATCH_ANALYSIS"])
    words = shlex.split(environ.get("DLRM_SBATCH", ""))
    for option in ("account", "partition", "qos"):
        value = environ.get(f"SLURM_JOB_{option.upper()}")
        words += [f"--{option}={value}"] if "DLRM_SBATCH" not in environ and value else []
    kept = [word for word, value in _pair_options(words, SIZES) if value is None]
    # It works on all processors of its node.
    return [*kept, "--nodes=1", "--ntasks=1", "--exclusive"]


def _pair_options(words: Sequence[str], valued: Sequence[str]) -> list[tuple[str, str | None]]:
    """(option, its value) for options in `valued`, in any spelling; (word, None) for all other words."""
    pairs: list[tuple[str, str | None]] = []
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        if word in valued:
            pairs.append((word, left.pop(0) if left else ""))
        elif equals and name in valued:
            pairs.append((name, value))
        elif not word.startswith("--") and word[:2] in valued:
            pairs.append((word[:2], word[2:]))
        else:
            pairs.append((word, None))
    return pairs


def _run(command: Sequence[str], environ: Mapping[str, str]) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=ANSWER_SECONDS, env=environ,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{command[0]}: {error}") from None
    if done.returncode:
        raise UserError(f"{command[0]}: {' '.join(done.stderr.split())[:300] or 'refused'}")
    return done.stdout


def cancel(job: str) -> int:
    """Take an analysis out of the queue: its training was refused, and has left nothing."""
    try:
        scheduler = choose_scheduler(os.environ)
        _run(["qdel" if scheduler == PBS else "scancel", job], os.environ)
    except UserError as error:
        print(f"3_train.sh: {error}", file=sys.stderr)
        return USAGE
    return 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(usage=(__doc__ or "").split("usage: ")[1])
    parser.add_argument("when")
    parser.add_argument("run", type=Path)
    options = parser.parse_args(argv)
    if options.when == "cancel":
        return cancel(str(options.run))
    job, after = find_batch_job(os.environ), options.when
    if job and options.when in ("before", "after"):
        if job.unattended != (options.when == "before"):
            return 0
        after = job.id if job.unattended else ""
    try:
        command = make_command(choose_scheduler(os.environ), after, os.environ)
        kept = {name: value for name, value in os.environ.items() if not OF_A_JOB.match(name)}
        given = {"RUN": str(options.run.absolute()), "WORKDIR": str(SCRIPT.parents[1])}
        print(_run(command, kept | given).strip().split(";")[0])
    except UserError as error:
        print(f"3_train.sh: {error}", file=sys.stderr)
        return USAGE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
