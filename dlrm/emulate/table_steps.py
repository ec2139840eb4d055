"""What each step of a run did on tables in files, and when: what tables.py does again.

In: the events of one rank, its steps. Out: for each step its parts, the fields of a `StepPart`. A part ends
where the main thread looks rows up, waits until another thread has brought them, or calls on a file itself.
Times are the main thread's own: without its waits and calls, without communication and pauses, so that in
the emulation they come later where it waits longer.
"""

from typing import Any

import polars as pl

from analysis.tables.intervals import Stretches, merge_stretches, unite_stretches
from analysis.tables.read import RankEvents
from analysis.tables.times import find_stretches, measure_covered_time
from analysis.trace.classify import EVALUATION
from analysis.workload.table_rows import TABLE_THREAD, find_table_threads

# of rows, or a description before it gets its name: its write, and what write_whole does around it, are one
TABLE_FILE = r"/(?:([^/]+\.rows)|\.([^/]+\.json)\.[0-9a-f]{16}\.partial)$"
HINT_BYTES = r'"len":(\d+)'  # of posix_fadvise: what it is about
TOGETHER_US = 100  # calls of a thread with less between them are made one after the other
MAIN, TRAIN = "", "train"
STARTUP, CHECKPOINT, FINISH = "startup", "checkpoint", "finish"  # no steps, but as one each
DESCRIBE = "describe"  # the writing of a table's description


def list_table_steps(events: RankEvents, steps: pl.DataFrame) -> dict[str, list[list[Any]]]:
    """Split -> the parts of each of its steps; those of training have the split "train". What precedes the
    first step is the only step of "startup", what follows the last one that of "finish", and what comes with
    each checkpoint one of "checkpoint". Nothing where the rank has no table in a file.

    steps: of this rank and launch, by time.
    """
    pid, tid = events.main_thread
    main = events.spans.filter((pl.col("pid") == pid) & (pl.col("tid") == tid))
    calls = _list_calls(events, pid, tid)
    if not len(calls):
        return {}
    saves = main.filter((pl.col("cat") == "checkpoint") & (pl.col("name") == "collect"))
    begins = pl.concat([
        steps.select(pl.col("split").fill_null(TRAIN), at="start"),
        saves.select(pl.lit(CHECKPOINT).alias("split"), at="ts"),
        steps.tail(1).select(pl.lit(FINISH).alias("split"), at=pl.col("start") + pl.col("period_us")),
    ])  # fmt: skip
    begins = begins.with_columns(pl.lit("step").alias("kind"), ts="at", end="at")
    items = pl.concat([begins, _list_spans(main), calls], how="diagonal").sort("at", maintain_order=True)
    items = _add_own_times(items, events, main, pid, tid)
    found: dict[str, list[list[Any]]] = {}
    step = _Step()
    found[STARTUP] = [step.parts]
    for item in items.iter_rows(named=True):
        if item["kind"] == "step":
            step.finish()
            in_training = item["split"] in (TRAIN, CHECKPOINT, FINISH)
            step = _Step(step, "own" if in_training else "own_in_evaluation", item)
            found.setdefault(item["split"], []).append(step.parts)
        else:
            step.add(item)
    step.finish()
    return found


def _list_calls(events: RankEvents, pid: int, tid: int) -> pl.DataFrame:
    """A row per call of the rank on its tables' files. pid, tid: its main thread, which is called MAIN here;
    the others by the name that the trace has."""
    threads = {
        t: name for process in events.processes if process.pid == pid for t, name in process.threads.items()
    }
    threads |= {**dict.fromkeys(find_table_threads(events), TABLE_THREAD), tid: MAIN}
    thread = pl.col("tid").cast(pl.String).replace({str(t): name for t, name in threads.items()})
    hinted = pl.col("args").str.extract(HINT_BYTES).cast(pl.Int64, strict=False)
    op, path = pl.col("op").cast(pl.String), pl.col("file").cast(pl.String)
    rows, described = path.str.extract(TABLE_FILE, 1), path.str.extract(TABLE_FILE, 2)
    calls = events.calls.filter((pl.col("pid") == pid) & ~pl.col("failed")).select(
        pl.lit("call").alias("kind"), pl.col("ts").alias("at"), "ts",
        (pl.col("ts") + pl.col("dur")).alias("end"),
        thread.alias("thread"),
        pl.when(rows.is_null() & (op == "write")).then(pl.lit(DESCRIBE)).otherwise(op).alias("op"),
        pl.coalesce(rows, described).alias("file"), pl.col("position").fill_null(0).alias("offset"),
        pl.when(op == "hint").then(hinted).otherwise("size").fill_null(0).alias("size"),
    ).drop_nulls("file")  # fmt: skip
    is_rows, stem = pl.col("file").str.ends_with(".rows"), pl.col("file").str.replace(r"\.(rows|json)$", "")
    tables = calls.filter(is_rows).select(stem.unique()).to_series()  # other descriptions are of other things
    calls = calls.filter(is_rows | (pl.col("op") == DESCRIBE) & stem.is_in(tables.implode()))
    opened = (pl.col("op") == "hint") & (pl.col("size") == 0)  # of the whole file: the emulator gives it, too
    return calls.filter(pl.col("op").is_in(["read", "write", "sync", "hint", DESCRIBE]) & ~opened)


def _list_spans(main: pl.DataFrame) -> pl.DataFrame:
    """A row per wait for rows, at its end, since the calls of other threads during it are what is waited for;
    and two per look-up, at its begin and its end. main: the main thread's spans."""
    kind, end = pl.col("name").cast(pl.String), pl.col("ts") + pl.col("dur")
    ours = main.filter((pl.col("cat") == "ssd") & kind.is_in(["wait", "fetch"]))
    ours = ours.select(kind.alias("kind"), pl.col("ts").alias("at"), "ts", end.alias("end"))
    waits, fetches = (ours.filter(pl.col("kind") == name) for name in ("wait", "fetch"))
    done = fetches.select(
        pl.lit("fetched").alias("kind"), *(pl.col("end").alias(n) for n in ("at", "ts", "end"))
    )
    return pl.concat([waits.with_columns(pl.col("end").alias("at")), fetches, done])


def _add_own_times(
    items: pl.DataFrame, events: RankEvents, main: pl.DataFrame, pid: int, tid: int
) -> pl.DataFrame:
    """Adds what of the main thread's time before each item was its own work (own, own_in_evaluation), and
    what it waited for rows up to the item's begin (waited) and its end (waited_then), in us."""
    waits = find_stretches(main, (pl.col("cat") == "ssd") & (pl.col("name") == "wait"))
    calls = find_stretches(events.calls, pl.col("pid") == pid, pl.col("tid") == tid)
    taken = unite_stretches(calls, find_stretches(main, pl.col("kind").is_in(["wait", "communication"])))
    taken = unite_stretches(taken, find_stretches(main, pl.col("cat") == "checkpoint"))
    in_training = unite_stretches(taken, find_stretches(main, pl.col("part") == EVALUATION))
    ts, end = items["ts"].to_numpy(), items["end"].to_numpy()
    return items.with_columns(
        pl.Series("own", ts - measure_covered_time(in_training, ts)),
        pl.Series("own_in_evaluation", ts - measure_covered_time(taken, ts)),
        pl.Series("waited", measure_covered_time(waits, ts)),
        pl.Series("waited_then", measure_covered_time(waits, end)),
    )


def find_own_calls(events: RankEvents) -> Stretches:
    """When the main thread was in calls on its tables' files."""
    pid, tid = events.main_thread
    own = _list_calls(events, pid, tid).filter(pl.col("thread") == MAIN)
    return merge_stretches(own["ts"].to_numpy(), own["end"].to_numpy())


class _Step:
    """One step, as it is cut into parts."""

    def __init__(self, before: "_Step | None" = None, own: str = "own", begin: Any = None) -> None:
        """before: the step before. own: the column with the main thread's own time. begin: its item; None of
        what precedes the first step, which is done without waiting."""
        self.parts: list[Any] = []
        self._own, self._begin = own, begin
        self._made: dict[str, int] = before._made if before else {}  # thread -> calls so far
        self._last: dict[str, Any] = before._last if before else {}  # thread -> its last call
        # when reads of rows ended, and how many calls their thread had made then: of the last two
        self._reads: list[tuple[int, int]] = before._reads if before else []
        self._background: list[Any] = []  # of this part: at, pause, thread, calls
        self._batches: dict[str, list[Any]] = {}  # thread -> the calls of its last batch of this part
        self._calls: list[Any] = []  # of the main thread, with which this part ends

    def _at(self, item: Any) -> float:
        """The main thread's own time since the step began, in seconds."""
        return (item[self._own] - self._begin[self._own]) / 1e6 if self._begin else 0.0

    def add(self, item: Any) -> None:
        if item["kind"] != "call":
            self._end_calls()
            self._end_part(self._at(item), item["kind"], awaited=self._find_awaited(item))
        elif item["thread"] == MAIN:
            if self._calls and item["ts"] - self._calls[-1]["end"] >= TOGETHER_US:
                self._end_calls()
            self._calls.append(item)
        else:
            self._add_background(item)

    def _add_background(self, item: Any) -> None:
        thread, before = item["thread"], self._last.get(item["thread"])
        batch = self._batches.get(thread)
        if batch is None or before is None or item["ts"] - before["end"] >= TOGETHER_US:
            # what the thread did while the main one waited for it takes its time here, too
            pause = (item["waited"] - before["waited_then"]) / 1e6 if before else 0.0
            batch = self._batches[thread] = []
            self._background.append([self._at(item), pause, thread, batch])
        batch.append(item)
        self._last[thread] = item
        self._made[thread] = self._made.get(thread, 0) + 1
        if thread == TABLE_THREAD and item["op"] == "read":
            self._reads[:] = [*self._reads[-1:], (item["end"], self._made[thread])]

    def _find_awaited(self, item: Any) -> list[Any] | None:
        """[thread, how many of its calls, seconds beyond the last of them] that must be done here: what a
        wait was for; where rows are looked up, all that were read by then."""
        if item["kind"] != "wait":
            done = [count for end, count in self._reads if end <= item["ts"]]
            return [TABLE_THREAD, done[-1], 0.0] if done else None
        if not self._last:
            return [TABLE_THREAD, 0, (item["end"] - item["ts"]) / 1e6]
        last = max(self._last.values(), key=lambda call: call["ts"])
        running = last["end"] > item["end"]
        beyond = 0 if running else item["end"] - max(item["ts"], last["end"])
        return [last["thread"], self._made[last["thread"]] - running, beyond / 1e6]

    def _end_calls(self) -> None:
        if self._calls:
            first, last = self._calls[0], self._calls[-1]
            self._end_part(self._at(first), "calls", between=self._at(last) - self._at(first))

    def _end_part(self, at: float, kind: str, awaited: Any = None, between: float = 0.0) -> None:
        background = [[*start, _pack_calls(calls)] for *start, calls in self._background]
        self.parts.append([at, kind, background, _pack_calls(self._calls), between, awaited])
        self._background, self._batches, self._calls = [], {}, []

    def finish(self) -> None:
        self._end_calls()
        if self._background:
            self._end_part(0.0, "end")


def _pack_calls(calls: list[Any]) -> list[list[Any]]:
    """Runs of calls of one kind on one file: [op, file, offsets, sizes]."""
    runs: list[list[Any]] = []
    for call in calls:
        if not runs or runs[-1][:2] != [call["op"], call["file"]]:
            runs.append([call["op"], call["file"], [], []])
        runs[-1][2].append(call["offset"])
        runs[-1][3].append(call["size"])
    return runs
