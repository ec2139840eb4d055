"""python -m dlrm.emulate beside the training that it emulates, by the traces of both."""

import gzip
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from support.analysis_command import run_command
from support.disk import mount_small_disk
from support.file_calls import STRACED, count_strace_calls, read_events
from support.job_scripts import clean_environment
from support.ranks import ROOT, on_ranks, python

from analysis.workload.steps import measure_steps

TRAINING = [
    "--preset", "toy", "--batch_size", 64, "--max_steps", 40, "--report_every", 10,
    "--checkpoint_every_steps", 15, "--limit_val_batches", 5, "--limit_test_batches", 5, "--trace",
    "--read_chunk_mb", 0.1,
]  # fmt: skip


def train(run: Path, npy: Path, ranks: int, *more: object, **variables: Any) -> Path:
    words = [*TRAINING, "--in_memory_binary_criteo_path", npy, *more]
    done = on_ranks(run, ranks, "dlrm.train", *words, timeout=240, **variables)
    assert done.codes == [0] * ranks, done.err
    return run


@pytest.fixture(scope="module")
def trained(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training on two ranks with checkpoints, traced."""
    return train(tmp_path_factory.mktemp("trained") / "run", toy, 2)


def emulate(run: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """By itself: it starts its ranks."""
    command = [sys.executable, "-m", "dlrm.emulate", "--output_dir", str(run), *map(str, words)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=clean_environment()
    )


def compare(original: Path, copy: Path) -> dict[str, Any]:
    done = run_command("compare", original, copy)
    assert done.code == 0, done.err
    assert "how faithful" in done.out
    (found,) = json.loads((copy / "compare.json").read_text())["fidelity"]
    return found


def list_steps(run: Path) -> list[float]:
    """Milliseconds of the training steps of all ranks, but for each rank's first ones."""
    found: dict[int, list[float]] = {}
    for event in read_events(run):
        if (event.get("cat"), event["name"]) == ("train", "step"):
            found.setdefault(event["pid"], []).append(event["dur"] / 1000)
    return [each for steps in found.values() for each in steps[3:]]


def test_every_request_is_the_runs_own(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = emulate(run, "--from", trained)
    assert done.returncode == 0, done.stderr
    found = compare(trained, run)
    assert found["different_requests"] == 0
    files = {each["file"]: each for each in found["files"]}
    assert {"data/day_0_sparse.npy", "checkpoints/rank00001.safetensors", "data/meta.json"} <= set(files)
    assert all(each["requests"] == each["copied_requests"] > 0 for each in files.values())
    assert {"waiting share", "unhidden I/O, share"} <= set(found["errors"])
    results = json.loads((run / "results.json").read_text())
    assert (results["steps"], results["samples"], results["world_size"]) == (40, 40 * 64 * 2, 2)
    checked = run_command("check", run)
    assert checked.code == 0, checked.out


def test_reads_are_those_that_strace_sees(toy: Path, tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    original = train(tmp_path / "original", toy, 1)
    log = tmp_path / "log"
    done = subprocess.run(
        ["strace", "-f", "-y", "-e", f"trace={STRACED}", "-o", log, sys.executable, "-m", "dlrm.emulate",
         "--from", original, "--output_dir", tmp_path / "run", "--compute", "1ms"],
        cwd=ROOT, capture_output=True, text=True, timeout=240, env=clean_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    by_strace = count_strace_calls(log.read_text(errors="replace")).below(toy)
    results = json.loads((original / "results.json").read_text())["bytes_read"]["0"]
    read = {file: moved for (file, operation), (_, moved) in by_strace.items() if operation == "read"}
    assert {file: moved for file, moved in read.items() if file.endswith(".npy")} == {
        os.path.relpath(file, toy): count for file, count in results.items() if file.endswith(".npy")
    }


def test_compute_is_traced_scaled_or_given(trained: Path, tmp_path: Path) -> None:
    medians = {}
    for compute in ("x1", "x4", "30ms"):
        run = tmp_path / compute
        done = emulate(run, "--from", trained, "--compute", compute, "--max_steps", 12, "--ranks", 1)
        assert done.returncode == 0, done.stderr
        medians[compute] = statistics.median(list_steps(run))
    assert 29 <= medians["30ms"] < 90  # other work on the machine makes steps longer
    # of one rank: a step of two also has their exchange, which is long on busy cores and is not scaled
    assert 2 * medians["x1"] < medians["x4"]


def test_data_are_made_where_they_are_missing(trained: Path, toy: Path, tmp_path: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in toy.glob("*.npy")}
    for contents in ("sparse", "real"):
        folder, run = tmp_path / contents, tmp_path / f"run-{contents}"
        words = ["--from", trained, "--compute", "1ms", "--in_memory_binary_criteo_path", folder]
        more = ["--ranks", 1, "--max_steps", 3, "--no-trace"] if contents == "sparse" else []
        done = emulate(run, *words, "--make_data", contents, *more)
        assert done.returncode == 0, done.stderr
        assert {path.name: path.stat().st_size for path in folder.glob("*.npy")} == sizes
        on_disk = sum(path.stat().st_blocks * 512 for path in folder.glob("*.npy"))
        assert (on_disk >= sum(sizes.values())) == (contents == "real")
    assert compare(trained, run)["different_requests"] == 0
    # twice as many rows: an epoch is twice as long
    larger = tmp_path / "larger"
    more = [
        "--from", trained, "--compute", "0ms", "--max_steps", 999, "--no-trace",
        "--in_memory_binary_criteo_path", larger,
    ]  # fmt: skip
    done = emulate(
        tmp_path / "run-larger", *more, "--make_data", "--data_scale", 2, "--batch_size", 500, "--ranks", 1
    )
    assert done.returncode == 0, done.stderr
    assert (larger / "day_0_labels.npy").stat().st_size == 128 + 2 * 4 * 3000
    assert json.loads((tmp_path / "run-larger" / "results.json").read_text())["samples"] == 5 * 2 * 3000
    # a file that is there stays as it is
    before = (folder / "day_0_sparse.npy").read_bytes()
    (folder / "day_1_dense.npy").unlink()
    short = ["--ranks", 1, "--max_steps", 3, "--no-trace"]
    done = emulate(tmp_path / "again", *words, "--make_data", "real", *short)
    assert done.returncode == 0 and (folder / "day_0_sparse.npy").read_bytes() == before
    assert (folder / "day_1_dense.npy").stat().st_size == sizes["day_1_dense.npy"]


def test_tables_in_files_are_read_and_written(toy: Path, tmp_path: Path) -> None:
    ssd = ["--store_type", "cached_ssd", "--cache_memory_budget_mb", 1, "--max_steps", 12]
    original = train(tmp_path / "original", toy, 2, *ssd)
    done = emulate(tmp_path / "run", "--from", original)
    assert done.returncode == 0, done.stderr
    found = compare(original, tmp_path / "run")
    assert found["different_requests"] == 0
    requests = {each["file"]: each["requests"] for each in found["files"]}
    assert sum(count for file, count in requests.items() if file.startswith("store/")) > 100
    assert requests["store/t_cat_0.json"] == 3  # new, being written, complete


def test_rows_are_waited_for_where_the_run_waited(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables on slow storage, in the emulation too: the calls of another thread are done while steps are
    computed, and what is left of them is waited for.
    """
    if shutil.which("cc") is None:
        pytest.skip("a C compiler makes calls slow")
    library = tmp_path / "slow_reads.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", library, ROOT / "benchmarks/slow_reads.c", "-ldl"], check=True
    )
    slow = {"LD_PRELOAD": str(library), "SLOW_FOLDER": str(tmp_path / "rows")}
    slow |= {"SLOW_LATENCY_US": "2000", "SLOW_BYTES_PER_US": "1e9"}
    ssd = ["--store_type", "cached_ssd", "--cache_memory_budget_mb", 1, "--max_steps", 9, "--batch_size", 8]
    ssd.append("--persistent_path")
    original = train(tmp_path / "original", toy, 1, *ssd, tmp_path / "rows/original", **slow)
    for name, value in slow.items():  # of the emulations
        monkeypatch.setenv(name, value)
    done = emulate(tmp_path / "run", "--from", original, "--persistent_path", tmp_path / "rows/run")
    assert done.returncode == 0, done.stderr
    found = compare(original, tmp_path / "run")
    assert found["different_requests"] == 0
    first, second = found["values"]["waiting share"]
    assert first > 0.1 and second == pytest.approx(first, abs=0.1)
    steps = measure_steps(tmp_path / "run").steps.filter(pl.col("phase") == "train")
    assert steps["rows_us"].sum() > 0.8 * 1e6 * second * found["values"]["training time"][1]
    # steps that compute for ten times as long wait for less of the same calls
    done = emulate(
        tmp_path / "x10", "--from", original, "--persistent_path", tmp_path / "rows/x10", "--compute", "x10"
    )
    assert done.returncode == 0, done.stderr
    assert compare(original, tmp_path / "x10")["values"]["waiting share"][1] < first - 0.05


def test_ranks_begin_as_far_apart_as_the_runs_did(trained: Path, tmp_path: Path) -> None:
    """The run's trace says that rank 1 was 3 s behind."""
    run = tmp_path / "run"
    shutil.copytree(trained / "trace", run / "trace")
    shutil.copy(trained / "config.json", run)
    _, second = sorted((run / "trace").iterdir())
    lines = gzip.decompress(second.read_bytes()).decode()
    later = re.sub(r'"ts":(\d+)', lambda found: f'"ts":{int(found[1]) + 3_000_000}', lines)
    second.write_bytes(gzip.compress(later.encode()))
    done = emulate(tmp_path / "copy", "--from", run, "--compute", "1ms", "--max_steps", 5)
    assert done.returncode == 0, done.stderr
    batches = measure_steps(tmp_path / "copy").batches.filter(pl.col("phase") == "train")
    first, last = batches.group_by("rank").agg(pl.col("start").min()).sort("rank")["start"]
    assert 2.5 < (last - first) / 1e6 < 10


def test_more_ranks_than_the_run_had(trained: Path, tmp_path: Path) -> None:
    """Many ranks on few cores, each row read once: what 64 would do is in the slow tests."""
    run = tmp_path / "run"
    done = emulate(run, "--from", trained, "--ranks", 8, "--batch_size", 16, "--compute", "1ms", "--no-trace")
    assert done.returncode == 0, done.stderr
    assert "the run had 2 ranks, this one has 8" in done.stderr
    results = json.loads((run / "results.json").read_text())
    assert results["world_size"] == 8 and results["samples"] == 40 * 16 * 8


@pytest.mark.slow
def test_sixty_four_ranks(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = emulate(run, "--from", trained, "--ranks", 64, "--batch_size", 2, "--compute", "20ms")
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "results.json").read_text())["samples"] == 40 * 2 * 64


def test_stopped_in_the_middle(trained: Path, tmp_path: Path) -> None:
    """One line, though all ranks get the signal. It is true after the first steps, too: an emulation has
    nothing to save.
    """
    metrics = tmp_path / "copy/metrics.jsonl"
    words = ["--from", trained, "--output_dir", tmp_path / "copy", "--compute", "200ms"]
    with subprocess.Popen(
        [sys.executable, "-m", "dlrm.emulate", *map(str, words)],
        cwd=ROOT, env=clean_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + 180
            while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=180)
        finally:
            process.kill()
    assert process.returncode == 75, said
    lines = [line for line in said.splitlines() if "mpiexec@" not in line]  # which says what it passes on
    assert len(lines) == 1 and "stopped by SIGINT while nothing was being trained" in lines[0]
    assert not (tmp_path / "copy/results.json").exists()


def test_a_full_disk_ends_all_ranks_at_once(trained: Path, tmp_path: Path) -> None:
    with mount_small_disk(tmp_path / "disk", 2) as disk:
        done = emulate(disk / "out", "--from", trained, "--compute", "50ms", "--checkpoint_every_steps", 4)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "step-4-" in done.stderr and "safetensors: No space left on device; free" in done.stderr
        steps = [json.loads(line)["step"] for line in (disk / "out/metrics.jsonl").read_text().splitlines()]
    assert steps[-1] < 30  # of 40


def test_no_torch_is_loaded(trained: Path, tmp_path: Path) -> None:
    code = f"""
import sys
sys.argv = ["emulate", "--from", {str(trained)!r}, "--ranks", "1", "--max_steps", "3", "--compute", "1ms",
            "--no-trace"]
from dlrm.emulate.__main__ import main
from dlrm.runtime.ranks import Ranks
main(Ranks())
print(sorted({{"torch", "torchrec", "polars", "numba", "scipy"}} & set(sys.modules)))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_through_the_job_script(trained: Path, tmp_path: Path) -> None:
    """Into a folder that is not there yet, as docs/without_gpus.md has it."""
    done = subprocess.run(
        [ROOT / "3_train.sh", "--from", os.path.relpath(trained, tmp_path), "--max_steps", "10",
         "--make_data", "real"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=clean_environment(
            MODEL="emulate", NPROC=2, RESULTS=tmp_path / "results", DATASET_DIR=tmp_path / "new" / "data"
        ),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "demo" not in done.stdout
    (run,) = (tmp_path / "results").iterdir()
    assert (run / "report.html").exists() and list(run.glob("*.pftrace"))
    assert json.loads((run / "results.json").read_text())["emulated"] == str(trained)


def test_made_up_checkpoints_are_never_trained_from(trained: Path, toy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert emulate(run, "--from", trained, "--compute", "1ms", "--ranks", 1, "--no-trace").returncode == 0
    words = [*TRAINING, "--in_memory_binary_criteo_path", toy, "--load_checkpoint_path", run / "checkpoints"]
    done = on_ranks(tmp_path / "next", 1, "dlrm.train", *words)
    assert done.codes == [2]
    assert "was made by the emulator" in done.err[0] and done.err[0].count("\n") == 1


def test_a_training_is_not_replaced_by_its_emulation(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = emulate(run, "--from", run, "--max_steps", 2, "--ranks", 1, "--trace")
    assert done.returncode == 2 and "name another --output_dir" in done.stderr, done.stderr
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_trace_that_lacks_a_rank_and_ends_early(trained: Path, tmp_path: Path) -> None:
    """What is there is taken, and what is not is said."""
    run = tmp_path / "run"
    shutil.copytree(trained / "trace", run / "trace")
    shutil.copy(trained / "config.json", run)
    first, second = sorted((run / "trace").iterdir())
    second.unlink()
    os.truncate(first, first.stat().st_size - 1000)  # the start-up is most of it
    done = emulate(tmp_path / "copy", "--from", run, "--compute", "0ms", "--ranks", 1)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 3 and "the gzip stream is cut" in lines[1], lines
    assert lines[2] == "dlrm: the run had 2 ranks; there is no trace of rank 1"


BAD = {
    "no run": ([], "--from RUN is needed"),
    "not there": (["--from", "{tmp}/nowhere"], "nowhere: has no config.json: name the run folder of"),
    "nowhere to write": (["--from", "{run}", "--output_dir", "/proc/x"], "/proc/x: No such file or"),
    "no trace": (["--from", "{bare}"], "bare: "),
    "compute": (["--from", "{run}", "--compute", "fast"], "--compute fast: wanted traced"),
    "no computer": (["--from", "{run}", "--compute", "x0"], "--compute x0: wanted a factor from"),
    "another model": (["--from", "{bert}"], "is a run of BERT4Rec"),
    "no data": (["--from", "{run}", "--in_memory_binary_criteo_path", "{tmp}/none"], "or let --make_data"),
    "a file": (["--from", "{run}", "--make_data", "--in_memory_binary_criteo_path", "{file}"], "file"),
    "mode": (["--from", "{run}", "--mode", "test"], "--mode test"),
    "ranks": (["--from", "{run}", "--ranks", "0"], "--ranks 0"),
    "scale": (["--from", "{run}", "--data_scale", "3"], "give --make_data, too"),
    "meant": (["--from", "{run}", "--computee", "1ms"], "did you mean --compute"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes(case: str, trained: Path, tmp_path: Path) -> None:
    words, expected = BAD[case]
    bare, bert, file = tmp_path / "bare", tmp_path / "bert", tmp_path / "file"
    bare.mkdir()
    bert.mkdir()
    file.write_text("mine")
    shutil.copy(trained / "config.json", bare)
    config = {"launch": {"model": "BERT4Rec"}, "data": {"dataset_name": "ml-1m"}}
    (bert / "config.json").write_text(json.dumps(config))
    places = {"tmp": tmp_path, "bare": bare, "bert": bert, "file": file, "run": trained}
    words = [word.format(**places) for word in words]
    done = emulate(tmp_path / "out", *words, *([] if "--ranks" in words else ["--ranks", 1]))
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if "ranks, this one has" not in line]
    assert len(lines) == 1 and lines[0].startswith("dlrm: ") and expected in lines[0]
    assert file.read_text() == "mine"
    assert not (tmp_path / "out" / "results.json").exists()
    assert case != "no trace" or not list((tmp_path / "out").glob("trace/*"))
