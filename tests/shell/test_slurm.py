"""The job scripts under a real Slurm of two nodes: shapes of jobs, and all ways in which a job ends."""

import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import plain_training
from support.analysis_command import run_command
from support.made_traces import training
from support.slurm import Slurm, last_step

from analysis.trace.events import read_processes

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "3_train.sh"
SRUN = "srun -n {N} --ntasks-per-node {PPN} -c {DEPTH} --kill-on-bad-exit=1"
SHORT = "--preset toy --limit_train_batches 4 --limit_val_batches 1 --limit_test_batches 1 --report_every 1"
LONG = (
    "--preset toy --epochs 5000 --report_every 1 --checkpoint_every_steps 5 --limit_val_batches 1 "
    "--limit_test_batches 1 --batch_size 64 --timeout 20"
)
pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def slurm(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "site.sh").write_text("export MPIEXEC=${TEST_MPIEXEC-}\n")
    cluster = Slurm(
        folder / "cluster", DATASET_DIR=toy, RESULTS=folder / "results", WORKDIR=ROOT, OMP_NUM_THREADS=1,
        DLRM_THREADS=1, OMP_WAIT_POLICY="passive", DLRM_SITE=folder / "site.sh",
    )  # fmt: skip
    try:
        yield cluster
    finally:
        cluster.stop()


def results(slurm: Slurm) -> Path:
    return Path(slurm.environment["RESULTS"])


def log_of(slurm: Slurm, job: str) -> str:
    return (slurm.folder / f"dlrm-train.o{job}").read_text()


def find_rank(run: Path, rank: int) -> int:
    """The pid of a rank that trains into this folder, as this machine counts."""
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if (
            words[1:3] == [b"-m", b"dlrm.train"]
            and {str(run).encode()} <= set(words)
            and (f"RANK={rank}".encode() in environment)
        ):
            return int(entry.name)
    raise AssertionError(f"no rank {rank} of {run}")


# Stands for a training where ranks are counted.
SMALL_SCRIPT = """
import os, pathlib, sys
folder = pathlib.Path(sys.argv[1])
with open(folder / os.environ["RANK"], "w") as file:
    file.write(os.environ["WORLD_SIZE"])
"""


def test_jobs_of_every_shape_have_the_ranks_that_were_asked_for(slurm: Slurm, tmp_path: Path) -> None:
    """One rank once hung without end: its step looked like the batch script. One per node needs no word."""
    script = tmp_path / "script.py"
    script.write_text(SMALL_SCRIPT)
    asked = {
        ("-N1", SRUN): 1,
        ("-N2", SRUN): 2,
        ("-N2 --ntasks-per-node=2", ""): 4,
        ("-N1 -n2", SRUN): 2,
        ("-N2 -n2", f"{SRUN} --mpi=pmi2"): 2,
    }  # fmt: skip
    jobs = {}
    for number, ((words, mpiexec), ranks) in enumerate(asked.items()):
        (out := tmp_path / str(number)).mkdir()
        more = {"TRACE": "no", "MODEL": script, "ARGS": out, "TEST_MPIEXEC": mpiexec}
        jobs[slurm.submit(*words.split(), SCRIPT, **more)] = out, ranks
    for job, (out, ranks) in jobs.items():
        facts = slurm.wait(job)
        assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), log_of(slurm, job)
        assert {path.name: path.read_text() for path in out.iterdir()} == {
            str(rank): str(ranks) for rank in range(ranks)
        }


def test_unequal_nodes_and_srun_around_the_script_are_refused(slurm: Slurm) -> None:
    show = slurm.folder / "show.sh"
    show.write_text(
        f"#!/bin/bash\n{shlex.quote(str(ROOT))}/launcher.sh true; srun -n2 {shlex.quote(str(SCRIPT))}\n"
    )
    job = slurm.submit("-N2", "-n3", "-o", slurm.folder / "refused", show)
    slurm.wait(job)
    text = (slurm.folder / "refused").read_text()
    assert "Slurm gives its nodes unequal shares, 2,1: ask it for --ntasks-per-node, or set NPROC" in text
    assert text.count("call it once, without srun or mpiexec") == 2


@pytest.mark.parametrize("mpiexec", ["", SRUN], ids=["mpich", "srun"])
def test_scancel_saves_and_books_75(slurm: Slurm, mpiexec: str) -> None:
    job = slurm.submit("-N2", SCRIPT, TRACE="no", ARGS=LONG, TEST_MPIEXEC=mpiexec)
    run = results(slurm) / job
    slurm.until_step(run, 7)
    slurm.ask("scancel", job)
    facts = slurm.wait(job)
    assert (facts["JobState"], facts["ExitCode"]) == ("CANCELLED", "75:0"), log_of(slurm, job)
    assert any(path.name.endswith(f"step-{last_step(run)}") for path in (run / "checkpoints").iterdir())
    assert f"RESUME='{run}' and the same command" in log_of(slurm, job)


def test_a_requeued_job_resumes_in_its_own_folder_and_a_killed_rank_is_named(slurm: Slurm) -> None:
    job = slurm.submit("-n2", "-N2", SCRIPT, TRACE="no", ARGS=LONG, TEST_MPIEXEC=SRUN)
    run = results(slurm) / job
    slurm.until_step(run, 7)
    slurm.ask("scontrol", "requeue", job)
    slurm.restart_when_requeued(job)
    saved = last_step(run)
    slurm.until_step(run, saved + 5)
    os.kill(find_rank(run, 1), signal.SIGKILL)
    facts = slurm.wait(job)
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "1")
    steps = [
        json.loads(line)["step"]
        for line in (run / "metrics.jsonl").read_text().splitlines()
        if "loss" in line
    ]
    log = log_of(slurm, job)
    assert steps[: saved + 3] == list(range(1, saved + 4)), log
    assert "launcher.sh: rank 1 on n2: killed by signal 9" in log
    assert "rank 0 on n1: ends because rank 1 on n2 is gone" in log and "rank 1 on n2" in log.splitlines()[-1]
    assert not (run.parent / f"{job}-2").exists()


def test_a_job_script_that_trains_twice_has_two_folders(slurm: Slurm) -> None:
    twice = slurm.folder / "twice.sh"
    twice.write_text(f"#!/bin/bash\nfor seed in 1 2; do {shlex.quote(str(SCRIPT))} --seed $seed; done\n")
    job = slurm.submit("-N1", twice, TRACE="no", ARGS=SHORT, TEST_MPIEXEC=SRUN)
    assert slurm.wait(job)["ExitCode"] == "0:0"
    seeds = [
        json.loads((results(slurm) / name / "config.json").read_text())["run"]["seed"]
        for name in (job, f"{job}-2")
    ]
    assert seeds == [1, 2]


def test_a_script_is_traced_by_srun(slurm: Slurm, tmp_path: Path) -> None:
    """A rank on each node, without 3_train.sh: ranks, hosts and their clocks are in the trace."""
    data, out, run = plain_training.make_data(tmp_path / "data"), tmp_path / "out", tmp_path / "run"
    out.mkdir()
    words = (
        "srun", "-N2", "-n2", "--ntasks-per-node=1", ROOT / "launcher.sh", sys.executable, "-m",
        "dlrm.traced", "--output_dir", run, plain_training.__file__, data, out,
    )  # fmt: skip
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\n{shlex.join(map(str, words))}\n")
    job = slurm.submit("-N2", "--ntasks-per-node=1", "-o", tmp_path / "log", script)
    assert slurm.wait(job)["ExitCode"] == "0:0", (tmp_path / "log").read_text()
    assert sorted(path.name for path in out.glob("*.txt")) == ["losses0.txt", "losses1.txt"]
    ranks = {
        p.rank: (p.host, p.world_size, set(p.barriers)) for p in read_processes(run) if p.role == "train"
    }
    assert ranks == {rank: (f"n{rank + 1}", 2, {"start", "end"}) for rank in (0, 1)}
    config = json.loads((run / "config.json").read_text())
    assert (config["launch"]["world_size"], config["launch"]["nodes"]) == (2, 2)


def test_analysis_later_is_a_job_of_one_node_with_the_same_results(slurm: Slurm, tmp_path: Path) -> None:
    """By sbatch alone; and by --submit, which submits both jobs."""
    more = {"ARGS": SHORT, "TEST_MPIEXEC": SRUN, "ANALYSIS": "later"}
    first = slurm.submit("-N2", SCRIPT, **more)
    second = slurm.ask(SCRIPT, "--submit", DLRM_SBATCH="-N 1", **more)
    for job in (first, second):
        assert slurm.wait(job)["ExitCode"] == "0:0", log_of(slurm, job)
        run = results(slurm) / job
        later = slurm.analysis_of(run)
        facts = slurm.wait(later)
        assert (facts["NumNodes"], facts["ExitCode"]) == ("1", "0:0")
        assert facts["StartTime"] >= slurm.facts(job)["EndTime"]
        names = ["summary.json", *(path.name for path in run.glob("*.pftrace"))]
        assert len(names) == 3
        copied = shutil.copytree(run, tmp_path / job, ignore=shutil.ignore_patterns(*names))
        assert run_command("finish", copied).code == 0
        for name in names:
            assert (copied / name).read_bytes() == (run / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mpiexec", "says"),
    [
        ({"TEST_MPIEXEC": SRUN}, "rank 0 on n1: ends because rank 1 on n2 is gone"),
        ({}, "mpiexec lost its connection to n2 (rank 1)"),
    ],
)
def test_a_lost_node_is_named(slurm: Slurm, mpiexec: dict[str, str], says: str) -> None:
    job = slurm.submit("-N2", "--no-requeue", SCRIPT, TRACE="no", ARGS=LONG, **mpiexec)
    slurm.until_step(results(slurm) / job, 7)
    slurm.hosts["n2"].cut_power()
    facts = slurm.wait(job)
    slurm.start_nodes("n2")
    assert facts["JobState"] in ("FAILED", "NODE_FAIL"), log_of(slurm, job)
    assert says in log_of(slurm, job)


@pytest.mark.slow
def test_a_report_from_jobs_of_dask(slurm: Slurm, tmp_path: Path) -> None:
    """The same tables as from this machine's cores, by workers that Dask submits as jobs."""
    pytest.importorskip("dask_jobqueue")
    for rank in range(4):
        training(rank, 4, steps=5, host=f"n{rank // 2}").write(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    assert run_command("report", tmp_path / "alone").code == 0
    settings = {"CORES": 1, "MEMORY": "1GB", "LOG_DIRECTORY": tmp_path / "logs", "INTERFACE": "lo"}
    more = {f"DASK_JOBQUEUE__SLURM__{name}": value for name, value in settings.items()}
    words = ["report", tmp_path / "run", "--dask", "slurm"]
    slurm.ask(sys.executable, "-m", "analysis", *words, PYTHONPATH=ROOT, **more)
    assert "dask-worker" in slurm.ask("squeue", "-h", "-a", "-t", "all", "-o", "%j")
    for path in (tmp_path / "alone/tables").iterdir():
        if path.name != "timeline.csv":  # the last digit depends on the order in which ranks are added up
            assert path.read_bytes() == (tmp_path / "run/tables" / path.name).read_bytes(), path.name
    more["DASK_JOBQUEUE__SLURM__MEMORY"] = "1TB"
    with pytest.raises(AssertionError) as refused:
        slurm.ask(sys.executable, "-m", "analysis", *words, PYTHONPATH=ROOT, **more)
    (line,) = str(refused.value).splitlines()[:1]
    assert line.startswith("analysis: --dask slurm: no job was taken: ") and "not available" in line
