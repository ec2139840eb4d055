"""What the rules look at, made once from the joined tables; and what a rule gives back."""

from dataclasses import asdict, dataclass, field
from typing import Any

import polars as pl

from analysis.tables import answers, progress
from analysis.tables.gather import Joined

TRAIN = ("train", "run")  # `run`: traces without phases


@dataclass
class Finding:
    """One sentence with a number, what to do about it, and the seconds of wall clock that can be won."""

    rule: str
    seconds: float
    text: str
    remedy: str = ""
    evidence: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Facts:
    joined: Joined
    config: dict[str, Any]
    phases: pl.DataFrame = field(init=False)
    breakdown: pl.DataFrame = field(init=False)
    ranks: pl.DataFrame = field(init=False)
    reads: pl.DataFrame = field(init=False)  # by phase and file, start-up left out

    def __post_init__(self) -> None:
        self.phases = answers.phases(self.joined)
        self.breakdown = answers.breakdown(self.joined)
        self.ranks = progress.ranks(self.joined)
        volume = answers.volume(self.joined, "phase", "file")
        self.reads = volume.filter((pl.col("op") == "read") & (pl.col("phase") != "startup"))

    @property
    def ours(self) -> bool:
        """Whether remedies may name the trainer's own options."""
        return "data" in self.config and "launch" in self.config

    def longest(self, phase: str) -> float:
        """Of the rank that took longest: the ranks run side by side."""
        return float(self.phases.filter(pl.col("phase") == phase)["wall_s"].to_numpy().max(initial=0.0))

    def mean(self, column: str, *phases: str) -> float:
        """Seconds per rank, on average over the ranks."""
        found = self.phases.filter(pl.col("phase").is_in(phases)) if phases else self.phases
        return float(found[column].sum()) / self.breakdown.height

    def exposed(self) -> float:
        """Seconds of I/O and of waiting for data per rank that nothing hides, start-up left out."""
        work = self.phases.filter(pl.col("phase") != "startup")
        return (float(work["io_s"].sum()) + float(work["wait_s"].sum())) / self.breakdown.height

    def won(self, seconds_of_all_ranks: float) -> float:
        """What less I/O brings: a rank's share of it, but no more than what is not hidden anyway."""
        return min(seconds_of_all_ranks / self.breakdown.height, self.exposed())

    def larger_reads(self, mean_bytes: float) -> str:
        """How to have larger reads: what keeps them small is the trainer's option, or the data's layout."""
        if not self.ours:
            return "Read larger pieces and hand them out from memory."
        if float(self.config["data"].get("read_chunk_mb") or 0) * 1e6 < 4 * mean_bytes:
            return "Raise --read_chunk_mb."
        return (
            "A read ends where this rank's rows or the file end: larger batches, or fewer and larger files."
        )

    def after_startup(self, table: str) -> pl.DataFrame:
        return self.joined[table].filter(pl.col("phase") != "startup")
