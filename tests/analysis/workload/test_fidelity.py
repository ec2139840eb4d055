"""How faithful a copy is, by numbers that are planted in two runs."""

import json
from pathlib import Path

import pytest
from support.made_traces import Made, training

from analysis.workload.fidelity import Fidelity, compare_with_original

STEPS, PERIOD_US = 40, 12_010  # of `training`: a step of 12,000 us, and 10 us to the next
KB = 1 << 10


def write_run(folder: Path, *made: Made) -> Path:
    for one in made:
        one.write(folder)
    config = {"data": {"in_memory_binary_criteo_path": "/data"}, "launch": {"directory": "/"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def compare(tmp_path: Path, original: list[Made], copy: list[Made]) -> Fidelity:
    return compare_with_original(
        write_run(tmp_path / "original", *original), write_run(tmp_path / "copy", *copy)
    )


def test_a_run_is_its_own_copy(tmp_path: Path) -> None:
    found = compare(tmp_path, [training()], [training()])
    assert found.different_requests == 0 and set(found.errors.values()) == {0.0}
    assert [(each.file, each.requests) for each in found.files] == [("data/day_0_sparse.npy", 4 * STEPS)]


def test_waiting_and_io_that_nothing_hides(tmp_path: Path) -> None:
    """Four reads of 200 us begin with each step, 1 us apart. One rank waits 100 us for them, then computes;
    in the copy one waits until all are done."""
    ranks = [training(0, 2, wait=100), training(1, 2, wait=100)]
    found = compare(tmp_path, ranks, [training(0, 2, wait=100), training(1, 2, wait=3_000)])
    whole = (STEPS - 1) * PERIOD_US + 12_000
    waiting, hidden = found.values["waiting share"], found.values["unhidden I/O, share"]
    assert waiting == pytest.approx((STEPS * 100 / whole, STEPS * 3_000 / whole))
    trained = STEPS * PERIOD_US  # the phase: from the first step to the end of the epoch
    assert hidden == pytest.approx((STEPS * 100 / trained, STEPS * 4 * 200 / trained))
    for name, (one, two) in (("waiting share", waiting), ("unhidden I/O, share", hidden)):
        assert found.errors[name] == pytest.approx(two - one)
    assert found.errors["step time, median"] == found.different_requests == 0
    assert found.worst[0] == "waiting share" and "24.1%, of waiting share" in found.describe()


def test_who_waits_for_whom_is_no_error(tmp_path: Path) -> None:
    """Data come too slowly for both: one waits for its own and the other for that rank, or the other way."""
    late, other = 6_000, 100
    found = compare(
        tmp_path,
        [training(0, 2, wait=late), training(1, 2, wait=other)],
        [training(0, 2, wait=other), training(1, 2, wait=late)],
    )
    assert found.values["waiting share"][0] > 0.4
    assert found.errors["waiting share"] == found.errors["unhidden I/O, share"] == 0


def test_who_waits_for_whom_may_change(tmp_path: Path) -> None:
    """Each rank waits for its data in half of the steps, in the copy one of them in all."""
    found = compare(
        tmp_path,
        [training(rank, 2, wait=lambda step, rank=rank: 6_000 * (step % 2 == rank)) for rank in range(2)],
        [training(0, 2, wait=6_000), training(1, 2, wait=0)],
    )
    assert found.values["unhidden I/O, share"][0] > 0.05
    assert found.errors["waiting share"] == found.errors["unhidden I/O, share"] == 0


def test_each_request_that_differs_is_counted(tmp_path: Path) -> None:
    """One read is of other bytes, one more is made, one of the original's is missing."""

    def make(sizes: tuple[int, ...]) -> Made:
        made = training(reads=0)
        for i, size in enumerate(sizes):
            made.posix("pread64", 10_100 + i * 500, 50, "/data/x.npy", 7, ret=size, offset=i * 64 * KB)
        return made

    found = compare(tmp_path, [make((KB, KB, 8 * KB))], [make((KB, 2 * KB))])
    (file,) = found.files
    assert (file.requests, file.bytes, file.missing, file.extra) == (3, 10 * KB, 2, 1)
    assert found.errors["requests"] == pytest.approx(3 / 5)
    # a half in one size class is a third, in another none a half and a third
    assert found.errors["sizes of requests"] == pytest.approx((abs(2 / 3 - 1 / 2) + 1 / 2 + 1 / 3) / 2)
