"""A checkpoint of tables in files has the rows of one step, while training continues to change them."""

import errno
import gc
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_row_cache import ROWS, first_values, open_table, work

from dlrm.embeddings.ssd.cached_table import WholeTable


def test_a_checkpoint_has_the_rows_of_one_step_while_training_continues(tmp_path: Path) -> None:
    rows = 300_000  # in three blocks, eleven portions
    table = open_table(tmp_path, slots=2000, rows=rows, io_thread=ThreadPoolExecutor(1))
    weights, state = first_values(rows), np.zeros((rows, 1), np.float32)
    seen = []
    for save in range(3):
        work(table, weights, state, 30, save, 1)
        then = weights.copy(), state.copy()
        parts = [WholeTable(table.table, table, each) for each in (False, True)]
        slices = [slice_ for part in parts for slice_ in part.copy()]
        assert slices[0].snapshot is slices[1].snapshot
        made: list[list[bytes]] = [[], []]

        def read(slices: Any = slices, made: Any = made) -> None:
            for slice_, into in zip(slices, made, strict=True):
                for part in slice_.read_parts():
                    into.append(bytes(part))
                    time.sleep(0.02)

        thread = threading.Thread(target=read)
        thread.start()
        batches = 0
        while thread.is_alive() or batches < 10:
            work(table, weights, state, 3, 100 + batches, 1)
            batches += 1
        thread.join()
        for values, parts_of in zip(then, made, strict=True):
            np.testing.assert_array_equal(np.frombuffer(b"".join(parts_of), np.float32), values.reshape(-1))
        assert not np.array_equal(then[0], weights)
        seen.append(slices[0].snapshot._count)
        del slices, thread, read
    assert min(seen) > 500  # rows were overwritten meanwhile
    gc.collect()
    assert table._snapshot() is None  # no old values are saved any more
    assert {path.name for path in tmp_path.iterdir()} == {"t_a.rows", "t_a.json"}
    table.close()


def test_when_old_values_cannot_be_written_only_the_checkpoint_fails(tmp_path: Path) -> None:
    table = open_table(tmp_path, io_thread=ThreadPoolExecutor(1))
    weights, state = first_values(), np.zeros((ROWS, 1), np.float32)
    work(table, weights, state, 20, 0)
    (slice_,) = WholeTable(table.table, table, False).copy()
    full = os.open("/dev/full", os.O_RDWR)
    os.dup2(full, slice_.snapshot._old_values)
    os.close(full)
    work(table, weights, state, 20, 1)
    table.wait_for_writes()
    with pytest.raises(OSError) as failed:
        list(slice_.read_parts())
    assert failed.value.errno == errno.ENOSPC
    work(table, weights, state, 20, 2)
    del slice_, failed
    gc.collect()
    table.close()
