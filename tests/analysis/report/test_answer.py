"""The answer on top of the report, of runs with one planted bottleneck each."""

from pathlib import Path
from typing import Any

import pytest
from support.made_traces import Made, training

from analysis.report.answer import Answer, find_answer
from analysis.report.facts import Facts
from analysis.tables.gather import gather_tables

OWN: dict[str, Any] = {"data": {"batch_size": 8}, "launch": {"device": "cpu"}}
STEPS = 40


def answer_of(run: Path, *ranks: Made, config: dict[str, Any] | None = None) -> Answer:
    for made in ranks:
        made.write(run)
    return find_answer(Facts(gather_tables(run), config or {}))


def test_compute(tmp_path: Path) -> None:
    found = answer_of(tmp_path, training(compute=11_800, wait=100))
    assert (found.bottleneck, found.io_is_bottleneck) == ("compute", False)
    assert found.storage_seconds == pytest.approx(STEPS * 100e-6)
    assert found.parts_s["compute"] == pytest.approx(STEPS * 11_800e-6)
    assert sum(found.parts_s.values()) == pytest.approx(found.wall_seconds)
    assert found.text == (
        "I/O is not the bottleneck: faster storage could save at most 4 ms of 490 ms (0.8%); "
        "the largest part is compute and copies (96%)."
    )


def test_communication(tmp_path: Path) -> None:
    found = answer_of(tmp_path, *(training(rank, 2, compute=2_000) for rank in range(2)))
    assert found.bottleneck == "communication" and not found.io_is_bottleneck
    assert found.parts_s["communication"] == pytest.approx(STEPS * 9_900e-6)


def test_waiting_for_storage(tmp_path: Path) -> None:
    found = answer_of(tmp_path, training(wait=9_000, compute=3_000, read_us=2_200), config=OWN)
    assert found.bottleneck == "storage" and found.io_is_bottleneck
    # never more than the reads themselves: 4 of 2.2 ms a step, while the rank waits for 9 ms
    assert found.storage_seconds == pytest.approx(STEPS * 8_800e-6, rel=0.01)
    assert "I/O is the bottleneck: faster storage could save up to 352 ms" in found.text


def test_waiting_for_the_loader_itself(tmp_path: Path) -> None:
    """The rank waits as long, but the reads are short: storage is not to blame."""
    found = answer_of(tmp_path, training(wait=9_000, compute=3_000, read_us=50), config=OWN)
    assert found.bottleneck == "waiting" and not found.io_is_bottleneck
    assert found.storage_seconds == pytest.approx(STEPS * 200e-6, rel=0.01)
    assert "the loader's own work, not its reads" in found.text
    # of a mapped dataset the trace has no reads, so nothing is known about them
    mapped = {**OWN, "data": {"mmap_mode": True}}
    found = find_answer(Facts(gather_tables(tmp_path), mapped))
    assert found.storage_seconds == pytest.approx(STEPS * 9_000e-6) and found.io_is_bottleneck


def test_ranks_that_take_turns_in_being_late(tmp_path: Path) -> None:
    """Each rank waits in every other step, the other one for it: storage costs every step."""
    ranks = []
    for rank in range(2):
        made = Made(rank, 2)
        made.span("startup", "build", 0, 10)
        for step in range(10):
            ts, late = 10 + step * 1000, step % 2 == rank
            made.span("train", "step", ts, 1000, epoch=0, step=step)
            made.span("data" if late else "torchrec", "wait" if late else "all2all_wait", ts, 600)
            made.span("torchrec", "forward", ts + 600, 400)
        made.span("train", "epoch", 10, 10_000, epoch=0)
        ranks.append(made)
    found = answer_of(tmp_path, *ranks)
    assert found.parts_s["waiting"] == pytest.approx(0.003)
    assert found.storage_seconds == pytest.approx(0.006) and found.io_is_bottleneck


def test_checkpoints(tmp_path: Path) -> None:
    made = training()
    made.span("checkpoint", "save", 500_000, 900_000)
    made.posix("write", 520_000, 860_000, "/ckpt/rank_0.bin", 5, ret=1 << 30)  # by a thread of its own
    found = answer_of(tmp_path, made)
    assert found.bottleneck == "storage" and "most of it in checkpoints" in found.text
    assert found.storage_seconds == pytest.approx(0.86 + STEPS * 100e-6, abs=0.001)
    assert found.parts_s["checkpoints"] == pytest.approx(0.9)


def test_start_up(tmp_path: Path) -> None:
    made = training(steps=5)
    for line in made.lines:
        if line.get("ts") and line["name"] not in ("imports",):
            line["ts"] += 2_000_000
    next(line for line in made.lines if line["name"] == "imports")["dur"] += 2_000_000
    found = answer_of(tmp_path, made)
    assert found.bottleneck == "startup" and "start-up (97%)" in found.text


def test_what_the_trace_does_not_say(tmp_path: Path) -> None:
    made = Made()
    made.span("strange", "thing", 0, 1000)
    found = answer_of(tmp_path / "a", made)
    assert found.bottleneck == "other" and "does not name what 100% of the time went to" in found.text
    assert "the trace has no file calls" in found.text
    instant = Made()
    instant.span("clock", "barrier", 5, 0, when="start")
    found = answer_of(tmp_path / "b", instant)
    assert (found.bottleneck, found.storage_seconds) == ("", 0.0) and "too short" in found.text
