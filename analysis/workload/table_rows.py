"""Rows of tables in files: what another thread's calls take in a step, and how long it waits for them.

In: the events of one rank, its steps. Out: columns of its steps, in us (int64), 0 where no table is in files.
The trainer's thread for tables (`dlrm/embeddings/ssd`) writes the last batch's rows and reads the next one's
while a batch is computed; a step waits (ssd/wait) until it is done, and looks its rows up (ssd/fetch).

  rows_calls_us   that thread's calls from the look-up before to the last one that this step needs: that it
                  waited for, or the last read before its look-up was done
  rows_ahead_us   how long before its rows were needed it had begun with them
  rows_spare_us   how long before that it was done; 0 where the step waited

So a thread whose calls take d longer makes a step wait d - rows_spare_us longer, and one that has c times as
long, since the processor is slower, (c - 1) x rows_ahead_us less.
"""

import numpy as np
import polars as pl

from analysis.tables.calls import TABLE_FILE
from analysis.tables.read import RankEvents

TABLE_THREAD = "tables"  # the name of the trainer's thread
COLUMNS = ("rows_calls_us", "rows_ahead_us", "rows_spare_us")


def measure_row_loading(events: RankEvents, main: pl.DataFrame, steps: pl.DataFrame) -> pl.DataFrame:
    """COLUMNS, of each of the steps (with start and period_us). main: spans of the main thread, by time."""
    found = {name: np.zeros(len(steps), np.int64) for name in COLUMNS}
    spans = main.filter(pl.col("cat") == "ssd")
    if len(spans):
        _fill_columns(found, spans, list_row_calls(events), steps)
    return pl.DataFrame(found)


def find_table_threads(events: RankEvents) -> list[int]:
    """The threads that bring rows of tables, by their name; where none has a name, all but the main one."""
    pid, tid = events.main_thread
    names = {
        t: name for process in events.processes if process.pid == pid for t, name in process.threads.items()
    }
    found = [thread for thread, name in names.items() if name == TABLE_THREAD]
    return found or [int(each) for each in events.calls["tid"].unique() if each != tid and each not in names]


def list_row_calls(events: RankEvents) -> pl.DataFrame:
    """Their calls on tables in files, by time: ts, dur, and whether it is a read."""
    pid, _ = events.main_thread
    files = events.calls["file"].unique().drop_nulls()
    tables = files.filter(files.cast(pl.String).str.ends_with(TABLE_FILE)).to_physical()
    return events.calls.filter(
        (pl.col("pid") == pid) & pl.col("tid").is_in(find_table_threads(events))
        & pl.col("file").to_physical().is_in(tables.implode())
    ).select("ts", "dur", (pl.col("op").cast(pl.String) == "read").alias("is_read")).sort("ts")  # fmt: skip


def _fill_columns(
    found: dict[str, np.ndarray], spans: pl.DataFrame, calls: pl.DataFrame, steps: pl.DataFrame
) -> None:
    """Fill COLUMNS in `found`, int64 [steps]. spans: ssd/fetch and ssd/wait; calls: of `list_row_calls`."""
    begins = steps["start"].to_numpy()
    ends = begins + steps["period_us"].to_numpy()
    ts, dur = calls["ts"].to_numpy(), calls["dur"].to_numpy()
    sums, reads = np.concatenate([[0], np.cumsum(dur)]), np.flatnonzero(calls["is_read"].to_numpy())
    fetches, waits = (spans.filter(pl.col("name") == name) for name in ("fetch", "wait"))
    fetch_ts, fetch_end = fetches["ts"].to_numpy(), (fetches["ts"] + fetches["dur"]).to_numpy()
    wait_ts, wait_end = waits["ts"].to_numpy(), (waits["ts"] + waits["dur"]).to_numpy()
    for step, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        first, last = np.searchsorted(fetch_ts, [begin, end])
        if first == last:
            continue
        low, high = np.searchsorted(wait_ts, [begin, end])
        first_call = np.searchsorted(ts, fetch_end[first - 1] if first else begin)
        if low < high:  # it waited
            needed, past_last = wait_ts[low], np.searchsorted(ts, wait_end[high - 1])
        else:
            needed, read = fetch_ts[first], np.searchsorted(ts[reads], fetch_end[last - 1])
            past_last = reads[read - 1] + 1 if read else 0
        if first_call < past_last:
            done = ts[past_last - 1] + dur[past_last - 1]
            found["rows_calls_us"][step] = sums[past_last] - sums[first_call]
            found["rows_ahead_us"][step] = max(0, needed - ts[first_call])
            found["rows_spare_us"][step] = 0 if low < high else max(0, needed - done)
