"""What the emulator takes from a run's trace: how long steps took, what checkpoints wrote.

In: a run folder. Out: a `RankWorkload` for each rank. The trace is read by a process of its own.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlrm.emulate.apart import print_value, run_apart

if TYPE_CHECKING:
    import polars as pl

    from analysis.tables.intervals import Stretches
    from analysis.workload.steps import Workload

CHECKPOINT_FILE = r"/rank\d{5,7}\.safetensors$"
DESCRIPTION_FILE = r"/checkpoint\.json$"


@dataclass
class RankWorkload:
    """Of one rank of the run; times in seconds, in the order of the trace."""

    ranks: int = 1  # of the run
    begins_after: float = 0.0  # seconds between the first rank's first read for training and this one's
    steps: dict[str, list[float]] = field(default_factory=dict)  # "train", "val", "test": of each step
    transfers: dict[str, list[float]] = field(default_factory=dict)  # the part of it that is communication
    metrics: list[float] = field(default_factory=list)  # of each evaluation: computing its metrics
    # of each checkpoint: collecting and copying the tensors, without calls on tables in files
    saves: list[float] = field(default_factory=list)
    # of each checkpoint: bytes of each write into this rank's file; bytes of checkpoint.json (rank 0)
    checkpoint_writes: list[list[int]] = field(default_factory=list)
    description_bytes: list[int] = field(default_factory=list)
    # what steps do on tables in files: split (or "startup") -> the parts of each, as `unpack_part` takes them
    table_steps: dict[str, list[list[Any]]] = field(default_factory=dict)
    exchange_bytes: int | None = None  # of a step's collectives, where the trace says so


def measure_run(run: Path) -> tuple[list[RankWorkload], list[str]]:
    """(workload of each rank of the run, what its trace lacks), by a process of its own."""
    ranks, losses = run_apart("dlrm.emulate.workload", str(run))
    return [RankWorkload(**rank) for rank in ranks], losses


def read_workload(run: Path) -> tuple[list[RankWorkload], list[str]]:
    """Read the trace; a resumed run's launches one after the other."""
    import polars as pl

    from analysis.tables.gather import list_losses
    from analysis.tables.read import read_rank
    from analysis.trace.launches import plan_launches
    from analysis.trace.source import FileSource
    from analysis.workload.steps import measure_steps
    from dlrm.emulate.table_steps import find_own_calls, list_table_steps

    source = FileSource(run)
    found = measure_steps(run, source)
    delays, ranks = _measure_delays(found), list[RankWorkload]()
    for number in sorted(found.steps["rank"].unique()):
        steps = found.steps.filter(pl.col("rank") == number)
        pauses = found.pauses.filter(pl.col("rank") == number)
        rank = RankWorkload(ranks=found.ranks, begins_after=delays.get(number, 0.0))
        for split, part in (
            ("train", steps.filter(pl.col("phase") == "train")),
            *((split, steps.filter(pl.col("split") == split)) for split in ("val", "test")),
        ):
            taken = part.select(pl.col("compute_us") + pl.col("transfer_us"))
            rank.steps[split] = (taken.to_series() / 1e6).to_list()
            rank.transfers[split] = (part["transfer_us"] / 1e6).to_list()
        rank.metrics = (pauses.filter(pl.col("name") == "eval/metrics")["dur_us"] / 1e6).to_list()
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
            steps = found.steps.filter(is_mine).sort("start")
            rank.saves += _time_saves(found.pauses.filter(is_mine), find_own_calls(events))
            for split, parts in list_table_steps(events, steps).items():
                rank.table_steps.setdefault(split, []).extend(parts)
    return ranks, list_losses(processes)


def _measure_delays(found: "Workload") -> dict[int, float]:
    """Rank -> how long after the first one it began to read for training, in the first launch that did."""
    import polars as pl

    batches = found.batches.filter(pl.col("phase") == "train")
    batches = batches.filter(pl.col("launch") == pl.col("launch").min())
    begins = dict(batches.group_by("rank").agg(pl.col("start").min()).iter_rows())
    return {rank: (begin - min(begins.values())) / 1e6 for rank, begin in begins.items()}


def _time_saves(pauses: "pl.DataFrame", calls: "Stretches") -> list[float]:
    """Seconds that the main thread collected and copied tensors for each checkpoint, without these calls."""
    import polars as pl

    from analysis.tables.times import measure_covered_time

    parts = pauses.filter(pl.col("name").is_in(["checkpoint/collect", "checkpoint/save"])).sort("start")
    begin, end = parts["start"].to_numpy(), (parts["start"] + parts["dur_us"]).to_numpy()
    in_calls = measure_covered_time(calls, end) - measure_covered_time(calls, begin)
    is_save = pl.col("name") == "checkpoint/save"
    number = is_save.cast(pl.Int64).cum_sum() - is_save.cast(pl.Int64)  # a save ends what belongs to it
    parts = parts.with_columns((pl.col("dur_us") - pl.Series(in_calls)).alias("us"), number.alias("number"))
    saved = parts.group_by("number", maintain_order=True).agg(pl.col("us").sum() / 1e6, is_save.any())
    return saved.filter("name")["us"].to_list()


def _list_writes(calls: "pl.DataFrame", pattern: str) -> list[list[int]]:
    """Bytes of the writes into files of this name, one list for each checkpoint: a thread writes each one."""
    import polars as pl

    written = calls.filter(pl.col("file").str.contains(pattern)).sort("ts")
    return written.group_by("file", "tid", maintain_order=True).agg("size")["size"].to_list()


if __name__ == "__main__":

    def describe_run(run: str) -> tuple[list[dict[str, Any]], list[str]]:
        ranks, losses = read_workload(Path(run))
        return [asdict(rank) for rank in ranks], losses

    print_value(describe_run)
