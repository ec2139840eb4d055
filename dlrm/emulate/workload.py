"""What the emulator takes from a run's trace: how long steps took, what checkpoints wrote.

In: a run folder. Out: a `RankWorkload` for each rank. The trace is read by a process of its own.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlrm.emulate.apart import print_value, run_apart

if TYPE_CHECKING:
    import polars as pl

CHECKPOINT_FILE = r"/rank\d{5,7}\.safetensors$"
DESCRIPTION_FILE = r"/checkpoint\.json$"
TABLE_FILE = r"/([^/]+\.rows)$"


@dataclass
class RankWorkload:
    """Of one rank of the run; times in seconds, in the order of the trace."""

    ranks: int = 1  # of the run
    steps: dict[str, list[float]] = field(default_factory=dict)  # "train", "val", "test": of each step
    transfers: dict[str, list[float]] = field(default_factory=dict)  # the part of it that is communication
    metrics: list[float] = field(default_factory=list)  # of each evaluation: computing its metrics
    saves: list[float] = field(default_factory=list)  # of each checkpoint: copying the tensors
    # of each checkpoint: bytes of each write into this rank's file; bytes of checkpoint.json (rank 0)
    checkpoint_writes: list[list[int]] = field(default_factory=list)
    description_bytes: list[int] = field(default_factory=list)
    # calls on tables in files before the first step and in each step, as the fields of a `TableCall`
    table_calls: list[list[tuple[int, str, str, int, int]]] = field(default_factory=list)
    exchange_bytes: int | None = None  # of a step's collectives, where the trace says so


def measure_run(run: Path) -> tuple[list[RankWorkload], list[str]]:
    """(workload of each rank of the run, what its trace lacks), by a process of its own."""
    ranks, losses = run_apart("dlrm.emulate.workload", str(run))
    return [RankWorkload(**rank) for rank in ranks], losses


def read_workload(run: Path) -> tuple[list[RankWorkload], list[str]]:
    """Read the trace; a resumed run's launches one after the other."""
    import polars as pl

    from analysis.tables.gather import list_losses, plan_launches
    from analysis.tables.read import read_rank
    from analysis.tables.times import find_main_thread
    from analysis.trace.source import FileSource
    from analysis.workload.steps import measure_steps

    source = FileSource(run)
    found = measure_steps(run, source)
    ranks: list[RankWorkload] = []
    for number in sorted(found.steps["rank"].unique()):
        steps = found.steps.filter(pl.col("rank") == number)
        pauses = found.pauses.filter(pl.col("rank") == number)
        rank = RankWorkload(ranks=found.ranks)
        for split, part in (
            ("train", steps.filter(pl.col("phase") == "train")),
            *((split, steps.filter(pl.col("split") == split)) for split in ("val", "test")),
        ):
            taken = part.select(pl.col("compute_us") + pl.col("transfer_us"))
            rank.steps[split] = (taken.to_series() / 1e6).to_list()
            rank.transfers[split] = (part["transfer_us"] / 1e6).to_list()
        rank.metrics = (pauses.filter(pl.col("name") == "eval/metrics")["dur_us"] / 1e6).to_list()
        rank.saves = (pauses.filter(pl.col("name") == "checkpoint/save")["dur_us"] / 1e6).to_list()
        sizes = steps["exchange_bytes"].drop_nulls()
        rank.exchange_bytes = int(sizes.median()) if len(sizes) else None  # type: ignore[arg-type]
        ranks.append(rank)
    processes = []
    for job in plan_launches(source):
        events = read_rank(job.rank, job.files, job.clock, source, details=True)
        processes += events.processes
        calls = events.calls.with_columns(pl.col("file", "op").cast(pl.String))
        if job.rank < len(ranks):
            rank, written = ranks[job.rank], calls.filter(pl.col("op") == "write")
            rank.checkpoint_writes += _list_writes(written, CHECKPOINT_FILE)
            rank.description_bytes += map(sum, _list_writes(written, DESCRIPTION_FILE))
            is_mine = (pl.col("rank") == job.rank) & (pl.col("launch") == job.launch)
            steps = found.steps.filter(is_mine & (pl.col("phase") == "train"))
            rank.table_calls += _list_table_calls(calls, steps["start"].sort(), find_main_thread(events)[1])
    return ranks, list_losses(processes)


def _list_writes(calls: "pl.DataFrame", pattern: str) -> list[list[int]]:
    """Bytes of the writes into files of this name, one list for each checkpoint: a thread writes each one."""
    import polars as pl

    written = calls.filter(pl.col("file").str.contains(pattern)).sort("ts")
    return written.group_by("file", "tid", maintain_order=True).agg("size")["size"].to_list()


def _list_table_calls(
    calls: "pl.DataFrame", starts: "pl.Series", main_thread: int
) -> list[list[tuple[int, str, str, int, int]]]:
    """Calls on tables in files, by the step in which they began. `starts`: of the steps, in microseconds."""
    import polars as pl

    calls = calls.with_columns(pl.col("file").str.extract(TABLE_FILE)).filter(
        pl.col("file").is_not_null() & pl.col("op").is_in(["read", "write", "sync"]) & ~pl.col("failed")
    )
    if not len(calls):
        return []
    found: list[list[tuple[int, str, str, int, int]]] = [[] for _ in range(len(starts) + 1)]
    calls = calls.sort("ts")
    calls = calls.with_columns(
        starts.search_sorted(calls["ts"], side="right").alias("step"),
        pl.when(pl.col("tid") == main_thread).then(0).otherwise(pl.col("tid")).alias("thread"),
        pl.col("position").fill_null(0), pl.col("size").fill_null(0),
    )  # fmt: skip
    for step, *call in calls.select("step", "thread", "op", "file", "position", "size").iter_rows():
        found[step].append(tuple(call))
    return found


if __name__ == "__main__":

    def describe_run(run: str) -> tuple[list[dict[str, Any]], list[str]]:
        ranks, losses = read_workload(Path(run))
        return [asdict(rank) for rank in ranks], losses

    print_value(describe_run)
