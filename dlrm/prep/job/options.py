"""The options of `python -m dlrm.prep run`, and what they may be."""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import UserError, printable
from common.owned import OutputFolder
from common.progress import StepProgress
from dlrm.data.criteo import Columns, DatasetMeta, check_column_counts
from dlrm.prep.job.overlap import refuse_overlap, same_folder

STEPS = ("parse", "contiguous", "shuffle")
COMPAT = ("torchrec", "mlperf")
FORMATS = ("npy", "parquet")
ENGINES = ("numba", "plain", "spark")
DATASETS = ("criteo_1tb", "criteo_kaggle")
BYTE_COUNTS = "results.json"  # in --trace_dir
MISSING = -(1 << 31)  # value of an empty count where NVIDIA's rules distinguish it from 0
# options that `list_parameters` leaves out: they do not change the output's bytes, or meta.json has them
NOT_IN_OUTPUT = {
    "num_numerical",
    "num_categorical",
    "workers",
    "tmp_dir",
    "engine",
    "trace_dir",
    "keep_tmp",
    "md5",
    "restart",
    "part_bytes",
    "bitmap_entries",
    "map_bytes",
    "spark_driver_memory_gb",
    "spark_tmp_dir",
    "spark_conf",
}


MAX_WORKERS = StepProgress.MOST_WORKERS  # of a process
LARGEST = 1 << 62  # compiled loops count with 64 bits
LARGEST_MODULUS = 1 << 32  # raw ids have 32 bits
HASHED = -1  # --mod_idx of 0 or less


def read_format(folder: Path) -> str:
    """The format of the dataset in this folder; "" if there is none, or its meta.json cannot be read."""
    try:
        return DatasetMeta.load(folder).format
    except UserError:
        return ""


def check_traced_paths(trace_dir: Path, paths: Mapping[str, Path | None]) -> None:
    """UserError for paths that would break the trace: DFTracer writes them to JSON without escaping. And for
    a folder whose file of byte counts is somebody else's.

    paths: option -> what it is given.
    """
    for name, path in paths.items():
        if path and (printable(path) != str(path) or any(c in str(path) for c in '"\\')):
            raise UserError(
                f"{name} {printable(path)}: quotes, backslashes and unprintable characters are not "
                "possible in a traced path; rename it, or drop --trace_dir"
            )
    OutputFolder(trace_dir).refuse_foreign([BYTE_COUNTS])


@dataclass(frozen=True)
class PrepOptions:
    """The options of a run, as on the command line; `check_values` must be called before they are used."""

    input_dir: Path
    output_dir: Path
    frequency_threshold: int = 0
    frequency_limit: int = 0  # like frequency_threshold, with NVIDIA's rules for gaps and logarithms
    random_seed: int = 0
    workers: int = 1
    tmp_dir: Path | None = None
    compat: str = ""
    format: str = "npy"
    engine: str = "numba"
    dataset: str = ""
    steps: tuple[str, ...] = STEPS
    max_ind_range: int = 0
    mod_idx: int = 0  # OneFlow's ids: modulo this; below 0: 64-bit hashes
    spark_driver_memory_gb: int = 0
    spark_tmp_dir: Path | None = None
    spark_conf: tuple[str, ...] = ()  # NAME=VALUE
    skip_bad_rows: bool = False
    md5: bool = True
    trace_dir: Path | None = None
    keep_tmp: bool = False
    restart: bool = False
    map_bytes: int = 96 << 20  # id maps kept in memory while rows are placed
    part_bytes: int = 0
    # entries in the id lists of a column; above it, the bitmap of a gigabyte is smaller than a hash table
    bitmap_entries: int = 8 << 20
    num_numerical: int | None = None  # None: as the first input file has them, see io/columns.py
    num_categorical: int | None = None

    @property
    def columns(self) -> Columns:
        """The columns of a line, once they are known (`with_columns`)."""
        assert self.num_numerical is not None and self.num_categorical is not None
        return Columns(self.num_numerical, self.num_categorical)

    def with_columns(self, columns: Columns) -> "PrepOptions":
        return replace(self, num_numerical=columns.numerical, num_categorical=columns.categorical)

    @property
    def modulus(self) -> int:
        """What raw ids are taken modulo of; 0: they stay as they are."""
        return self.max_ind_range or (self.mod_idx if 0 < self.mod_idx < LARGEST_MODULUS else 0)

    def log_shift(self, low: int) -> int:
        """What is subtracted from the counts of a file, the smallest of which is `low`: torchrec's minimum -
        2, in int32 arithmetic.
        """
        if self.mod_idx:
            return -1
        return -3 if self.frequency_limit else ((low - 2 + (1 << 31)) % (1 << 32)) - (1 << 31)

    @property
    def lenient(self) -> bool:
        """Accept lines that torchrec accepts: CRLF, extra columns, no last newline."""
        return bool(self.compat)

    @property
    def contiguous(self) -> bool:
        return "contiguous" in self.steps

    @property
    def shuffle(self) -> bool:
        return "shuffle" in self.steps

    @property
    def min_count(self) -> int:
        """Ids seen less often than this share one id."""
        return max(self.frequency_threshold, self.frequency_limit)

    @property
    def empty_dense(self) -> int:
        return MISSING if self.frequency_limit else 0

    def check_counts(self, path: Path, low: int, high: int) -> None:
        """UserError if the counts of an input file, from `low` to `high`, have no logarithm in int32
        arithmetic.
        """
        if self.frequency_limit and low < -2:
            raise UserError(f"{printable(path)}: count {low}: --frequency_limit needs at least -2")
        added = 3 if self.frequency_limit else 1 if self.mod_idx else 2 - low
        if not self.lenient and high + added >= 1 << 31:
            if self.frequency_limit or self.mod_idx:
                raise UserError(
                    f"{printable(path)}: count {high}: with {added} added it does not fit 32 bits"
                )
            raise UserError(
                f"{printable(path)}: counts from {low} to {high}: their difference does not fit 32 bits "
                "(torchrec would write NaN; --compat torchrec does)"
            )

    def list_parameters(self) -> dict[str, Any]:
        """Everything that the output's bytes depend on: in meta.json, and the same in a resumed run."""
        values = {key: value for key, value in asdict(self).items() if key not in NOT_IN_OUTPUT}
        values["input_dir"] = printable(os.path.realpath(self.input_dir))
        del values["output_dir"]
        return values | {"steps": list(self.steps)}

    def __post_init__(self) -> None:
        """Make paths absolute: the trace names files as they were opened, and its readers expect absolute
        names.
        """
        for name in ("input_dir", "output_dir", "tmp_dir", "trace_dir", "spark_tmp_dir"):
            if path := getattr(self, name):
                object.__setattr__(self, name, Path(path).absolute())

    def _check_spark(self) -> None:
        """Refuse options of the Spark engine that another one would ignore, or that Spark would not take."""
        for name in ("spark_driver_memory_gb", "spark_tmp_dir", "spark_conf"):
            if getattr(self, name) and self.engine != "spark":
                raise UserError(f"--{name} is for --engine spark: add that, or leave it out")
        if not 0 <= self.spark_driver_memory_gb <= 1 << 20:
            raise UserError(f"--spark_driver_memory_gb {self.spark_driver_memory_gb}: must be at least 1")
        for setting in self.spark_conf:
            if not re.fullmatch(r"spark\.[A-Za-z0-9_.]+=.+", setting):
                raise UserError(f"--spark_conf {printable(setting)}: must be like spark.executor.memory=32g")

    def check_values(self) -> "PrepOptions":
        """These options with the steps in order; UserError for values out of range or contradicting."""
        for name, least in (("frequency_threshold", 0), ("frequency_limit", 0), ("random_seed", 0),
                            ("max_ind_range", 0), ("workers", 1)):  # fmt: skip
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least {least}")
        for name, most in (("workers", MAX_WORKERS), ("frequency_threshold", LARGEST),
                           ("frequency_limit", LARGEST)):  # fmt: skip
            if getattr(self, name) > most:
                raise UserError(f"--{name} {getattr(self, name)}: must be at most {most}")
        for name in ("part_bytes", "map_bytes", "bitmap_entries"):
            if not 0 <= getattr(self, name) <= LARGEST:
                raise UserError(f"--{name} {getattr(self, name)}: must be from 0 to {LARGEST}")
        if self.random_seed >= 1 << 32:
            raise UserError(f"--random_seed {self.random_seed}: must be below 2^32")
        if self.max_ind_range >= 1 << 31:
            raise UserError(f"--max_ind_range {self.max_ind_range}: must be below 2^31")
        if self.frequency_limit and (self.frequency_threshold or self.compat):
            raise UserError(
                "--frequency_limit does not go with --frequency_threshold and --compat: drop them"
            )
        unknown = set(self.steps) - set(STEPS)
        if unknown or "parse" not in self.steps:
            raise UserError(f"--steps {','.join(self.steps)}: must be parse[,contiguous][,shuffle]")
        if self.min_count and not self.contiguous:
            raise UserError("--frequency_threshold and --frequency_limit need the step contiguous")
        if self.mod_idx and (self.format != "parquet" or self.min_count or self.max_ind_range):
            raise UserError(
                "--mod_idx needs --format parquet, without --frequency_threshold, --frequency_limit and "
                "--max_ind_range"
            )
        if self.mod_idx and not self.contiguous:
            raise UserError("--mod_idx needs the step contiguous: leave out --steps, or add it")
        if self.mod_idx > LARGEST_MODULUS:
            raise UserError(
                f"--mod_idx {self.mod_idx}: must be at most 2^32; 0 is OneFlow's way to say no limit"
            )
        self._check_spark()
        check_column_counts(self.num_numerical, self.num_categorical)
        if self.engine == "plain" and self.format != "npy":
            raise UserError("--engine plain writes --format npy only")
        if self.format == "parquet" and self.compat:
            raise UserError("--compat needs --format npy: drop one of the two")
        if not self.input_dir.is_dir():
            raise UserError(f"--input_dir {printable(self.input_dir)}: not a folder")
        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise UserError(f"--output_dir {printable(self.output_dir)}: not a folder; choose another")
        if same_folder(self.output_dir, self.input_dir):
            raise UserError(
                f"--output_dir {printable(self.output_dir)}: the same as --input_dir; choose another"
            )
        refuse_overlap("--tmp_dir", self.tmp_dir, [("--input_dir", self.input_dir)])
        if self.trace_dir:
            names = ("trace_dir", "input_dir", "output_dir", "tmp_dir")
            check_traced_paths(self.trace_dir, {f"--{name}": getattr(self, name) for name in names})
        found = read_format(self.output_dir)
        if found not in ("", self.format):
            raise UserError(
                f"--output_dir {printable(self.output_dir)}: a finished {found} dataset, not {self.format}; "
                f"give --format {found}, or another --output_dir"
            )
        return replace(self, steps=tuple(step for step in STEPS if step in self.steps))
