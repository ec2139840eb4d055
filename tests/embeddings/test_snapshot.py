"""A checkpoint of tables in files is of one moment, while rows go on changing."""

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
from test_row_cache import ROWS, first_values, opened, work

from dlrm.embeddings.ssd.cached_table import WholeTable


def test_a_checkpoint_reads_one_moment_while_training_goes_on(tmp_path: Path) -> None:
    rows = 300_000  # in three blocks, eleven portions
    tier = opened(tmp_path, slots=2000, rows=rows, beside=ThreadPoolExecutor(1))
    weights, state = first_values(rows), np.zeros((rows, 1), np.float32)
    seen = []
    for save in range(3):
        work(tier, weights, state, 30, save, 1)
        then = weights.copy(), state.copy()
        parts = [WholeTable(tier.table, tier, each) for each in (False, True)]
        laters = [later for part in parts for later in part.copy()]
        assert laters[0].moment is laters[1].moment
        made: list[list[bytes]] = [[], []]

        def read(laters: Any = laters, made: Any = made) -> None:
            for later, into in zip(laters, made, strict=True):
                for part in later.parts():
                    into.append(bytes(part))
                    time.sleep(0.02)

        thread = threading.Thread(target=read)
        thread.start()
        batches = 0
        while thread.is_alive() or batches < 10:
            work(tier, weights, state, 3, 100 + batches, 1)
            batches += 1
        thread.join()
        for values, parts_of in zip(then, made, strict=True):
            np.testing.assert_array_equal(np.frombuffer(b"".join(parts_of), np.float32), values.reshape(-1))
        assert not np.array_equal(then[0], weights)
        seen.append(laters[0].moment._count)
        del laters, thread, read
    assert min(seen) > 500  # rows were overwritten meanwhile
    gc.collect()
    assert tier._moment() is None  # nothing is put aside any more
    assert {path.name for path in tmp_path.iterdir()} == {"t_a.rows", "t_a.json"}
    tier.close()


def test_without_room_for_old_values_only_the_checkpoint_fails(tmp_path: Path) -> None:
    tier = opened(tmp_path, beside=ThreadPoolExecutor(1))
    weights, state = first_values(), np.zeros((ROWS, 1), np.float32)
    work(tier, weights, state, 20, 0)
    (later,) = WholeTable(tier.table, tier, False).copy()
    full = os.open("/dev/full", os.O_RDWR)
    os.dup2(full, later.moment._aside)
    os.close(full)
    work(tier, weights, state, 20, 1)
    tier.settle()
    with pytest.raises(OSError) as failed:
        list(later.parts())
    assert failed.value.errno == errno.ENOSPC
    work(tier, weights, state, 20, 2)
    del later, failed
    gc.collect()
    tier.close()
