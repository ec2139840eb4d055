"""What the rules look at, made once from the joined tables; and what a rule gives back."""

from dataclasses import asdict, dataclass, field
from typing import Any

import polars as pl

from analysis.run_folder import run_settings
from analysis.tables import answers, progress
from analysis.tables.gather import JoinedTables

TRAIN = ("train", "run")  # `run`: traces without phases
TABLE_FILE = ".rows"  # the end of the name of an embedding table's file
NOT_DATA = r"\.(py|pyc|pyi|so)(\.|$)|/site-packages/|^/(proc|sys|dev|etc)/"


@dataclass
class Finding:
    """One sentence with a number, what to do about it, and the wall-clock seconds that could be saved."""

    rule: str
    seconds: float
    text: str
    remedy: str = ""
    evidence: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Facts:
    joined: JoinedTables
    config: dict[str, Any]
    metrics: pl.DataFrame = field(default_factory=pl.DataFrame)  # metrics.jsonl
    phases: pl.DataFrame = field(init=False)
    launches: pl.DataFrame = field(init=False)
    launched: pl.DataFrame = field(init=False)  # phases, launch by launch, and the launch's ranks
    breakdown: pl.DataFrame = field(init=False)
    ranks: pl.DataFrame = field(init=False)
    reads: pl.DataFrame = field(init=False)  # by phase and file, start-up left out
    dataset_files: pl.Series = field(init=False)  # their paths; empty where nothing names them

    def __post_init__(self) -> None:
        self.phases = answers.sum_phases(self.joined)
        self.launches = progress.list_launches(self.joined)
        ranks = self.launches.select("launch", "ranks")
        self.launched = answers.sum_phases(self.joined, "launch").join(ranks, on="launch")
        self.breakdown = answers.sum_breakdown(self.joined)
        self.ranks = progress.compare_ranks(self.joined)
        volume = answers.sum_volume(self.joined, "phase", "file")
        self.reads = volume.filter((pl.col("op") == "read") & (pl.col("phase") != "startup"))
        paths = run_settings.list_dataset_paths(self.config)
        self.dataset_files = answers.list_dataset_files(self.joined, paths)

    @property
    def is_own_run(self) -> bool:
        """Whether remedies may name the trainer's own options."""
        return "data" in self.config and "launch" in self.config

    def longest_phase_seconds(self, phase: str) -> float:
        """Of the rank that took longest, in each launch: the ranks run side by side."""
        found = self.launched.filter(pl.col("phase") == phase).group_by("launch").agg(pl.col("wall_s").max())
        return float(found["wall_s"].sum())

    def wall_seconds(self) -> float:
        """Seconds that the run ran: of the rank that took longest, in each launch."""
        of_rank = self.launched.group_by("launch", "rank").agg(pl.col("wall_s").sum())
        return float(of_rank.group_by("launch").agg(pl.col("wall_s").max())["wall_s"].sum())

    def pause_seconds(self) -> float:
        """Seconds between the launches, in which nothing ran."""
        return float(self.launches["not_running_before_s"].sum())

    def mean_seconds(self, column: str, *phases: str) -> float:
        """Seconds per rank, on average over the ranks of each launch."""
        found = self.launched.filter(pl.col("phase").is_in(phases)) if phases else self.launched
        return float((found[column] / found["ranks"]).sum())

    def exposed_seconds(self) -> float:
        """Seconds of I/O and of waiting for data per rank that nothing hides, start-up left out."""
        work = self.launched.filter(pl.col("phase") != "startup")
        return float(((work["io_s"] + work["wait_s"]) / work["ranks"]).sum())

    def limit_gain(self, seconds_of_all_ranks: float) -> float:
        """Seconds that less I/O can save: a rank's share of them, at most the I/O that is not hidden."""
        return min(seconds_of_all_ranks / self.breakdown.height, self.exposed_seconds())

    def data_reads(self, *phases: str) -> pl.DataFrame:
        """Rows of `reads` for the files that training reads its data from: the dataset, and tables in files.

        Where nothing names the dataset's files, all files but programs and what the system makes up.
        """
        reads = self.reads.filter(pl.col("phase").is_in(phases)) if phases else self.reads
        file = pl.col("file")
        if not len(self.dataset_files):
            return reads.filter(file.is_not_null() & ~file.str.contains(NOT_DATA))
        return reads.filter(file.is_in(self.dataset_files.implode()) | file.str.ends_with(TABLE_FILE))

    def advise_larger_reads(self, mean_bytes: float) -> str:
        """How to have larger reads: what keeps them small is the trainer's option, or the data's layout."""
        if not self.is_own_run:
            return "Read larger pieces and hand them out from memory."
        sums = (
            self.data_reads(*TRAIN).select(pl.col("sequential", "strided", "random").sum()).row(0, named=True)
        )
        if sums["strided"] > sums["sequential"] + sums["random"]:
            return (
                "The ranks take turns in each file, so a read is one rank's rows of one batch: raise "
                "--batch_size, or give --shuffle_training_set: each rank then reads a stretch of its own."
            )
        if run_settings.to_number(self.config["data"].get("read_chunk_mb")) * 1e6 < 4 * mean_bytes:
            return "Raise --read_chunk_mb."
        return (
            "A read ends where this rank's rows or the file end: larger batches, or fewer and larger files."
        )

    def after_startup(self, table: str) -> pl.DataFrame:
        return self.joined[table].filter(pl.col("phase") != "startup")
