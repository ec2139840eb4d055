"""2_preprocess_dataset.sh and 3_train.sh: the run folder, the environment, and how they end."""

import gzip
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.job_scripts import clean_environment

ROOT = Path(__file__).parents[2]
# Names that no list of secrets would hold, with values as people set them.
SECRETS = {
    name: secrets.token_hex(12)
    for name in ("MY_PAT", "MYSQL_PWD", "SLURM_JWT", "X", "PBS_JOBCOOKIE", "lower")
} | {"MULTI": f"a\npassword={secrets.token_hex(12)}", "SLURM_EXPORT_ENV": f"A={secrets.token_hex(12)}"}


def run(script: str, *words: str, cwd: Path = ROOT, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / script), *words], cwd=cwd, env=clean_environment(**more),
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip


SMALL = "--limit_train_batches 4 --limit_val_batches 2 --limit_test_batches 2 --report_every 1"


def find_only_file(folder: Path) -> Path:
    [path] = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def finished(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A job as PBS starts it: a copy of the script in the spool, $HOME as folder, a strict umask."""
    folder = tmp_path_factory.mktemp("späce and more")
    data, spool, home = folder / "the data", folder / "spool", folder / "home"
    shutil.copytree(toy, data)
    for path in (spool, home):
        path.mkdir()
    shutil.copy(ROOT / "3_train.sh", spool / "17[3].SC")
    (folder / "nodes").write_text("localhost\n" * 2)
    (folder / "site.sh").write_text("export DLRM_UMASK=027 FROM_SITE=yes\n")
    job = clean_environment(
        PBS_ENVIRONMENT="PBS_BATCH", PBS_JOBID="17[3].pbs", PBS_O_WORKDIR=folder,
        PBS_NODEFILE=folder / "nodes",
        WORKDIR=ROOT, DATASET_DIR="the data", RESULTS="out of the way/results", DLRM_SITE=folder / "site.sh",
        BATCH_SIZE=64, EMBEDDING_DIM=8, LEARNING_RATE=0.01, ARGS=f"{SMALL} --seed '7'",
        HF_TOKEN="secret-a", my_password="secret-b", https_proxy="http://me:secret-c@proxy:1", HARMLESS="a b",
        DLRM_ENV_KEEP="HARMLESS FROM_*", **SECRETS,
        OMP_NUM_THREADS=1,
    )  # fmt: skip
    command = f"umask 077; cd '{home}' && exec bash '{spool}/17[3].SC'"
    done = subprocess.run(["bash", "-c", command], env=job, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out of the way" / "results" / "17[3].pbs", done.stdout


def test_the_run_folder(finished: tuple[Path, str]) -> None:
    folder, output = finished
    config = json.loads((folder / "config.json").read_text())
    assert config["launch"]["world_size"] == 2  # the node file has two lines of one host
    assert config["data"]["batch_size"] == 64 and config["model"]["embedding_dim"] == 8
    assert config["optim"]["learning_rate"] == 0.01 and config["run"]["seed"] == 7
    assert 0 <= json.loads((folder / "results.json").read_text())["test_auroc"] <= 1
    assert (folder / "gpu.txt").read_text() and (folder / "metrics.jsonl").read_text()
    assert len(list((folder / "trace").glob("train*.pfw.gz"))) == 2
    assert (folder / "log.txt").read_text().strip() in output
    assert f"results: {folder}" in output


def test_it_converts_and_reports(finished: tuple[Path, str]) -> None:
    folder, output = finished
    assert len(list(folder.glob("*.pftrace"))) == 2 and (folder / "report.html").stat().st_size > 1000
    assert "not all of that was done" not in output


def test_no_secret_is_kept(finished: tuple[Path, str]) -> None:
    text = (finished[0] / "env.txt").read_text()
    assert "secret" not in text and "http://***@proxy:1" in text
    for value in SECRETS.values():
        for path in (path for path in finished[0].rglob("*") if path.is_file()):
            data = path.read_bytes()
            data += gzip.decompress(data) if path.suffix == ".gz" else b""
            assert value.rpartition("=")[2].encode() not in data, path
        assert value.rpartition("=")[2] not in finished[1]
    assert "HARMLESS='a b'" in text.splitlines() and "FROM_SITE='yes'" in text.splitlines()


def test_the_group_can_read(finished: tuple[Path, str]) -> None:
    for path in [finished[0], *finished[0].rglob("*")]:
        assert bool(path.stat().st_mode & 0o040) == (path.name != "env.txt"), path  # it may hold more
        assert not path.stat().st_mode & 0o007, path


def test_ratings_are_a_file_or_its_folder(tmp_path: Path) -> None:
    folder, words = tmp_path / "the set", "--max_steps 1 --emb_dim 8 --max_len 8 --num_epochs 1 --negatives 2"
    folder.mkdir()
    (folder / "beauty.txt").write_text("".join(f"{n // 6} {n * 7 % 20}\n" for n in range(60)))
    for number, data in enumerate((folder, folder / "beauty.txt")):
        results = tmp_path / str(number)
        done = run(
            "3_train.sh", MODEL="bert4rec", DATASET_DIR=data, RESULTS=results, NPROC=1, TRACE="no", ARGS=words
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "10 users, 20 items, 60 ratings" in done.stdout
        config = json.loads((find_only_file(results) / "config.json").read_text())
        assert config["data"]["dataset_name"] == "text"
    refused = run("3_train.sh", DATASET_DIR=folder / "beauty.txt", RESULTS=tmp_path)
    assert refused.returncode == 2 and "beauty.txt is not a folder" in refused.stderr


@pytest.mark.parametrize(
    ("script", "more", "says"),
    [
        ("3_train.sh", {"DATASET_DIR": "/no/such"}, "DATASET_DIR=/no/such is not a folder"),
        ("3_train.sh", {"WORKDIR": "/no/such"}, "WORKDIR=/no/such is not the project's folder"),
        ("3_train.sh", {"MODEL": "gpt"}, "MODEL: model gpt is unknown; there are dlrm, bert4rec"),
        ("3_train.sh", {"MODEL": "a\nb"}, "MODEL: model a\\nb is unknown"),
        ("3_train.sh", {"MODEL": "bert4rec", "ARGS": "--dataset_name ml-1m"}, "ml-1m/ratings.dat is missing"),
        ("3_train.sh", {"ARGS": "--in_memory_binary_criteo_path no/data"}, "/no/data is not a folder"),
        ("3_train.sh", {"ARGS": "--seed '1"}, "ARGS=--seed\\ \\'1: is a quote left open?"),
        ("3_train.sh", {"ARGS": "--seed 'a\nb"}, "is a quote left open?"),
        ("3_train.sh", {"DATASET_DIR": "a\nb"}, "DATASET_DIR=$'a\\nb' has a control character"),
        ("3_train.sh", {"RESULTS": "a\n"}, "RESULTS=$'a\\n' has a control character"),
        ("3_train.sh", {"RESUME": "a\tb"}, "RESUME=$'a\\tb' has a control character"),
        ("3_train.sh", {"RESULTS": "\udcff"}, "RESULTS=$'\\377' is not UTF-8"),
        ("3_train.sh", {"DATASET_DIR": "/a/\udcff"}, "DATASET_DIR=$'/a/\\377' is not UTF-8"),
        ("2_preprocess_dataset.sh", {"DATASET_DIR": "a\nb"}, "DATASET_DIR=$'a\\nb' has a control character"),
        ("2_preprocess_dataset.sh", {"OUTPUT_DIR": "\udcff"}, "OUTPUT_DIR=$'\\377' is not UTF-8"),
        ("2_preprocess_dataset.sh", {"DATASET_DIR": "/", "ARGS": '"'}, "is a quote left open?"),
        ("2_preprocess_dataset.sh", {"WORKDIR": "/no/such"}, "WORKDIR=/no/such is not the project's folder"),
        ("2_preprocess_dataset.sh", {}, "DATASET_DIR is not set"),
        ("2_preprocess_dataset.sh", {"DATASET_DIR": "/no/such"}, "DATASET_DIR=/no/such is not a folder"),
    ],
)
def test_mistakes(script: str, more: dict[str, Any], says: str) -> None:
    done = run(script, **more)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", ["0_setup_env.sh", "2_preprocess_dataset.sh", "3_train.sh", "launcher.sh"])
def test_help(script: str) -> None:
    done = run(script, "--help")
    assert done.returncode == 0 and f"./{script}" in done.stdout and "#" not in done.stdout


def test_the_exit_code_of_training_is_kept(toy: Path, tmp_path: Path) -> None:
    words = ["--embedding_dim", "12"]  # not the width of the bottom MLP's output
    done = run("3_train.sh", *words, DATASET_DIR=toy, RESULTS=tmp_path, NPROC=1)
    assert done.returncode == 2 and "dot products need tables as wide" in done.stdout


def test_after_nan_the_reason_is_the_last_line(toy: Path, tmp_path: Path) -> None:
    words = ["--learning_rate", "3000", "--batch_size", "1024", "--report_every", "5"]
    done = run("3_train.sh", *words, DATASET_DIR=toy, RESULTS=tmp_path, NPROC=1, DLRM_THREADS=1)
    log = (find_only_file(tmp_path) / "log.txt").read_text()
    last = log.splitlines()[-1]
    assert done.returncode == 2 and done.stdout.splitlines()[-1] == last
    assert last.startswith("3_train.sh: failed with exit code 2: the loss became nan in steps "), log
    assert "3_train.sh: analysis" in log  # which comes between the reason and the end


@pytest.mark.parametrize(
    ("words", "more", "code", "says"),
    [
        (["--no_such_flag"], {}, 2, "no_such_flag"),
        (["--validate_only"], {}, 0, ""),
        ([], {"NPROC": "x"}, 2, "NPROC=x"),
        (["--embedding_dim", "12"], {}, 2, "dot products need tables as wide"),
        (["--validate_only"], {"DATASET_DIR": "."}, 2, "is not a dataset: it has no meta.json"),
        (["--output_dir", "mine"], {}, 2, "--output_dir: this script names the run folder"),
        (["--validate_only"], {"MODEL": "bert4rec", "DATASET_DIR": "text"}, 0, ""),
        (["--validate_only"], {"MODEL": "bert4rec", "DATASET_DIR": "."}, 2, "a folder with no such files"),
        (["--dataset_path=a/b"], {"MODEL": "bert4rec"}, 2, "/a/b is missing"),
        ([], {"DATASET_DIR": "text"}, 2, "/text ./2_preprocess_dataset.sh makes one of it"),
        (["--mode", "test"], {}, 2, "no checkpoint to test"),
    ],
)
def test_a_mistake_leaves_no_run_folder(
    toy: Path, tmp_path: Path, words: list[str], more: dict[str, str], code: int, says: str
) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "day_0.gz").touch()
    places = {"DATASET_DIR": str(toy), "RESULTS": str(tmp_path / "results"), "NPROC": "1"}
    done = run("3_train.sh", *words, cwd=tmp_path, **places | more)
    output = done.stdout + done.stderr
    assert done.returncode == code and says in output and "results:" not in output, output
    assert not any((tmp_path / "results").glob("*"))


@pytest.mark.parametrize("kind", ["results file", "resume foreign", "resume link", "resume log"])
def test_folders_of_others_are_not_written_to(toy: Path, tmp_path: Path, kind: str) -> None:
    mine = tmp_path / "mine"
    (mine / "checkpoints").mkdir(parents=True)
    for name in ("log.txt", "gpu.txt", "env.txt", "thesis.txt"):
        (mine / name).write_text("x")
    (tmp_path / "link").symlink_to(mine)
    (tmp_path / "file").write_text("x")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    places = {"DATASET_DIR": toy, "NPROC": 1, "RESULTS": tmp_path / "results"} | {
        "results file": {"RESULTS": tmp_path / "file"},
        "resume foreign": {"RESUME": mine},
        "resume link": {"RESUME": tmp_path / "link"},
        "resume log": {"RESUME": mine / "checkpoints"},
    }[kind]
    done = run("3_train.sh", **places)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stdout + done.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "results").exists()


def test_submit_hands_everything_to_qsub(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "qsub").write_text(
        '#!/bin/bash\nprintf "%s\\n" "$@" > "$OUT"; echo "$WORKDIR|$DATASET_DIR|$ARGS|$PWD" >> "$OUT"\n'
        "echo 17.pbs\n"
    )
    (tmp_path / "qsub").chmod(0o755)
    (tmp_path / "site.sh").write_text('export DLRM_QSUB="-A mine -l select=2"\n')
    done = run(
        "3_train.sh", "--submit", cwd=tmp_path, DATASET_DIR=toy, ARGS="--a 1,2",
        DLRM_SITE=tmp_path / "site.sh", OUT=tmp_path / "out", PATH=f"{tmp_path}:{os.environ['PATH']}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "17.pbs\n"  # what a script that submits another one after it needs
    assert (tmp_path / "out").read_text().splitlines() == [
        "-V", "-A", "mine", "-l", "select=2", f"{ROOT}/3_train.sh", f"{ROOT}|{toy}|--a 1,2|{tmp_path}"
    ]  # fmt: skip


def test_later_analysis_asks_pbs_for_one_node_after_the_job(toy: Path, tmp_path: Path) -> None:
    """By --submit for both jobs; by a batch job itself, for its project and queue, before it trains."""
    facts = {
        "queue": "prod", "Account_Name": "mine",
        "Resource_List": {"select": "2:system=x:ngpus=4:mpiprocs=4+1:y", "filesystems": "home:eagle"},
    }  # fmt: skip
    (tmp_path / "qstat.json").write_text(json.dumps({"Jobs": {"17.pbs": facts}}))
    (tmp_path / "qstat").write_text(f"#!/bin/bash\ncat {tmp_path}/qstat.json\n")
    (tmp_path / "qsub").write_text(
        '#!/bin/bash\nprintf "%s " "$@" >> "$OUT"; echo "$ANALYSIS|${RUN:-}|${PBS_JOBID:-}" >> "$OUT"\n'
        "wc -l < $OUT | sed 's/$/8.pbs/'\n"
    )
    for name in ("qsub", "qstat"):
        (tmp_path / name).chmod(0o755)
    (tmp_path / "site.sh").write_text('export DLRM_QSUB="-A mine -l select=2:a=b:ngpus=4 -l walltime=9"\n')
    out, runs = tmp_path / "out", tmp_path / "results"
    more: dict[str, Any] = {
        "DATASET_DIR": toy, "RESULTS": runs, "OUT": out, "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "ANALYSIS": "later", "ARGS": SMALL, "NPROC": 1,
    }  # fmt: skip
    done = run("3_train.sh", "--submit", cwd=tmp_path, DLRM_SITE=tmp_path / "site.sh", **more)
    assert (done.returncode, done.stdout) == (0, "18.pbs\n"), done.stderr
    script = f"{ROOT}/scripts/analyse_run.sh"
    first, second = out.read_text().splitlines()
    assert first.endswith(f"{ROOT}/3_train.sh no||")  # the training's job leaves the analysis alone
    assert second == (
        "-V -A mine -l walltime=9 -l select=1:a=b -W depend=afterany:18.pbs "
        f"{script} no|{runs}/18.pbs|"
    )  # fmt: skip
    assert "the analysis is job 28.pbs" in done.stderr
    out.unlink()
    job: dict[str, Any] = {"PBS_JOBID": "17.pbs", "PBS_ENVIRONMENT": "PBS_BATCH", "PBS_O_WORKDIR": tmp_path}
    done = run("3_train.sh", cwd=tmp_path, **more, **job)
    assert done.returncode == 0 and "3_train.sh: analysis\n" not in done.stdout, done.stdout + done.stderr
    assert out.read_text() == (
        "-V -q prod -A mine -l filesystems=home:eagle -l select=1:system=x -W depend=afterany:17.pbs "
        f"{script} later|{runs}/17.pbs|\n"
    )  # fmt: skip
    done = run("scripts/analyse_run.sh", RUN=runs / "17.pbs", WORKDIR=ROOT)
    assert done.returncode == 0 and (runs / "17.pbs" / "report.html").exists(), done.stdout + done.stderr
    (tmp_path / "qsub").write_text("#!/bin/bash\necho 'no jobs from jobs' >&2\nexit 3\n")
    more["TRACE"] = "no"
    done = run("3_train.sh", cwd=tmp_path, **more, **job | {"PBS_JOBID": "19.pbs"})
    assert done.returncode == 0 and "qsub: no jobs from jobs" in done.stdout


def test_a_refused_training_takes_its_analysis_out_of_the_queue(toy: Path, tmp_path: Path) -> None:
    """Of what is only seen when the ranks are started."""
    (tmp_path / "qsub").write_text("#!/bin/bash\necho 28.pbs\n")
    (tmp_path / "qdel").write_text('#!/bin/bash\necho "$@" >> "$OUT"\n')
    for name in ("qsub", "qdel"):
        (tmp_path / name).chmod(0o755)
    runs = tmp_path / "results"
    more: dict[str, Any] = {
        "DATASET_DIR": toy, "RESULTS": runs, "OUT": tmp_path / "out",
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "ANALYSIS": "later", "NPROC": "x", "DLRM_QSUB": "-A mine",
        "PBS_JOBID": "17.pbs", "PBS_ENVIRONMENT": "PBS_BATCH", "PBS_O_WORKDIR": tmp_path,
    }  # fmt: skip
    done = run("3_train.sh", cwd=tmp_path, **more, ARGS=SMALL)
    assert done.returncode == 2 and not list(runs.iterdir()), done.stdout + done.stderr
    assert "the analysis is job 28.pbs" in done.stdout and "job 28.pbs is cancelled" in done.stdout
    assert (tmp_path / "out").read_text() == "28.pbs\n"


def test_without_a_scheduler_later_is_now(toy: Path, tmp_path: Path) -> None:
    places: dict[str, Any] = {"DATASET_DIR": toy, "RESULTS": tmp_path, "NPROC": 1, "ARGS": SMALL}
    done = run("3_train.sh", ANALYSIS="later", **places)
    assert "ANALYSIS=later: this is not a batch job, the analysis is done now" in done.stdout
    assert done.returncode == 0 and (find_only_file(tmp_path) / "report.html").exists()
    done = run("3_train.sh", ANALYSIS="maybe", **places)
    assert done.returncode == 2 and done.stderr == "3_train.sh: ANALYSIS=maybe: wanted now, later or no\n"


def test_without_workdir_the_folder_is_named(tmp_path: Path) -> None:
    for script in ("2_preprocess_dataset.sh", "3_train.sh"):
        copied = shutil.copy(ROOT / script, tmp_path)
        done = subprocess.run([copied], cwd=tmp_path, env=clean_environment(), capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert f"{tmp_path} is not the project's folder" in done.stderr and "by WORKDIR" in done.stderr
        assert "WORKDIR=" not in done.stderr


def test_directives_suit_any_line_of_qsub_and_sbatch() -> None:
    """No resources that a user's own -l nodes= or select= would contradict, nothing expanded, no comments."""
    for script in ("2_preprocess_dataset.sh", "3_train.sh", "scripts/analyse_run.sh"):
        lines = (ROOT / script).read_text().splitlines()
        directives = [line for line in lines if line.startswith(("#PBS", "#SBATCH"))]
        assert lines[1 : 1 + len(directives)] == directives  # any command above silences those below
        text = "\n".join(directives)
        assert "select" not in text and "nodes" not in text and "$" not in text
        assert not any("#" in line[1:] for line in directives)


@pytest.mark.mpi
def test_a_job_that_is_stopped_ends_at_once_keeps_its_log_and_goes_on(toy: Path, tmp_path: Path) -> None:
    words = ["--preset", "toy", "--epochs", "500", "--report_every", "1", "--checkpoint_every_steps", "2"]
    job = subprocess.Popen(
        [str(ROOT / "3_train.sh"), *words], cwd=tmp_path, text=True,
        env=clean_environment(DATASET_DIR=toy, RESULTS=tmp_path / "the out", NPROC=2), stdout=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    assert job.stdout
    for line in job.stdout:
        if "step 5/" in line:
            break
    begun = time.monotonic()
    os.killpg(job.pid, signal.SIGTERM)  # as PBS does: every process of the session
    rest = job.stdout.read()
    assert job.wait(30) != 0 and time.monotonic() - begun < 15
    assert "results: " in rest and "analysis" not in rest
    folder = find_only_file(tmp_path / "the out")
    assert "training ended with exit code" in (folder / "log.txt").read_text()
    assert f"RESUME='{folder}'" in rest
    more = {"DATASET_DIR": toy, "RESUME": f"the out/{folder.name}", "NPROC": 2, "TRACE": "no"}
    done = run("3_train.sh", *words, "--max_steps", "12", cwd=tmp_path, **more)
    assert done.returncode == 0 and find_only_file(tmp_path / "the out") == folder, done.stdout
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))


@pytest.mark.mpi
def test_relative_paths_among_options_are_those_of_the_caller(toy: Path, tmp_path: Path) -> None:
    """Given as two words or as one, in a folder with a space."""
    caller = tmp_path / "where I am"
    caller.mkdir()
    (caller / "plan.json").write_text('{"*": {"sharding": "table_wise"}}')
    (caller / "npy").symlink_to(toy)
    done = run(
        "3_train.sh", "--sharding_file", "plan.json", "--checkpoint_dir=the checkpoints", cwd=caller,
        DATASET_DIR="npy", RESULTS="results", NPROC=1, TRACE="no", ARGS=f"{SMALL} --save_initial_model",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((caller / "the checkpoints").iterdir())
    config = json.loads((find_only_file(caller / "results") / "config.json").read_text())
    assert config["plan"]["sharding_file"] == str(caller / "plan.json")


def test_preprocess_by_hand(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "dlrm.prep", "toy", str(tmp_path / "t s v"), "--days", "3", "--rows", "50"],
        check=True, cwd=ROOT,
    )  # fmt: skip
    done = run(
        "2_preprocess_dataset.sh", cwd=tmp_path, DATASET_DIR="t s v/", NPROC=2,
        ARGS="--frequency_threshold 2 --tmp_dir 'on scratch'",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    meta = json.loads((tmp_path / "t s v-npy" / "meta.json").read_text())
    assert (tmp_path / "on scratch").is_dir()
    assert meta["rows"] == [50] * 3 and meta["parameters"]["frequency_threshold"] == 2
    bad = run("2_preprocess_dataset.sh", DATASET_DIR=tmp_path / "t s v-npy", NPROC=2)
    assert bad.returncode == 2 and "/t s v-npy' ./3_train.sh trains on it" in bad.stderr
    bad = run("2_preprocess_dataset.sh", cwd=tmp_path, DATASET_DIR="tsv")
    assert bad.returncode == 2 and f"DATASET_DIR=tsv is not a folder in {tmp_path}" in bad.stderr


def test_other_columns_than_criteos(other_columns: Callable[[int, int], Path], tmp_path: Path) -> None:
    """Said once, to 2_preprocess_dataset.sh; the dataset says it to 3_train.sh."""
    text, npy = other_columns(5, 7) / "tsv", tmp_path / "npy"
    counts = "--num_numerical 5 --num_categorical 7"
    done = run("2_preprocess_dataset.sh", DATASET_DIR=text, OUTPUT_DIR=npy, ARGS=counts, NPROC=1)
    assert done.returncode == 0, done.stdout + done.stderr
    words = ("--batch_size", "64", *SMALL.split())
    done = run("3_train.sh", *words, DATASET_DIR=npy, RESULTS=tmp_path / "results", NPROC=1, TRACE="no")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = find_only_file(tmp_path / "results")
    assert json.loads((folder / "results.json").read_text())["test_samples"] == 250
    assert set(json.loads((folder / "plan.json").read_text())) == {f"t_cat_{table}" for table in range(7)}
