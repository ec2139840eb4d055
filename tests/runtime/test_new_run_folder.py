"""Run folders: a name for each run, foreign files untouched, and none left after a mistake."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dlrm.runtime.environment import HEADER

ROOT = Path(__file__).parents[2]
DROP = ("PBS", "SLURM", "DLRM_ENV_KEEP", "NAME")


def start_command(*words: object, **more: str) -> "subprocess.Popen[bytes]":
    kept = {name: value for name, value in os.environ.items() if not name.startswith(DROP)}
    return subprocess.Popen(
        [sys.executable, "-m", "dlrm.runtime.new_run_folder", *map(str, words)], cwd=ROOT, env=kept | more,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish_command(process: "subprocess.Popen[bytes]") -> list[str]:
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    return os.fsdecode(out).split("\0")[:-1]


def read_refusal(*words: object, **more: str) -> str:
    process = start_command(*words, **more)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 2 and not out and err.count(b"\n") == 1, err
    return err.decode()


def read_contents(folder: Path) -> dict[str, object]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else path.is_symlink()
        for path in folder.rglob("*")
    }


def test_names_are_for_one_run_each(tmp_path: Path) -> None:
    """Many that start in the same second, as in a loop with &."""
    runs = [
        finish_command(process)[0]
        for process in [start_command("make", tmp_path / "new" / "results") for _ in range(12)]
    ]
    assert len(set(runs)) == 12
    assert sorted(os.listdir(tmp_path / "new" / "results")) == sorted(Path(run).name for run in runs)


def test_a_label_ends_the_name(tmp_path: Path) -> None:
    batch = {"PBS_JOBID": "17.pbs", "PBS_ENVIRONMENT": "PBS_BATCH", "NAME": "lr-0.1"}
    run, made = finish_command(start_command("make", tmp_path, **batch))
    assert Path(run).name == "17.pbs-lr-0.1" and made
    assert finish_command(start_command("make", tmp_path, **batch)) == [run, ""]
    assert finish_command(start_command("make", tmp_path, NAME="big_batch"))[0].endswith("-big_batch")
    for name in ("a/b", "..\n", "x" * 61, "a b"):
        assert "NAME=" in read_refusal("make", tmp_path, NAME=name)


def test_a_batch_job_finds_its_folder_again_and_an_interactive_one_does_not(tmp_path: Path) -> None:
    batch = {"PBS_JOBID": "17[3].pbs", "PBS_ENVIRONMENT": "PBS_BATCH"}
    run, made = finish_command(start_command("make", tmp_path, **batch))
    assert Path(run).name == "17[3].pbs" and made
    assert finish_command(start_command("make", tmp_path, **batch)) == [run, ""]
    slurm = {"SLURM_JOB_ID": "19", "SLURM_TASK_PID": "5"}
    again = [finish_command(start_command("make", tmp_path, **slurm))[0] for _ in range(2)]
    assert again == [str(tmp_path / "19")] * 2
    array = slurm | {"SLURM_ARRAY_JOB_ID": "19", "SLURM_ARRAY_TASK_ID": "3"}
    assert finish_command(start_command("name", tmp_path, **array)) == [str(tmp_path / "19_3")]
    # one start of the job, two runs: as in a loop of a job script; a requeued job finds both again
    for start in ("n1 7 1", "n1 7 2"):
        names = [
            finish_command(start_command("make", tmp_path, **batch, DLRM_JOB_START=start))[0] for _ in "12"
        ]
        assert names == [run, f"{run}-2"]
    for job in (
        {"PBS_JOBID": "17.pbs", "PBS_ENVIRONMENT": "PBS_INTERACTIVE"}, {"PBS_JOBID": "17.pbs"},
        {"SLURM_JOB_ID": "17.pbs"}, {"SLURM_JOB_ID": "17.pbs", "SLURM_TASK_PID": "5", "SLURM_STEP_ID": "0"},
    ):  # fmt: skip
        pair = [finish_command(start_command("make", tmp_path, **job))[0] for _ in range(2)]
        assert len(set(pair)) == 2 and all(Path(run).name.startswith("17.pbs-2") for run in pair)


def test_the_environment_is_for_the_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        run = Path(finish_command(start_command("make", tmp_path, SOME_PAT="hunter2", NCCL_X="1"))[0])
    finally:
        os.umask(before)
    assert (run / "env.txt").stat().st_mode & 0o777 == 0o600
    text = (run / "env.txt").read_text()
    assert "SOME_PAT=<not recorded>\n" in text and "NCCL_X='1'\n" in text and "hunter2" not in text
    assert (run / "gpu.txt").stat().st_mode & 0o777 == 0o666


def test_discard_takes_only_what_was_made(tmp_path: Path) -> None:
    run, made = finish_command(start_command("make", tmp_path))
    for other in ("0:0", "", made + "1"):
        finish_command(start_command("discard", run, other))
        assert (Path(run) / "env.txt").exists()
    (Path(run) / "mine.txt").write_text("x")
    finish_command(start_command("discard", run, made))
    assert read_contents(Path(run)) == {"mine.txt": b"x"}
    run, made = finish_command(start_command("make", tmp_path))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "log.txt").write_text("mine")
    (Path(run) / "trace").symlink_to(folder)
    finish_command(start_command("discard", run, made))
    assert read_contents(folder) == {"log.txt": b"mine"} and (Path(run) / "trace").is_symlink()
    run, made = finish_command(start_command("make", tmp_path))
    (Path(run) / "trace").mkdir()
    (Path(run) / "trace" / "train-0.pfw.gz").write_text("")
    (Path(run) / "log.txt").write_text("")
    finish_command(start_command("discard", run, made))
    assert not Path(run).exists()


@pytest.mark.parametrize("name", ["env.txt", "gpu.txt", "log.txt", "checkpoints", "thesis.txt"])
@pytest.mark.parametrize("way", ["resume", "batch"])
def test_folders_of_others_are_refused(tmp_path: Path, name: str, way: str) -> None:
    folder = tmp_path / "17.pbs"
    folder.mkdir()
    (folder / name).write_text("mine")
    (folder / "config.json").write_text("{}")
    before = read_contents(tmp_path)
    words: list[object] = ["--resume", folder, tmp_path] if way == "resume" else [tmp_path]
    more = {} if way == "resume" else {"PBS_JOBID": "17.pbs", "PBS_ENVIRONMENT": "PBS_BATCH"}
    for command in ("name", "make"):
        assert "17.pbs: is not a run folder of this project" in read_refusal(command, *words, **more)
    assert read_contents(tmp_path) == before


@pytest.mark.parametrize("name", ["env.txt", "gpu.txt", "log.txt"])
@pytest.mark.parametrize("kind", ["file", "link", "folder", "fifo"])
def test_foreign_files_in_a_run_folder_stay(tmp_path: Path, name: str, kind: str) -> None:
    run = Path(finish_command(start_command("make", tmp_path))[0])
    (run / "config.json").write_text('{"launch": {}, "run": {}}')
    path = run / name
    path.unlink(missing_ok=True)
    target = tmp_path / "target"
    target.write_text("mine")
    if kind == "file":
        path.write_text("mine")
    elif kind == "link":
        path.symlink_to(target)
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    if (name, kind) == ("log.txt", "file"):
        assert finish_command(start_command("make", "--resume", run, tmp_path)) == [
            str(run),
            "",
        ]  # a log is appended to
    else:
        assert str(path) in read_refusal("make", "--resume", run, tmp_path)
    assert target.read_text() == "mine" and (kind != "file" or path.read_text() == "mine")


def test_a_run_that_is_resumed_gets_its_new_environment(tmp_path: Path) -> None:
    run = Path(finish_command(start_command("make", tmp_path, NCCL_X="1"))[0])
    assert finish_command(start_command("make", "--resume", run, tmp_path, NCCL_X="2")) == [str(run), ""]
    text = (run / "env.txt").read_text()
    assert text.startswith(HEADER) and "NCCL_X='2'" in text and "NCCL_X='1'" not in text


@pytest.mark.parametrize("below", ["", "a/b"])
def test_results_that_are_no_folder(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    for command in ("name", "make"):
        assert "is not a folder; name another" in read_refusal(command, tmp_path / "file" / below)
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    assert "is not a folder" in read_refusal("make", tmp_path / "lost")
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", ["a b", "it's", 'a"b', "a\\b", "ä", "$(x)", "-n", "*"])
def test_odd_names(tmp_path: Path, name: str) -> None:
    run, made = finish_command(start_command("make", tmp_path / name))
    assert Path(run).parent == tmp_path / name
    finish_command(start_command("discard", run, made))
    assert os.listdir(tmp_path / name) == []
