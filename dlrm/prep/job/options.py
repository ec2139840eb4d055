"""What the user may ask of the preprocessing: one frozen record, checked once."""

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import UserError, printable
from common.owned import OutputFolder
from dlrm.data.criteo import NUM_SPARSE, DatasetMeta
from dlrm.prep.job.overlap import refuse_overlap, same_folder

STEPS = ("parse", "contiguous", "shuffle")
COMPAT = ("torchrec", "mlperf")
FORMATS = ("npy", "parquet")
ENGINES = ("numba", "plain", "spark")
DATASETS = ("criteo_1tb", "criteo_kaggle")
MISSING = -(1 << 31)  # an empty count, where NVIDIA's recipe must tell it from 0
# what the output's bytes do not depend on
NOT_IN_OUTPUT = {
    "workers",
    "tmp_dir",
    "engine",
    "trace_dir",
    "keep_tmp",
    "md5",
    "restart",
    "part_bytes",
    "giant",
    "map_bytes",
}


MAX_WORKERS = 1024  # threads of a process
LARGEST = 1 << 62  # compiled loops count with 64 bits


def read_format(folder: Path) -> str:
    """Of the dataset in this folder; nothing when there is none that can be read."""
    try:
        return DatasetMeta.load(folder).format
    except UserError:
        return ""


@dataclass(frozen=True)
class PrepOptions:
    input_dir: Path
    output_dir: Path
    frequency_threshold: int = 0
    frequency_limit: int = 0  # NVIDIA's recipe
    random_seed: int = 0
    workers: int = 1
    tmp_dir: Path | None = None
    compat: str = ""
    format: str = "npy"
    engine: str = "numba"
    dataset: str = ""
    steps: tuple[str, ...] = STEPS
    max_ind_range: int = 0
    mod_idx: int = 0
    skip_bad_rows: bool = False
    md5: bool = True
    trace_dir: Path | None = None
    keep_tmp: bool = False
    restart: bool = False
    map_bytes: int = 96 << 20  # id maps kept in memory while rows are placed
    part_bytes: int = 0
    giant: int = (
        8 << 20
    )  # ids in the lists of a column: above, a bitmap of a gigabyte is smaller than a table

    @property
    def lenient(self) -> bool:
        """Take what torchrec takes (CRLF, extra columns, no last newline) instead of refusing it."""
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
        """Refuse a file's counts when the logarithm of one would be no number."""
        if self.frequency_limit and low < -2:
            raise UserError(f"{printable(path)}: count {low}; the recipe's log(x + 3) needs at least -2")
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

    def parameters(self) -> dict[str, Any]:
        """What decides the output's bytes: goes to meta.json, and a resumed run must have the same."""
        values = {key: value for key, value in asdict(self).items() if key not in NOT_IN_OUTPUT}
        values["input_dir"] = printable(os.path.realpath(self.input_dir))
        del values["output_dir"]
        return values | {"steps": list(self.steps)}

    def __post_init__(self) -> None:
        """A trace names files as they were opened; the loader's and the report's names are absolute."""
        for name in ("input_dir", "output_dir", "tmp_dir", "trace_dir"):
            if path := getattr(self, name):
                object.__setattr__(self, name, Path(path).absolute())

    def _check_traced(self) -> None:
        """A trace is JSON that DFTracer writes without escaping the names of files."""
        for name in ("trace_dir", "input_dir", "output_dir", "tmp_dir"):
            path = getattr(self, name)
            if path and (printable(path) != str(path) or any(c in str(path) for c in '"\\')):
                raise UserError(
                    f"--{name} {printable(path)}: a quote, a backslash, or what is no printable character "
                    "cannot stand in a trace; rename it, or drop --trace_dir"
                )
        OutputFolder(self.trace_dir or "").refuse_foreign(["results.json"])

    def checked(self) -> "PrepOptions":
        """Refuse what contradicts itself, before anything is read."""
        for name, least in (("frequency_threshold", 0), ("frequency_limit", 0), ("random_seed", 0),
                            ("max_ind_range", 0), ("mod_idx", 0), ("workers", 1)):  # fmt: skip
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least {least}")
        for name, most in (("workers", MAX_WORKERS), ("frequency_threshold", LARGEST),
                           ("frequency_limit", LARGEST)):  # fmt: skip
            if getattr(self, name) > most:
                raise UserError(f"--{name} {getattr(self, name)}: must be at most {most}")
        for name in ("part_bytes", "map_bytes", "giant"):
            if not 0 <= getattr(self, name) <= LARGEST:
                raise UserError(f"--{name} {getattr(self, name)}: must be from 0 to {LARGEST}")
        if self.random_seed >= 1 << 32:
            raise UserError(f"--random_seed {self.random_seed}: must be below 2^32")
        if self.max_ind_range >= 1 << 31:
            raise UserError(f"--max_ind_range {self.max_ind_range}: must be below 2^31")
        if self.frequency_limit and (self.frequency_threshold or self.compat):
            raise UserError(
                "--frequency_limit is a recipe of its own: drop --frequency_threshold and --compat"
            )
        unknown = set(self.steps) - set(STEPS)
        if unknown or "parse" not in self.steps:
            raise UserError(f"--steps {','.join(self.steps)}: parse, and then any of contiguous, shuffle")
        if self.min_count and not self.contiguous:
            raise UserError("--frequency_threshold and --frequency_limit need the step contiguous")
        if self.mod_idx and (self.format != "parquet" or self.min_count or self.max_ind_range):
            raise UserError("--mod_idx goes with --format parquet, and makes its own ids")
        if self.mod_idx * NUM_SPARSE >= 1 << 31:
            raise UserError(f"--mod_idx {self.mod_idx}: {NUM_SPARSE} columns of it must fit int32")
        if self.engine == "plain" and self.format != "npy":
            raise UserError("--engine plain writes --format npy only")
        if self.format == "parquet" and self.compat:
            raise UserError("--compat is about NPY files: drop it, or use --format npy")
        if not self.input_dir.is_dir():
            raise UserError(f"--input_dir {printable(self.input_dir)}: not a folder")
        if same_folder(self.output_dir, self.input_dir):
            raise UserError(
                f"--output_dir {printable(self.output_dir)}: the same as --input_dir; choose another"
            )
        refuse_overlap("--tmp_dir", self.tmp_dir, [("--input_dir", self.input_dir)])
        if self.trace_dir:
            self._check_traced()
        found = read_format(self.output_dir)
        if found not in ("", self.format):
            raise UserError(
                f"--output_dir {printable(self.output_dir)}: a finished {found} dataset, not {self.format}; "
                f"say --format {found} for the same again, or name another folder"
            )
        return replace(self, steps=tuple(step for step in STEPS if step in self.steps))
