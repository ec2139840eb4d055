"""`watch`: a live training seen from outside, a rank that stands still, and what watching costs."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.analysis_command import run_command
from support.lock_holder import hold_lock
from support.ranks import ROOT, LiveRanks, metrics, words


def look(run: Path) -> str:
    done = run_command("watch", run, "--once")
    assert done.code == 0 and not done.err, done.err
    return done.out


@pytest.mark.mpi
def test_a_live_training(toy: Path, tmp_path: Path) -> None:
    options = ["--epochs", 200, "--timeout", 600, "--checkpoint_every_steps", 20, "--report_every", 10]
    with LiveRanks(tmp_path, 2, *words(toy, *options, "--validation_freq_within_epoch", 20)) as ranks:
        ranks.until(lambda: any("auroc" in line for line in metrics(tmp_path)))
        ranks.until(lambda: json.loads((tmp_path / "progress.json").read_text())["step"] > 0)
        text = look(tmp_path)
        assert re.search(r"^running for .* on " + re.escape(socket.gethostname()), text, re.M)
        assert re.search(r"^step [\d,]+ of [\d,]+ \([\d.]+%\), epoch \d+, .* to go", text, re.M)
        assert re.search(r"^[\d,]+ samples/s, [\d.]+% waiting for data, reading [\d.]+ \wB/s", text, re.M), (
            text
        )
        assert re.search(r"^loss [\d.]+ [▁-█]+ [\d.]+$", text, re.M)
        assert re.search(r"^val at step \d+: auroc [\d.]+", text, re.M)
        assert re.search(r"^newest checkpoint: \d+-step-\d+, ", text, re.M)
        assert "no heartbeat" not in text

        ranks.signal(signal.SIGSTOP, 1)
        try:
            wanted = rf"^no heartbeat of rank 1 on {re.escape(socket.gethostname())} for \d+ s$"
            ranks.until(lambda: re.search(wanted, look(tmp_path), re.M))
        finally:
            ranks.signal(signal.SIGCONT, 1)
        ranks.signal(signal.SIGTERM, 0)
        ranks.wait()
    text = look(tmp_path)
    assert "not running" in text and "samples/s" in text


def test_watching_costs_under_a_hundredth_of_a_core(tmp_path: Path) -> None:
    """Processor time of a look at a run in use; by itself `watch` looks every 5 seconds."""
    (tmp_path / "config.json").write_text('{"launch": {"model": "DLRM", "world_size": 64}}')
    row = {"step": 1, "epoch": 0, "loss": 0.5, "samples_per_second": 1.0, "time": time.time()}
    (tmp_path / "metrics.jsonl").write_text((json.dumps(row) + "\n") * 20_000)
    command = [sys.executable, "-m", "analysis", "watch", str(tmp_path), "--interval", "1"]
    used = []
    with hold_lock(tmp_path):
        watcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            assert watcher.stdout
            for line in watcher.stdout:
                if line.startswith("running for"):
                    fields = Path(f"/proc/{watcher.pid}/stat").read_text().rpartition(")")[2].split()
                    used.append((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))
                if len(used) == 8:
                    break
        finally:
            watcher.kill()
            watcher.wait()
    each = (used[-1] - used[1]) / (len(used) - 2)
    assert each < 0.05, each  # seconds, of the 5 between two looks


def test_folders_that_cannot_be_watched(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder, said in ((tmp_path / "absent", "no such folder"), (tmp_path, "is not a run folder")):
        done = run_command("watch", folder)
        assert done.code == 2 and said in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[[1]]", b'{"silent": [[1, 2], "x"], "step": "9", "time": 1e400}', b"\xff" * 1024]
)
def test_a_damaged_progress_file_is_left_out(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "config.json").write_text('{"launch": {"model": "DLRM"}}')
    (tmp_path / "progress.json").write_bytes(data)
    assert "not running: not started" in look(tmp_path)


def test_the_queue_is_asked_where_the_scheduler_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"launch": {"model": "DLRM"}}')
    (tmp_path / "env.txt").write_text("# The environment\nPBS_JOBID='17.pbs'\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "qstat").write_text('#!/bin/sh\necho "Job id"\necho "$1 dlrm me 00:01 R debug"\n')
    (tools / "qstat").chmod(0o755)
    command = [sys.executable, "-m", "analysis", "watch", str(tmp_path), "--once"]
    path = f"{tools}:{os.environ['PATH']}"
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "queue: job 17.pbs dlrm me 00:01 R debug"
