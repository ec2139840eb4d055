"""A plain PyTorch script on two ranks: the same results, every byte in the trace, steps and workers."""

import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from support import plain_training
from support.analysis_command import run_command
from support.file_calls import count_strace_calls, count_traced_calls, list_strace_words, read_events
from support.job_scripts import clean_environment

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "support" / "plain_training.py"
STEPS = (
    plain_training.EPOCHS * plain_training.ROWS // (2 * 2 * plain_training.BATCH)
)  # two ranks, two batches


def start(here: Path, *words: object) -> subprocess.Popen:
    command = ["./launcher.sh", *map(str, words)]
    return subprocess.Popen(
        command, cwd=ROOT, env=clean_environment(NPROC=2, DLRM_THREADS=1), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with and one without the tracer, at the same time."""
    here = tmp_path_factory.mktemp("plain")
    data = plain_training.make_data(here / "data")
    for name in ("plain", "traced"):
        (here / name).mkdir()
    both = [
        start(here, sys.executable, SCRIPT, data, here / "plain"),
        start(
            here, *list_strace_words(here), sys.executable, "-m", "dlrm.traced", "--output_dir", here / "run",
            "--profile_steps", "2-3", SCRIPT, data, here / "traced",
        ),
    ]  # fmt: skip
    for process in both:
        text, _ = process.communicate(timeout=180)
        assert process.returncode == 0, text
        assert "Traceback" not in text and "not traced" not in text, text
    return here


def test_results_are_the_same(here: Path) -> None:
    for rank in (0, 1):
        texts = [(here / name / f"losses{rank}.txt").read_text() for name in ("plain", "traced")]
        assert texts[0].replace("/plain'", "/traced'") == texts[1]
        for epoch in range(plain_training.EPOCHS):
            name = f"rank{rank}-{epoch}"
            states = [torch.load(here / each / f"{name}.pt") for each in ("plain", "traced")]
            assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
            assert (here / "plain" / f"{name}.npy").read_bytes() == (
                here / "traced" / f"{name}.npy"
            ).read_bytes()


def test_every_byte_is_in_the_trace(here: Path) -> None:
    events = read_events(here / "run")
    traced = count_traced_calls(events)
    spans = [e["args"] for e in events if (e.get("cat"), e["name"]) == ("data", "read")]
    # each rank has half of the rows in each epoch, and all to evaluate
    for path in (here / "data/rows").iterdir():
        read = [span for span in spans if span["file"] == str(path)]
        assert len(read) == 3 * plain_training.EPOCHS
        assert {span["bytes"] for span in read} == {np.load(path).nbytes}
        assert traced.bytes[str(path), "read"] >= sum(span["bytes"] for span in read)
    for path in (here / "traced").iterdir():
        assert traced.bytes[str(path), "write"] == path.stat().st_size, path
    logs = [path.read_text() for path in here.glob("calls.*")]
    asked = count_strace_calls("".join(logs))
    for folder in ("data", "traced"):
        assert not logs or traced.below(here / folder) == asked.below(here / folder)
    mapped = [(span["file"], span["bytes"]) for span in spans if span.get("mapped")]
    assert mapped == [(f"{here}/data/weights.bin", 20_000)] * 2


def test_steps_and_what_is_in_them(here: Path) -> None:
    events = read_events(here / "run")
    spans = Counter((e["cat"], e["name"]) for e in events if e.get("cat") not in ("POSIX", "STDIO"))
    epochs, batches = (
        plain_training.EPOCHS,
        plain_training.EPOCHS * plain_training.ROWS // plain_training.BATCH,
    )
    assert spans["train", "step"] == 2 * STEPS
    assert spans["compute", "optimizer"] == 2 * 2 * STEPS
    assert spans["compute", "backward"] == batches
    assert spans["pipeline", "evaluate"] == spans["checkpoint", "save"] == 2 * epochs
    assert spans["comm", "all_reduce"] == 2 * epochs + batches  # and of gradients
    assert spans["data", "preprocess"] == batches + 2 * epochs
    steps = [e for e in events if (e["cat"], e["name"]) == ("train", "step")]
    numbers = {(e["args"]["step"], e["args"]["epoch"]) for e in steps}
    assert numbers == {(step + 1, step // (STEPS // epochs)) for step in range(STEPS)}
    inside = Counter(
        (e["pid"], e["args"]["epoch"], step["args"]["epoch"])
        for e in events if (e.get("cat"), e["name"]) == ("pipeline", "epoch") for step in steps
        if step["pid"] == e["pid"] and e["ts"] <= step["ts"]
        and step["ts"] + step["dur"] <= e["ts"] + e["dur"]
    )  # fmt: skip
    assert len(inside) == 2 * epochs and set(inside.values()) == {STEPS // epochs}
    assert all(epoch == of_step for _, epoch, of_step in inside)
    workers = {e["pid"] for e in events if e["name"] == "CM" and e["args"].get("value") == "worker"}
    loading = {e["pid"] for e in events if (e.get("cat"), e["name"]) == ("data", "preprocess")}
    assert len(workers) == 2 * 2 * epochs and workers <= loading


def test_gradients_that_are_summed_in_cpp(here: Path) -> None:
    """Each has a span within its backward pass, with the bytes of all gradients."""
    events = read_events(here / "run")
    sums = [e for e in events if "hidden_us" in e.get("args", {})]
    passes = [e for e in events if (e.get("cat"), e["name"]) == ("compute", "backward")]
    assert len(sums) == len(passes)
    weights = 4 * (16 * 8 + 8 + 8 + 1)
    for each in sums:
        assert each["name"] == "all_reduce" and each["args"]["bytes"] == weights
        inside = [
            p for p in passes
            if p["pid"] == each["pid"] and p["ts"] <= each["ts"] - each["args"]["hidden_us"]
            and each["ts"] + each["dur"] <= p["ts"] + p["dur"]
        ]  # fmt: skip
        assert len(inside) == 1 and inside[0]["args"]["step"] == each["args"]["step"]


def test_profiled_steps(here: Path) -> None:
    """The second step of the first epoch and the first one of the next."""
    for rank, path in enumerate(sorted((here / "run/profile").iterdir())):
        assert path.name.startswith(f"rank0000{rank}-steps2-3-")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        marks = [e for e in events if str(e.get("name")).startswith("ProfilerStep#")]
        # asking for a batch that was not there began a step, too
        assert sorted(mark["name"] for mark in marks) == ["ProfilerStep#2", *["ProfilerStep#3"] * 2]
        marks.sort(key=lambda mark: mark["ts"])
        # two batches a step; the evaluation between the epochs is in none
        passes = [e for e in events if e["ph"] == "X" and e["name"] == "DistributedDataParallel.forward"]
        inside = [
            sum(m["ts"] <= p["ts"] and p["ts"] + p["dur"] <= m["ts"] + m["dur"] for p in passes)
            for m in marks
        ]
        assert inside == [2, 0, 2]


def test_check_and_report(here: Path) -> None:
    checked = run_command("check", here / "run")
    assert checked.code == 0 and "every byte that was compared is in the trace" in checked.out, checked
    assert f"{here}/data/weights.bin: 40,000 bytes" in checked.out
    # a count that is neither the tracer's nor the script's: pipes of workers and /proc are in it, too
    counted = re.search(r"the kernel counted ([\d,]+) bytes .* of 2 ranks .*: ([\d,]+) \(", checked.out)
    assert counted, checked.out
    kernel, traced = (int(number.replace(",", "")) for number in counted.groups())
    assert 0.98 * kernel < traced <= kernel
    reported = run_command("report", here / "run")
    assert reported.code == 0 and "2 ranks" in reported.out, reported
    assert (here / "run" / "report.html").exists()
