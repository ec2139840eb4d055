"""The row cache and the row files of tables in files: against plain arrays, reopened, damaged, full."""

import os
import subprocess
import sys
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dlrm.embeddings.ssd.cached_table import CachedTable, TableShare, WholeTable, share_budget
from dlrm.embeddings.ssd.row_cache import CacheFull, RowCache
from dlrm.embeddings.ssd.row_file import RowFile
from dlrm.embeddings.tables import fill_shard
from dlrm.runtime.errors import UserError

ROWS, DIM = 3000, 8


def open_table(
    folder: Path, slots: int = 200, state: int = 1, rows: int = ROWS, io_thread: Executor | None = None,
    **changed: Any,
) -> CachedTable:  # fmt: skip
    arguments = {"table": "t_a", "rows": rows, "dim": DIM, "state": state, "optimizer": "x", "seed": 5}
    row_file = RowFile(folder, **arguments | changed)
    table = TableShare("t_a", rows, DIM, state)
    values = torch.zeros(slots, state) if state else None
    return CachedTable(table, row_file, torch.zeros(slots, DIM), values, io_thread)


def first_values(rows: int = ROWS) -> np.ndarray:
    weights = torch.empty(rows, DIM)
    fill_shard(weights, 0, 0, rows, DIM, "t_a", 5, None)
    return weights.numpy()


def draw_skewed(random: np.random.Generator, count: int, rows: int = ROWS, power: int = 4) -> np.ndarray:
    return (rows * random.random(count) ** power).astype(np.int64)


def work(
    table: CachedTable, weights: np.ndarray, state: np.ndarray, batches: int, seed: int, power: int = 4
) -> None:  # fmt: skip
    """Batches of updates on the table and on whole arrays; what is looked up is the same."""
    random = np.random.default_rng(seed)
    all_ids = [draw_skewed(random, 150, len(weights), power) for _ in range(batches)]
    for batch, ids in enumerate(all_ids):
        change = batch % 3 != 2
        slots = table.admit_rows(ids, change)
        if batch % 4:  # sometimes another batch follows than the one that was prefetched
            table.prefetch_rows(all_ids[(batch + 1 + batch % 2) % batches])
        np.testing.assert_array_equal(table.weights[slots], weights[ids])
        assert table.state is not None
        np.testing.assert_array_equal(table.state[slots], state[ids])
        if change:
            rows, at = np.unique(ids, return_index=True)
            step = random.random((len(rows), DIM), np.float32)
            for values, into in ((weights, rows), (table.weights, slots[at])):
                values[into] += step
            for values, into in ((state, rows), (table.state, slots[at])):
                values[into] += step[:, :1]


def test_slots_agree_with_a_plain_map_under_random_batches() -> None:
    random, cache = np.random.default_rng(0), RowCache(64)
    cached: dict[int, int] = {}  # row -> slot, kept by plain means
    changed: set[int] = set()
    for batch in range(400):
        ids = draw_skewed(random, int(random.integers(1, 60)))
        change = bool(batch % 2)
        lookup = cache.look_up(draw_skewed(random, 30) if batch % 5 else ids) if batch % 3 else None
        new = cache.admit_rows(ids, change, lookup)
        slots, missing, into, evicted, evicted_slots = (
            new.slots,
            new.missing,
            new.missing_slots,
            new.evicted,
            new.evicted_slots,
        )
        assert set(missing.tolist()) == {row for row in ids.tolist() if row not in cached}
        assert set(evicted.tolist()) <= changed
        assert all(
            cached[row] == slot for row, slot in zip(evicted.tolist(), evicted_slots.tolist(), strict=True)
        )
        freed = set(into.tolist())
        gone = {row for row, slot in cached.items() if slot in freed}
        assert gone & changed == set(evicted.tolist()) and not gone & set(ids.tolist())
        cached = {row: slot for row, slot in cached.items() if row not in gone}
        cached |= dict(zip(missing.tolist(), into.tolist(), strict=True))
        changed -= gone
        changed |= set(ids.tolist()) if change else set()
        assert [cached[row] for row in ids.tolist()] == slots.tolist()
        assert len(set(cached.values())) == len(cached) <= 64
    assert cache.misses and cache.evictions


def test_rows_looked_up_again_outlast_those_looked_up_once() -> None:
    cache = RowCache(100)
    for batch in range(50):
        cache.admit_rows(np.concatenate((np.arange(40), 1000 + np.arange(50) + 50 * batch)), False)
    before = cache.misses
    cache.admit_rows(np.arange(40), False)
    assert cache.misses == before


def test_a_batch_of_too_many_rows_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    table = open_table(tmp_path, slots=50)
    weights, random = first_values(), np.random.default_rng(1)
    table.admit_rows(np.arange(30), False)
    with pytest.raises(CacheFull):
        table.cache.admit_rows(np.arange(51), False)
    with pytest.raises(UserError, match="touches 400 rows, its cache holds 50.*cache_memory_budget_mb"):
        table.admit_rows(np.arange(400), True)
    for _ in range(20):
        ids = random.integers(0, ROWS, 50)
        np.testing.assert_array_equal(table.weights[table.admit_rows(ids, False)], weights[ids])


@pytest.mark.parametrize("slots", [150, 400, ROWS])
@pytest.mark.parametrize("threads", [0, 1])
def test_rows_are_those_of_a_table_in_memory_and_survive_the_process(
    tmp_path: Path, slots: int, threads: int
) -> None:
    weights, state = first_values(), np.zeros((ROWS, 1), np.float32)
    for opening in range(3):
        table = open_table(tmp_path, slots, io_thread=ThreadPoolExecutor(1) if threads else None)
        assert table.consistent
        work(table, weights, state, 60, opening)
        table.close()
    table = open_table(tmp_path, slots, seed=99)  # rows not read so far get the first job's values
    work(table, weights, state, 20, 7)
    for part, whole in (
        (WholeTable(table.table, table, False), weights),
        (WholeTable(table.table, table, True), state),
    ):
        np.testing.assert_array_equal(all_of(part).reshape(whole.shape), whole)


def all_of(part: WholeTable) -> np.ndarray:
    (later,) = part.copy()
    return np.frombuffer(b"".join(later.read_parts()), np.float32)


def test_bytes_are_counted_as_the_kernel_counts_them(tmp_path: Path) -> None:
    table = open_table(tmp_path)

    def kernel() -> tuple[int, int]:
        lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(lines["rchar"]), int(lines["wchar"])

    table.admit_rows(np.arange(10), True)  # the description is written now
    read, written = table.row_file.bytes_read, table.row_file.bytes_written
    idle = kernel()
    noise = kernel()[0] - idle[0]  # of reading /proc/self/io itself
    begun = kernel()
    for first in range(0, ROWS, 100):
        table.admit_rows(np.arange(first, first + 100), True)
    table.wait_for_writes()
    ended = kernel()
    assert abs(ended[0] - begun[0] - noise - (table.row_file.bytes_read - read)) < 64
    assert ended[1] - begun[1] == table.row_file.bytes_written - written > 0


def test_a_killed_job_leaves_an_inconsistent_row_file(tmp_path: Path) -> None:
    table = open_table(tmp_path)
    table.admit_rows(np.arange(100), True)
    os.close(table.row_file._file)  # as a kill does: nothing flushed, the lock gone
    assert not open_table(tmp_path).consistent


@pytest.mark.parametrize(
    "changed, says",
    [({"rows": 2999}, "rows 3000"), ({"dim": 4}, "dim 8"), ({"optimizer": "sgd"}, "optimizer x")],
)
def test_another_table_is_refused(tmp_path: Path, changed: dict[str, Any], says: str) -> None:
    open_table(tmp_path).close()
    before = (tmp_path / "t_a.rows").read_bytes()
    facts: dict[str, Any] = {"rows": ROWS, "dim": DIM, "state": 1, "optimizer": "x", "seed": 5} | changed
    with pytest.raises(UserError, match=f"t_a.rows: made with {says}"):
        RowFile(tmp_path, "t_a", **facts)
    assert (tmp_path / "t_a.rows").read_bytes() == before


def test_a_damaged_row_file_is_an_error_with_its_name(tmp_path: Path) -> None:
    open_table(tmp_path).close()
    rows, about = tmp_path / "t_a.rows", tmp_path / "t_a.json"
    os.truncate(rows, 1000)
    with pytest.raises(UserError, match="t_a.rows: 1000 bytes, 108000 expected"):
        open_table(tmp_path)
    os.truncate(rows, 108000)
    text = about.read_text()
    about.write_text(text[:20])
    with pytest.raises(UserError, match="t_a.json: not the description"):
        open_table(tmp_path)
    about.unlink()
    with pytest.raises(UserError, match="rows without t_a.json"):
        open_table(tmp_path)


def test_a_row_file_cut_while_in_use_is_an_error_with_its_name(tmp_path: Path) -> None:
    table = open_table(tmp_path)
    table.admit_rows(np.arange(100), True)
    os.truncate(tmp_path / "t_a.rows", 500)
    with pytest.raises(UserError, match="ends too early"):
        table.admit_rows(np.arange(2900, 3000), True)


def test_two_jobs_on_one_row_file_are_refused(tmp_path: Path) -> None:
    first = open_table(tmp_path)
    with pytest.raises(UserError, match="another job trains this table"):
        open_table(tmp_path)
    first.close()
    open_table(tmp_path).close()


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
sys.path.insert(0, "tests/embeddings")
from test_row_cache import open_table
from dlrm.runtime.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
table = open_table(folder, slots=1000, rows=400_000)
table.admit_rows(np.arange(10), True)
resource.setrlimit(resource.RLIMIT_FSIZE, (8_000_000, -1))
try:
    table.admit_rows(np.arange(399_000, 399_100), True)
except UserError as error:
    print(error)
"""


def test_a_full_disk_is_an_error_with_the_file_name(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=100
    )
    assert "t_a.rows: File too large: free some space" in done.stdout, done.stderr
    assert not open_table(tmp_path, rows=400_000).consistent


BOUNDED = """
import sys
from pathlib import Path
import numpy as np, torch
from dlrm.embeddings.ssd.row_file import RowFile
from dlrm.embeddings.ssd.cached_table import TableShare, CachedTable, share_budget
def memory(what):
    return int(next(l for l in open("/proc/self/status") if l.startswith(what)).split()[1]) * 1024 / 1e6
budget, dim = 36e6, 32
table = TableShare("t_a", int(8 * budget) // (8 * dim), dim, dim)
slots = share_budget([table], int(budget))["t_a"]
def run(rows, slots, folder, batches):
    row_file = RowFile(Path(folder), "t_a", rows, dim, dim, "adagrad", 0)
    cached = CachedTable(table, row_file, torch.zeros(slots, dim), torch.zeros(slots, dim))
    cached.admit_rows(np.arange(100), True)
    random = np.random.default_rng(0)
    for _ in range(batches):
        cached.weights[cached.admit_rows(random.integers(0, rows, 2000), True)] += 1
    return cached
small = run(70_000, 3000, sys.argv[1] + "/small", 10)
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
cached = run(table.rows, slots, sys.argv[1] + "/large", 250)
print(memory("VmHWM") - before, cached.cache.evictions, (cached.cache.row >= 0).sum() / slots)
"""


def test_a_table_of_eight_budgets_is_trained_within_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, str(tmp_path)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    grown, evictions, used = map(float, done.stdout.split())
    assert evictions > 100_000 and used == 1
    assert 25 < grown <= 36  # MB at the peak: rows, index and buffers


def test_small_tables_are_cached_whole_the_others_share_the_rest() -> None:
    tables = [
        TableShare("small", 10, 16, 0),
        TableShare("a", 100_000, 16, 16),
        TableShare("b", 200_000, 16, 16, 3.0),
    ]
    slots = share_budget(tables, 1_000_000)
    assert slots["small"] == 10
    assert slots["b"] == pytest.approx(3 * slots["a"], abs=3)
    used = sum(slots[table.name] * table.slot_bytes for table in tables)
    assert 740_000 < used <= 750_000  # a quarter for buffers, of larger budgets less
