"""Progress: a bar on a terminal, lines in a log; the steps of a job."""

import re
import threading
import time
from pathlib import Path

import pytest
from support.terminal import run_on_terminal

from common.progress import StepProgress, show_progress


def test_a_log_gets_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress("read", " events", total=200, line_seconds=0.0) as bar:
        bar.add(50, "a.pfw.gz")
    shown = capsys.readouterr().err
    assert re.fullmatch(r"read: +25% 50.0/200 \[.*events/s, a.pfw.gz\]\n", shown)


def test_short_work_and_other_ranks_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for seconds, show in ((30.0, True), (0.0, False)):
        with show_progress("read", " events", line_seconds=seconds, show=show) as bar:
            bar.add(50)
    assert capsys.readouterr().err == ""


def test_steps_are_numbered_and_summed_over_threads(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepProgress, "LINE_SECONDS", 0.1)
    monkeypatch.setattr(StepProgress, "BAR_SECONDS", 0.05)
    progress = StepProgress(2, show=True, ranks=4)
    progress.skip_step("unpack", "no .gz files")
    with progress.step("count", bytes=4_000_000):
        threads = [threading.Thread(target=progress.add, args=(10, 500_000)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        time.sleep(0.3)
    first, *between, last = capsys.readouterr().err.splitlines()
    assert first == "step 1 of 2 unpack: no .gz files"
    assert any(
        re.fullmatch(r"step 2 of 2 count \(rank 0 of 4\): +50% 2.00M/4.00M \[.*, 40 rows\]", line)
        for line in between
    ), between
    assert re.fullmatch(r"step 2 of 2 count \(rank 0 of 4\): 40 rows, \d+ MB/s, \d\.\d s done", last)


def test_steps_on_a_terminal(tmp_path: Path) -> None:
    """toy shows a bar; run shows one for each step, and the line of a finished step stays."""
    shown = run_on_terminal("-m", "dlrm.prep", "toy", tmp_path / "tsv", "--days", 1, "--rows", 120_000)
    assert re.search(r"toy: +\d+%\|[^\n]*/120k", shown)
    shown = run_on_terminal(
        "-m", "dlrm.prep", "run", "--input_dir", tmp_path / "tsv", "--output_dir", tmp_path / "npy"
    )
    assert re.search(r"step 4 of 8 parse: +\d+%\|", shown)
    lines = [line.rpartition("\r")[2] for line in shown.split("\r\n")]
    assert any(re.search(r"step 4 of 8 parse: 120,000 rows, \d+ MB/s, .* s done$", line) for line in lines)
