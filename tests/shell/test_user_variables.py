"""Variables of DFTracer, NCCL and torch that a user has exported: honoured, or refused in one line."""

import gzip
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.job_scripts import clean_environment
from support.ranks import free_port

ROOT = Path(__file__).parents[2]
SMALL = "--preset toy --limit_train_batches 3 --limit_val_batches 1 --limit_test_batches 1 --report_every 1"


def run(script: str, *words: str, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / script), *words], cwd=ROOT, env=clean_environment(**more),
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def test_a_run_has_what_was_exported_and_env_txt_says_so(toy: Path, tmp_path: Path) -> None:
    """Only I/O below DFTRACER_DATA_DIR is in the trace, on as many ranks as LOCAL_WORLD_SIZE says."""
    port = free_port()
    done = run(
        "3_train.sh", DATASET_DIR=toy, RESULTS=tmp_path, ARGS=SMALL, DFTRACER_ENABLE=1, DFTRACER_DATA_DIR=toy,
        LOCAL_WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, NCCL_COLLNET_ENABLE=0,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    [folder] = tmp_path.iterdir()
    values = dict(
        line.split("=", 1) for line in (folder / "env.txt").read_text().splitlines() if "='" in line
    )
    wanted = {
        "DFTRACER_ENABLE": "1", "DFTRACER_DATA_DIR": toy, "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2",
        "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NCCL_COLLNET_ENABLE": "0",
    }  # fmt: skip
    assert {name: values[name] for name in wanted} == {name: f"'{value}'" for name, value in wanted.items()}
    assert (folder / "env.txt").stat().st_mode & 0o777 == 0o600
    named = set()
    for path in (folder / "trace").glob("train*.pfw.gz"):
        for line in gzip.decompress(path.read_bytes()).decode().splitlines():
            if line.startswith("{") and (event := json.loads(line.rstrip(",")))["name"] == "FH":
                named.add(event["args"]["name"])
    assert any(name.startswith(f"{toy}/day_") for name in named)
    assert not any(name.endswith((".pyc", ".so")) for name in named)


def test_a_run_without_a_trace(toy: Path, tmp_path: Path) -> None:
    done = run(
        "3_train.sh", DATASET_DIR=toy, RESULTS=tmp_path, ARGS=SMALL, DFTRACER_ENABLE=0, DFTRACER_LOG_FILE="/x"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [folder] = tmp_path.iterdir()
    assert not (folder / "trace").exists()
    assert "DFTRACER_ENABLE='0'" in (folder / "env.txt").read_text()


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"DFTRACER_LOG_FILE": "/x/trace"}, "DFTRACER_LOG_FILE=/x/trace: traces are in the trace folder"),
        ({"DFTRACER_DATA_DIR": "/no/such"}, "DFTRACER_DATA_DIR=/no/such: '/no/such' is not a folder"),
        ({"DFTRACER_ENABLE": "yes"}, "DFTRACER_ENABLE=yes: wanted 1 or 0"),
        ({"DFTRACER_ENABLE": "1", "TRACE": "no"}, "TRACE=no contradicts DFTRACER_ENABLE=1"),
    ],
)
def test_refused_before_anything_is_made(
    toy: Path, tmp_path: Path, variables: dict[str, str], says: str
) -> None:
    done = run("3_train.sh", DATASET_DIR=toy, RESULTS=tmp_path / "results", ARGS=SMALL, **variables)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"NPROC": 2, "LOCAL_WORLD_SIZE": 4}, "NPROC=2 contradicts LOCAL_WORLD_SIZE=4: unset one of them"),
        ({"LOCAL_WORLD_SIZE": "all"}, "NPROC=all: wanted the number of ranks per node"),
        ({"MASTER_PORT": 65536}, "MASTER_PORT=65536: wanted a port"),
        ({"MASTER_PORT": "any"}, "MASTER_PORT=any: wanted a port"),
    ],
)
def test_launcher_refuses(variables: dict[str, object], says: str) -> None:
    done = run("launcher.sh", "true", **variables)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1


def test_local_world_size_is_the_ranks_per_node() -> None:
    done = run("launcher.sh", "true", LOCAL_WORLD_SIZE=3, MPIEXEC="run {N}", DRY_RUN=1)
    assert done.stdout.startswith("run 3 ")


def test_site_files_leave_what_the_user_has_exported() -> None:
    """Every NCCL and libfabric variable of every site; the ranks read env.sh again."""
    for path in sorted(ROOT.glob("sites/*.sh")):
        lines = 'source sites/generic.sh; source "$0"; site_print_env'
        text = subprocess.run(
            ["bash", "-euc", lines, path], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        names = sorted(set(re.findall(r"\b(?:NCCL|FI)_[A-Z_]+(?==)", text)))
        assert names or path.stem != "polaris"
        show = f'eval "$TEXT"; {"; ".join(f"echo ${{{name}-unset}}" for name in names) or "true"}'
        bash = [shutil.which("bash") or "bash", "-c", show]
        mine = dict.fromkeys(names, "mine")
        kept = subprocess.run(bash, env={"TEXT": text} | mine, capture_output=True, text=True, check=True)
        assert kept.stdout.split() == ["mine"] * len(names)
        own = subprocess.run(bash, env={"TEXT": text}, capture_output=True, text=True, check=True).stdout
        assert "unset" not in own and (path.stem != "polaris" or "AWS Libfabric\n" in own)
