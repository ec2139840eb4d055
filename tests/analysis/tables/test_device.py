"""What the report says came from a device and what from memory: real processes, and planted counters."""

import json
from pathlib import Path

import pytest

from analysis.report import report
from analysis.report.run import open_run
from analysis.tables import device
from dlrm.runtime.device_io import find_file_system
from tests.support import made_traces, traced
from tests.support.disk import mount_small_disk

MB = 1 << 20
# An epoch that reads a file of 8 MB cold, and an evaluation that reads it again.
READING = (
    traced.COLD_FILE
    + """
def read_all():
    with trace.span("data", "read", file=path, bytes=8 << 20):
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 20):
                pass
trace.start_tracing(run, here, "train", folders={"--data_path": path})
trace.sample_io()
with trace.span("train", "epoch"):
    with trace.span("train", "step", batch=0):
        read_all()
trace.sample_io()
with trace.span("eval", "evaluate", split="val"):
    read_all()
trace.stop_tracing()
"""
)


def make_report(run: Path) -> dict:
    report.write_report(run)
    return json.loads((run / "summary.json").read_text())


def test_cold_training_and_warm_evaluation(tmp_path):
    if find_file_system(tmp_path).get("type") == "tmpfs":
        pytest.skip("needs a folder on a disk")
    run = traced.run(tmp_path / "run", READING)
    summary = make_report(run)
    train, evaluate = (
        next(row for row in summary["device"] if row["phase"] == phase) for phase in ("train", "evaluate")
    )
    assert train["read_bytes"] == evaluate["read_bytes"] == 8 * MB
    # the samples are a moment before and after the epoch: what is gained is spread over that, too
    assert 7.6 * MB <= train["device_read_bytes"] < 9 * MB and train["device_read_share"] > 0.95
    assert evaluate["device_read_bytes"] < MB / 4 and evaluate["device_read_share"] < 0.04
    assert 8 * MB <= sum(row["device_read_bytes"] for row in summary["device"]) < 9 * MB
    assert evaluate["cache_read_bytes"] == 8 * MB - evaluate["device_read_bytes"]
    metrics = summary["metrics"]
    assert metrics["device_read_bytes"] == sum(row["device_read_bytes"] for row in summary["device"])
    assert metrics["device_read_share"] == pytest.approx(
        metrics["device_read_bytes"] / (metrics["device_read_bytes"] + metrics["cache_read_bytes"])
    )
    folders = {row["folder"]: row for row in summary["file_systems"]}
    assert folders["--data_path"]["path"] == str(run / "data.bin")
    assert folders["run folder"]["reads_are"] in ("device", "not known")
    page = (run / "report.html").read_text()
    assert "From a device or from memory" in page and "of the bytes read came from a device" in page
    assert (run / "tables" / "device.csv").exists() and (run / "tables" / "file_systems.csv").exists()


def test_a_run_on_tmpfs_is_said_to_be_memory(tmp_path):
    with mount_small_disk(tmp_path / "disk", 64) as disk:
        run = traced.run(disk / "run", READING)
        summary = make_report(run)
        assert {row["reads_are"] for row in summary["file_systems"]} == {"memory"}
        assert summary["metrics"]["device_read_share"] < 0.05
        assert summary["metrics"]["cache_read_bytes"] > 15 * MB
        said = device.describe_reads(open_run(run).joined, "train", "evaluate")
        assert "0% of the bytes read came from a device" in said or "less than 1%" in said


def plant(run: Path, *notes: tuple[str, str], counters: bool = True) -> None:
    """A healthy training of 160 MB, whose device gave half of them, evenly over the steps."""
    made = made_traces.training(steps=40)
    for key, text in notes:
        made._meta("CM", key, text)
    if counters:
        last = max(line["ts"] + line["dur"] for line in made.lines if line["ph"] == 1) - made_traces.BEGIN
        for ts, value in ((0, 5_000), (10_000, 5_000), (last, 5_000 + 80 * MB)):
            made.span("counter", "proc/read_bytes", ts, 0, value=value)
    made.write(run)


def test_half_from_the_device(tmp_path):
    plant(tmp_path)
    joined = open_run(tmp_path).joined
    (row,) = [row for row in device.sum_device(joined, "phase").to_dicts() if row["phase"] == "train"]
    assert row["device_read_bytes"] == 80 * MB and row["cache_read_bytes"] == 80 * MB
    assert row["major_faults"] is None or row["major_faults"] == 0
    assert "50% of the bytes read came from a device" in device.describe_reads(joined)


def test_traces_without_counters_claim_nothing(tmp_path):
    plant(tmp_path, counters=False)
    summary = make_report(tmp_path)
    assert not [key for key in summary["metrics"] if "device" in key or "cache" in key]
    assert summary["device"] == [] and summary["file_systems"] == []
    assert "it is not known what came from a device" in (tmp_path / "report.html").read_text()


def test_the_reason_of_missing_counters_is_a_note(tmp_path):
    plant(tmp_path, ("io_error", "/proc/self/io: Permission denied"), counters=False)
    notes = [note for note in make_report(tmp_path)["notes"] if "/proc/self/io" in note]
    assert len(notes) == 1 and notes[0].endswith("of rank 0: /proc/self/io: Permission denied.")


def test_file_systems_in_words(tmp_path):
    lustre = {
        "folder": "--data_path", "path": "/eagle/data", "type": "lustre", "mount": "/eagle",
        "source": "10.0.0.1@o2ib:/eagle", "options": "rw,flock",
        "layout": [
            {"stripe_count": 1, "stripe_size": 4 * MB, "end": "4194304"},
            {"stripe_count": -1, "stripe_size": MB, "end": "EOF", "pool": "original"},
        ],
    }  # fmt: skip
    notes = [("file_system", text) for text in ("[[[", "{}", "7", '{"path": 7}', json.dumps(lustre))]
    plant(tmp_path, *notes)
    joined = open_run(tmp_path).joined
    (row,) = device.list_file_systems(joined).to_dicts()
    assert row["stripes"] == (
        "1 x 4194304 bytes up to 4194304, all targets x 1048576 bytes up to EOF in pool original"
    )
    assert row["host"] == "n0" and row["reads_are"] == "not known"
    assert "the kernel may not count what is read of lustre" in device.describe_reads(joined)
