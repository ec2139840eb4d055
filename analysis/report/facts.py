"""What the rules look at, made once from the joined tables; and what a rule gives back."""

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import polars as pl

from analysis.run_folder import run_settings
from analysis.tables import answers, progress
from analysis.tables.calls import MAPPED, SUMS, TABLE_FILE, is_below
from analysis.tables.gather import JoinedTables
from analysis.trace.classify import PROGRAM_FILE, SYSTEM_FILE

TRAIN = ("train", "run")  # `run`: traces without phases
MATTERS = 0.01  # of the run: less time to be won is not a finding
MATTERS_HIDDEN = 0.05  # of the run: so much of a rank's time in calls is one, though all of it is hidden
JUMPS, JUMPING = 1000, 0.5  # requests that jump to another offset, and their share in a file's
LARGE_JUMP = 1 << 20  # bytes: moving them takes longer than the jump
US = pl.col("us")  # what calls take
NOT_DATA = f"{PROGRAM_FILE}|{SYSTEM_FILE}"


@dataclass
class Finding:
    """One sentence with a number, what to do about it, and the wall-clock seconds that could be saved.

    `ts` and `dur_us` in the evidence are a slice of the trace that shows it: the longest of its kind.
    """

    rule: str
    seconds: float
    text: str
    remedy: str = ""
    evidence: dict[str, Any] = field(default_factory=dict)
    severity: str = ""  # "high", "medium", "low"; where a rule says none, the seconds decide

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

    @cached_property
    def requests(self) -> pl.DataFrame:
        """Reads and writes after start-up, a row per rank, operation, file and size (`bucket`); without
        programs' files, and without copies from mapped files, which are not requests."""
        file = pl.col("file")
        found = (
            self.after_startup("ops")
            .filter(pl.col("op").is_in(["read", "write"]) & file.is_not_null() & ~file.str.contains(NOT_DATA))
            .filter(pl.col("layer") != MAPPED)
        )
        return found.group_by("rank", "op", "file", "bucket").agg(
            pl.col(SUMS).sum().cast(pl.Int64), pl.col("ts").sort_by("max_us", "ts").last(),
            pl.col("max_us").max(),
        )  # fmt: skip

    @cached_property
    def core_waits(self) -> pl.DataFrame:
        """rank, seconds of the training that its main thread was ready to run and had no core: those with
        most first. Without rows where nothing counted them.
        """
        found = self.joined["device"].filter(pl.col("phase").is_in(TRAIN))
        found = found.filter(pl.col("core_wait_us").is_not_null())
        sums = found.group_by("rank").agg((pl.col("core_wait_us").sum() / 1e6).alias("seconds"))
        return sums.sort("seconds", "rank", descending=[True, False])

    @cached_property
    def mapped_files(self) -> pl.Series:
        """Files whose bytes are copied from maps of them."""
        return self.joined["ops"].filter(pl.col("layer") == MAPPED)["file"].unique()

    @cached_property
    def jumping(self) -> pl.DataFrame:
        """Rows of `requests` of the files in which many requests (JUMPS), and JUMPING of an operation's, jump
        to another offset for less than LARGE_JUMP bytes."""
        files = self.requests.group_by("op", "file").agg(
            pl.col("random").filter(is_below(LARGE_JUMP)).sum().alias("jumps"),
            (pl.col("sequential") + pl.col("strided") + pl.col("random")).sum().alias("placed"),
        )
        files = files.filter((pl.col("jumps") >= JUMPS) & (pl.col("jumps") >= JUMPING * pl.col("placed")))
        return self.requests.join(files.select("op", "file"), on=["op", "file"])

    @cached_property
    def shared(self) -> pl.DataFrame:
        """Rows of `requests` of files that several ranks read or write."""
        ranks = self.requests.group_by("file").agg(pl.col("rank").n_unique().alias("ranks"))
        return self.requests.join(ranks.filter(pl.col("ranks") > 1), on="file")

    @cached_property
    def checkpoint_files(self) -> pl.Series:
        """Files that a checkpoint is written to: those that its spans name, or written while one is saved."""
        named = self.joined["marks"].filter((pl.col("cat") == "checkpoint") & pl.col("file").is_not_null())
        names = named["file"].str.split("/").list.last().unique()
        written = self.joined["ops"].filter((pl.col("op") == "write") & pl.col("file").is_not_null())
        ours = (pl.col("phase") == "checkpoint") | (
            pl.col("file").str.split("/").list.last().is_in(names.implode())
            & pl.col("file").str.contains("checkpoint|/ckpt")
        )
        return written.filter(ours)["file"].unique()

    def is_option(self, path: str, *values: object) -> bool:
        """Whether the run's config.json has one of these values."""
        return run_settings.flatten_options(self.config).get(path) in values

    @cached_property
    def on_one_host(self) -> bool:
        """Then a slow rank is not slow because of its host."""
        return len({process.host for process in self.joined.processes}) == 1

    @property
    def is_own_run(self) -> bool:
        """Whether remedies may name the trainer's own options."""
        return "data" in self.config and "launch" in self.config

    @property
    def is_own_dlrm(self) -> bool:
        """Whether they may name the options of DLRM's data and tables: BERT4Rec holds its data in memory."""
        return self.is_own_run and "train_batch_size" not in self.config["data"]

    def find_longest_phase(self, phase: str) -> float:
        """Of the rank that took longest, in each launch: the ranks run side by side."""
        found = self.launched.filter(pl.col("phase") == phase).group_by("launch").agg(pl.col("wall_s").max())
        return float(found["wall_s"].sum())

    def find_wall_seconds(self) -> float:
        """Seconds that the run ran: of the rank that took longest, in each launch."""
        of_rank = self.launched.group_by("launch", "rank").agg(pl.col("wall_s").sum())
        return float(of_rank.group_by("launch").agg(pl.col("wall_s").max())["wall_s"].sum())

    def pause_seconds(self) -> float:
        """Seconds between the launches, in which nothing ran."""
        return float(self.launches["not_running_before_s"].sum())

    def average_seconds(self, column: str, *phases: str) -> float:
        """Seconds per rank, on average over the ranks of each launch."""
        found = self.launched.filter(pl.col("phase").is_in(phases)) if phases else self.launched
        return float((found[column] / found["ranks"]).sum())

    def average_over_ranks(self, column: str, *phases: str) -> float:
        """Seconds of a rank on average, all launches added up."""
        return float(self.phases.filter(pl.col("phase").is_in(phases))[column].sum()) / self.breakdown.height

    def find_longest_rank(self, amount: pl.Expr, *phases: str, more: pl.DataFrame | None = None) -> float:
        """Of each launch the rank with most of it, added up. more: columns by launch and rank."""
        rows = self.launched.filter(pl.col("phase").is_in(phases))
        rows = rows.group_by("launch", "rank").agg(pl.col("io_s", "wait_s", "io_not_hidden_s").sum())
        if more is not None:
            rows = rows.join(more, on=["launch", "rank"], how="left")
        most = rows.select("launch", amount.alias("amount")).group_by("launch").agg(pl.col("amount").max())
        return float(most["amount"].sum())

    @cached_property
    def waited_in_steps(self) -> pl.DataFrame:
        """launch, epoch, step, us: what the rank that waits longest for data waits in each numbered step.

        Ranks wait for each other at every step, so that is what the step costs all of them.
        """
        return self._sum_waits_by_rank().group_by("launch", "epoch", "step").agg(pl.col("us").max())

    def _sum_waits_by_rank(self) -> pl.DataFrame:
        steps = self.joined["steps"].filter(pl.col("step").is_not_null())
        us = (pl.col("wait_us") + pl.col("io_us")).alias("us")
        return steps.select("launch", "rank", "epoch", "step", us)

    def limit_waiting(self, *phases: str) -> float:
        """Seconds that these phases of steps would save at most if nothing was waited for data."""
        in_steps = self._sum_waits_by_rank().group_by("launch", "rank").agg(pl.col("us").sum() / 1e6)
        outside = (pl.col("io_s") + pl.col("wait_s") - pl.col("us").fill_null(0.0)).clip(0)
        rest = self.find_longest_rank(outside, *phases, more=in_steps)
        return rest + float(self.waited_in_steps["us"].sum()) / 1e6

    def reads_longer(self, rank: int, times: float) -> bool:
        """Whether this rank's reads of the training's data take `times` as long as the others'."""
        ops = self.joined["ops"].filter((pl.col("op") == "read") & pl.col("phase").is_in(TRAIN))
        own = ops.filter(pl.col("file").is_in(self.pick_data_reads(*TRAIN)["file"].unique().implode()))
        by_rank = dict(own.group_by("rank").agg(pl.col("us").sum()).iter_rows())
        others = [float(by_rank.get(each, 0)) for each in self.ranks["rank"] if each != rank]
        return float(by_rank.get(rank, 0)) > times * sum(others) / max(1, len(others))

    def limit_gain(self, calls: pl.DataFrame, us: pl.Expr = US, also_s: float = 0.0) -> float:
        """Seconds that the run saves at most if these calls take `us` less: those of the rank that would save
        most, since the others wait for it; never more than its I/O that is not hidden.

        calls: rows with `rank`, and what `us` is made of. also_s: in which it stood still besides.
        """
        both = _sum_seconds(calls, us).join(self.sum_rank_exposed(), on="rank", suffix="_not_hidden")
        saved = pl.min_horizontal("seconds", pl.col("seconds_not_hidden") + also_s)
        return max(0.0, float(both.select(saved.max()).item() or 0.0))

    def matters(self, gain: float, calls: pl.DataFrame | None = None, us: pl.Expr = US) -> bool:
        """Whether it is worth a sentence: time to be won; or, if `calls` are given, much of a rank's time in
        them, though it is hidden now.
        """
        wall = self.find_wall_seconds()
        in_calls = 0.0 if calls is None else count_most_seconds(calls, us)
        return gain > 0 and gain >= MATTERS * wall or in_calls >= max(MATTERS_HIDDEN * wall, 1e-9)

    def sum_rank_exposed(self) -> pl.DataFrame:
        """Per rank the seconds of I/O and of waiting for data that nothing hides, start-up left out."""
        work = self.launched.filter(pl.col("phase") != "startup")
        return work.group_by("rank").agg((pl.col("io_s") + pl.col("wait_s")).sum().alias("seconds"))

    def pick_data_reads(self, *phases: str) -> pl.DataFrame:
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
        if not self.is_own_dlrm:
            return "Read larger pieces and hand them out from memory."
        sums = (
            self.pick_data_reads(*TRAIN)
            .select(pl.col("sequential", "strided", "random").sum())
            .row(0, named=True)
        )
        if sums["strided"] > sums["sequential"] + sums["random"]:
            return (
                "The ranks take turns in each file, so a read is one rank's rows of one batch: raise "
                "--batch_size, or give --shuffle_training_set: each rank then reads a range of its own."
            )
        if run_settings.to_number(self.config["data"].get("read_chunk_mb")) * 1e6 < 4 * mean_bytes:
            return "Raise --read_chunk_mb."
        return (
            "A read ends where this rank's rows or the file end: larger batches, or fewer and larger files."
        )

    def after_startup(self, table: str) -> pl.DataFrame:
        return self.joined[table].filter(pl.col("phase") != "startup")


def _sum_seconds(calls: pl.DataFrame, us: pl.Expr) -> pl.DataFrame:
    """Of each rank: columns rank, seconds."""
    return calls.group_by("rank").agg(us.cast(pl.Float64).sum().truediv(1e6).alias("seconds"))


def count_most_seconds(calls: pl.DataFrame, us: pl.Expr = US) -> float:
    """Seconds that the rank with most of them spends in these calls."""
    return float(_sum_seconds(calls, us)["seconds"].max() or 0.0)  # type: ignore[arg-type]


def show_longest(requests: pl.DataFrame) -> dict[str, int]:
    """The slice of the trace that a finding about these requests shows: the longest one."""
    if not len(requests):
        return {}
    top = requests.sort("max_us", "ts").row(-1, named=True)
    return {"ts": int(top["ts"]), "dur_us": int(top["max_us"])}


def advise_mapped_files(facts: Facts) -> str:
    """What makes mapped files come in faster."""
    if facts.is_own_dlrm:
        return "Leave out --mmap_mode (a streamed source reads ahead), or read the files once beforehand."
    return "Read the files instead of mapping them, or advise the kernel to read ahead."


def advise_tables_in_files(facts: Facts) -> str:
    """What reduces reads and writes of embedding tables in files."""
    if not facts.is_own_dlrm:
        return (
            "Keep more of the tables in memory, or gather the rows of several steps before they are written."
        )
    return (
        "These are rows of tables in files: raise --cache_memory_budget_mb, so that more of them stay in "
        "memory."
    )
