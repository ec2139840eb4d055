"""launcher.sh: the variables inside a rank, the line that starts ranks, and how all of them end."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.ranks import MPIEXEC, LiveRanks, words
from support.separate_hosts import start_hosts

ROOT = Path(__file__).parents[2]
SHOW = 'echo "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR"'
PREFIXES = (  # what a job would set
    *("PMI", "PALS", "OMPI", "SLURM", "PBS", "MPI", "DLRM_", "MASTER", "RANK", "WORLD", "LOCAL"),
    *("NPROC", "CUDA"),
)


def clean_environment(**more: object) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(PREFIXES)}
    kept["PATH"] = f"{Path(sys.executable).parent}:{kept['PATH']}"
    return kept | {name: str(value) for name, value in more.items()}


def launch(*words: object, timeout: float = 60, **environment: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "launcher.sh"), *map(str, words)],
        env=clean_environment(**environment), capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def show_rank(**environment: Any) -> str:
    done = launch("bash", "-c", SHOW, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "names",
    [
        {"PMI_RANK": 5, "PMI_SIZE": 8, "PMI_LOCAL_RANK": 1, "PMI_LOCAL_SIZE": 4},
        {"PMI_RANK": 5, "PMI_SIZE": 8, "MPI_LOCALRANKID": 1, "MPI_LOCALNRANKS": 4},
        {"PALS_RANKID": 5, "PMI_SIZE": 8, "PALS_LOCAL_RANKID": 1, "PALS_LOCAL_SIZE": 4},
        {"PMIX_RANK": 5, "DLRM_WORLD_SIZE": 8, "MPI_LOCALRANKID": 1, "MPI_LOCALNRANKS": 4},
        {
            "OMPI_COMM_WORLD_RANK": 5, "OMPI_COMM_WORLD_SIZE": 8,
            "OMPI_COMM_WORLD_LOCAL_RANK": 1, "OMPI_COMM_WORLD_LOCAL_SIZE": 4,
        },
        {
            "SLURM_PROCID": 5, "SLURM_STEP_NUM_TASKS": 8,
            "SLURM_LOCALID": 1, "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        },
        {
            "TORCHELASTIC_RUN_ID": "x", "RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4,
            "PMI_RANK": 0, "PMI_SIZE": 2,
        },
    ],
    ids=["pmi", "hydra", "pals", "pmix", "openmpi", "slurm", "torchrun"],
)  # fmt: skip
def test_names_inside_a_rank(names: dict[str, Any]) -> None:
    assert show_rank(MASTER_ADDR="first", MASTER_PORT=1, **names) == "5 8 1 4 first"


def test_an_sbatch_script_is_not_a_rank() -> None:
    line = launch("true", DRY_RUN=1, SLURM_PROCID=0, SLURM_NTASKS=8, NPROC=2, MPIEXEC="run {N}").stdout
    assert line.startswith("run 2 ")


def test_the_first_node_comes_from_the_node_file(tmp_path: Path) -> None:
    (tmp_path / "nodes").write_text("nid2\nnid1\n")
    names = {"PMI_RANK": 1, "PMI_SIZE": 2, "PMI_LOCAL_RANK": 0, "PMI_LOCAL_SIZE": 1}
    assert show_rank(PBS_NODEFILE=tmp_path / "nodes", PBS_JOBID="1", **names).endswith(" nid2")


def test_without_one_it_asks() -> None:
    names = {"PMI_RANK": 1, "PMI_SIZE": 2, "PMI_LOCAL_RANK": 0, "PMI_LOCAL_SIZE": 1}
    done = launch("true", **names)
    assert done.returncode == 2 and "rank 1" in done.stderr and "MASTER_ADDR" in done.stderr


@pytest.mark.parametrize(
    ("local_rank", "devices", "order", "mine"),
    [(0, "0,1,2,3", "", "0"), (1, "0,1,2,3", "reverse", "2"), (5, "0,1,2,3", "", "1"),
     (1, "4,GPU-a", "", "GPU-a"), (3, "7", "reverse", "7"), (0, "", "", "")],
)  # fmt: skip
def test_a_gpu_for_each_local_rank(local_rank: int, devices: str, order: str, mine: str) -> None:
    names = {"PMI_RANK": local_rank, "PMI_SIZE": 8, "PMI_LOCAL_RANK": local_rank, "PMI_LOCAL_SIZE": 8}
    done = launch(
        "bash", "-c", 'echo "[$CUDA_VISIBLE_DEVICES]"',
        CUDA_VISIBLE_DEVICES=devices, DLRM_GPU_ORDER=order, MASTER_ADDR="a", MASTER_PORT=1, **names,
    )  # fmt: skip
    assert done.stdout.strip() == f"[{mine}]"


@pytest.mark.parametrize(
    ("nodes", "nproc", "line"),
    [("a\na\n", None, "2 2"), ("a\nb\n", 4, "8 4"), ("a\nb\na\nb\n", None, "4 2"), ("a\n", 3, "3 3")],
)
def test_ranks_as_the_scheduler_was_asked(tmp_path: Path, nodes: str, nproc: int | None, line: str) -> None:
    (tmp_path / "nodes").write_text(nodes)
    more: dict[str, Any] = {} if nproc is None else {"NPROC": nproc}
    done = launch(
        "a b", "$c", DRY_RUN=1, MPIEXEC="run {N} {PPN}", PBS_NODEFILE=tmp_path / "nodes",
        CUDA_VISIBLE_DEVICES="", **more,
    )  # fmt: skip
    assert shlex.split(done.stdout) == ["run", *line.split(), f"{ROOT}/launcher.sh", "a b", "$c"]


@pytest.mark.parametrize(
    ("words", "environment", "says"),
    [
        ([], {}, "no command given"),
        (["true"], {"NPROC": "two"}, "NPROC=two"),
        (["true"], {"NPROC": "0"}, "NPROC=0"),
        (["true"], {"MPIEXEC": "no-such-mpiexec"}, "no no-such-mpiexec on PATH"),
        (["true"], {"PMIX_RANK": "1"}, "DLRM_WORLD_SIZE"),
    ],
)
def test_mistakes(words: list[str], environment: dict[str, Any], says: str) -> None:
    done = launch(*words, **environment)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1


def test_unequal_nodes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "nodes").write_text("a\na\nb\n")
    done = launch("true", PBS_NODEFILE=tmp_path / "nodes")
    assert done.returncode == 2 and "NPROC" in done.stderr


def test_pbs_threads_are_not_believed() -> None:
    """PBS sets OMP_NUM_THREADS to the chunk's cores, 1 by default, and nproc reports that."""
    show = 'import os; os.write(1, f\'{os.environ["OMP_NUM_THREADS"]} {os.environ["TMPDIR"]}\\n\'.encode())'
    here = str(max(1, len(os.sched_getaffinity(0)) // 2))
    done = launch(sys.executable, "-c", show, NPROC=2, OMP_NUM_THREADS=97, TMPDIR="/somewhere/long")
    assert set(done.stdout.splitlines()) <= {f"{n} /tmp" for n in range(1, int(here) + 1)}
    assert launch(sys.executable, "-c", show, NPROC=2, DLRM_THREADS=3).stdout.splitlines() == ["3 /tmp"] * 2


@pytest.mark.mpi
def test_two_real_ranks_meet() -> None:
    code = (
        "import torch, torch.distributed as d; d.init_process_group('gloo'); t = torch.ones(1); "
        "d.all_reduce(t); import os; os.write(1, f'{int(t)} {d.get_rank()}\\n'.encode())"
    )
    program = [str(ROOT / "launcher.sh"), sys.executable, "-c", code]
    for command in (program, [MPIEXEC, "-n", "2", *program]):
        done = subprocess.run(
            command, env=clean_environment(NPROC=2), capture_output=True, text=True, timeout=90
        )
        assert sorted(done.stdout.split("\n")) == ["", "2 0", "2 1"], done.stderr


@pytest.mark.mpi
@pytest.mark.parametrize("reached", [True, False])
def test_nodes_that_mpiexec_does_not_reach(tmp_path: Path, reached: bool) -> None:
    """mpiexec's proxies are started by PBS's pbs_tmrsh; here it starts them on this machine, or hangs."""
    (tmp_path / "nodes").write_text("n1\nn2\n")
    rest = 'shift; exec "$@"' if reached else "exec sleep 60"
    (tmp_path / "pbs_tmrsh").write_text(f"#!/bin/bash\n{rest}\n")
    (tmp_path / "pbs_tmrsh").chmod(0o755)
    begun = time.monotonic()
    done = launch(
        "bash", "-c", "echo rank $RANK", NPROC=1, PBS_NODEFILE=tmp_path / "nodes",
        DLRM_START_TIMEOUT=20 if reached else 2,
        PATH=f"{tmp_path}:{os.environ['PATH']}", MASTER_ADDR="127.0.0.1",
    )  # fmt: skip
    if reached:
        assert sorted(done.stdout.split("\n")) == ["", "rank 0", "rank 1"], done.stderr
        return
    assert done.returncode == 2 and time.monotonic() - begun < 20
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("launcher.sh: ")]
    assert "does not reach all nodes (n1 n2)" in line and "within 2 s" in line and "HYDRA_IFACE" in line


@pytest.mark.mpi
def test_a_failing_rank_ends_the_job() -> None:
    """mpich's mpiexec by itself waits for the others, which wait for the one that is gone."""
    begun = time.monotonic()
    done = launch("bash", "-c", "[[ $RANK == 0 ]] || exit 7; sleep 50", NPROC=2)
    assert done.returncode == 7 and time.monotonic() - begun < 10
    done = launch("bash", "-c", "[[ $RANK == 0 ]] || kill -9 $$; sleep 50", NPROC=2)
    assert done.returncode != 0 and time.monotonic() - begun < 20


@pytest.mark.mpi
@pytest.mark.parametrize(("count", "rank"), [(2, 0), pytest.param(2, 1, marks=pytest.mark.slow), (3, 2)])
def test_a_rank_killed_in_the_training_is_named(toy: Path, tmp_path: Path, count: int, rank: int) -> None:
    """By the other ranks, before mpiexec ends them."""
    more = words(toy, "--epochs", 1000, "--timeout", 600)
    with LiveRanks(tmp_path, count, *more, launcher="launcher.sh") as ranks:
        ranks.until_step(10)
        ranks.signal(signal.SIGKILL, rank)
        (code,) = ranks.wait(120)
        assert code != 0
        ranks.until_gone()
    named = f"rank {rank} on {socket.gethostname()} was killed by signal 9"
    assert named in ranks.stderr and "Traceback" not in ranks.stderr, ranks.stderr


@pytest.mark.mpi
def test_a_lost_node_is_named(tmp_path: Path) -> None:
    """mpich's mpiexec ends before a rank can tell."""
    with start_hosts(tmp_path, "n1", "n2") as hosts:
        pids = "\n".join(f"{host.name}) pid={host.pid} ;;" for host in hosts.values())
        enter = 'shift; exec nsenter -t "$pid" --uts --pid --mount "$@"'
        (tmp_path / "pbs_tmrsh").write_text(f"#!/bin/bash\ncase $1 in\n{pids}\nesac\n{enter}\n")
        (tmp_path / "pbs_tmrsh").chmod(0o755)
        (tmp_path / "nodes").write_text("n1\nn2\n")
        job = subprocess.Popen(
            [str(ROOT / "launcher.sh"), "bash", "-c", "echo $RANK on $(uname -n); sleep 60"],
            env=clean_environment(
                NPROC=2, PBS_NODEFILE=tmp_path / "nodes", MASTER_ADDR="127.0.0.1",
                PATH=f"{tmp_path}:{os.environ['PATH']}",
            ),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert job.stdout
        lines = {job.stdout.readline() for _ in range(4)}
        assert lines == {f"{rank} on n{1 + rank // 2}\n" for rank in range(4)}
        hosts["n2"].cut_power()
        _, errors = job.communicate(timeout=40)
    (line,) = [line for line in errors.splitlines() if line.startswith("launcher.sh: ")]
    assert job.returncode == 255 and "lost its connection to n2 (ranks 2-3)" in line


@pytest.mark.mpi
@pytest.mark.parametrize("code", [0, 75, 3])
def test_terminate_reaches_every_rank_and_waits_for_the_slowest(code: int) -> None:
    program = f"""
import os, signal, time
def save(*_):
    time.sleep(0.2 + 1.5 * int(os.environ["RANK"]))
    os.write(1, b"saved\\n")
    os._exit({code})
signal.signal(signal.SIGTERM, save)
os.write(1, b"ready\\n")
time.sleep(50)
"""
    ranks = subprocess.Popen(
        [str(ROOT / "launcher.sh"), sys.executable, "-c", program], env=clean_environment(NPROC=2),
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert ranks.stdout
    assert [ranks.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    ranks.send_signal(signal.SIGTERM)
    assert ranks.stdout.read().count("saved") == 2
    assert ranks.wait(90) == code


@pytest.mark.mpi
def test_ranks_that_stop_cleanly_do_not_cut_each_other_short() -> None:
    """75 is how training says: all ranks stopped after the same batch, run me again."""
    program = (
        "import os, time; time.sleep(3 * int(os.environ['RANK'])); os.write(1, b'done\\n'); os._exit(75)"
    )
    done = launch(sys.executable, "-c", program, NPROC=2)
    assert done.stdout.count("done") == 2 and done.returncode == 75
