"""The prefetching thread: order, bounded queue, errors at once, clean ends, position of what was consumed."""

import threading
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from support.data_folder import write_days

from dlrm.data.batches import BatchLoader
from dlrm.data.prefetch import Prefetcher
from dlrm.data.readers import open_source
from dlrm.runtime.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_days(tmp_path, [200, 9])


def make_prefetcher(folder: Path, depth: int = 2, **how: Any) -> Prefetcher:
    return Prefetcher(BatchLoader(open_source("stream", folder, "train"), 10, **how), depth)


def list_prefetch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]


def test_same_batches_in_the_same_order(folder: Path) -> None:
    plain = list(make_prefetcher(folder).batches)
    for depth in (1, 3, 100):
        loader = make_prefetcher(folder, depth)
        assert len(loader) == 20
        for epoch in (0, 1):
            loader.set_epoch(epoch)
            got = list(loader)
            assert [torch.equal(a.dense_features, b.dense_features) for a, b in zip(got, plain, strict=True)]
            assert loader.batch_number == 19 + 20 * epoch
    assert not list_prefetch_threads()


def test_the_line_is_bounded(folder: Path) -> None:
    loader = make_prefetcher(folder, depth=3)
    batches = iter(loader)
    next(batches)
    time.sleep(0.2)
    assert loader.batches.batch_number <= 1 + 3 + 1  # given, waiting, in the thread's hands
    batches.close()  # type: ignore[attr-defined]
    assert not list_prefetch_threads()


def test_position_is_of_what_was_consumed(folder: Path) -> None:
    loader = make_prefetcher(folder, depth=5)
    seen = []
    for step, batch in enumerate(loader):
        seen.append(batch.dense_features)
        if step == 6:
            time.sleep(0.1)  # the thread runs ahead
            break
    state = loader.state_dict()
    assert (state["step"], state["segments"]) == (7, [[70, 200]])
    again = make_prefetcher(folder)
    again.load_state_dict(state)
    assert again.state_dict() == state
    again.set_epoch(0)
    seen += [batch.dense_features for batch in again]
    want = [batch.dense_features for batch in make_prefetcher(folder)]
    assert all(torch.equal(a, b) for a, b in zip(seen, want, strict=True))
    assert again.state_dict()["segments"] == []
    again.set_epoch(1)
    assert again.state_dict()["segments"] == [[0, 200]]


def test_errors_come_with_their_traceback(folder: Path) -> None:
    loader = make_prefetcher(folder)
    path = folder / "day_0_dense.npy"
    loader.batches.source.read(0, 1)  # opens the file
    with open(path, "r+b") as file:
        file.truncate(5000)
    with pytest.raises(UserError, match="ends at byte 5000") as caught:
        list(loader)
    assert any(frame.name == "_read_bytes" for frame in traceback.extract_tb(caught.value.__traceback__))
    assert not list_prefetch_threads()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_exception_in_the_loop_ends_the_thread(folder: Path, error: type[BaseException]) -> None:
    begun = time.monotonic()
    with pytest.raises(error):
        consume(make_prefetcher(folder, depth=1), error)
    assert not list_prefetch_threads()
    assert time.monotonic() - begun < 1


def consume(loader: Prefetcher, error: type[BaseException]) -> None:
    batches = iter(loader)
    try:
        for step, _ in enumerate(batches):
            if step == 2:
                raise error
    finally:
        batches.close()  # type: ignore[attr-defined]


def test_a_broken_loop_and_a_new_pass(folder: Path) -> None:
    loader = make_prefetcher(folder)
    for _ in loader:
        break
    assert len(list(loader)) == 20
    assert not list_prefetch_threads()
