"""Finds the input files: Criteo 1TB's day_0, day_1 ..., plain or gzip, or Kaggle's train.txt and test.txt."""

import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError, os_errors_as_user_errors, printable, quote_for_shell
from common.inputs import check_regular
from dlrm.data.criteo import META, find_rank_rows

KAGGLE_DAYS = 7  # facebookresearch/dlrm cuts train.txt into seven days; the last one validates and tests
NAMES = ("day_{}", "day_{}.gz", "day_{}.txt", "day_{}.tsv", "day_{}.txt.gz", "day_{}.tsv.gz")


@dataclass(frozen=True)
class InputFile:
    """One text file. The minimum count is taken over a whole file, as torchrec does."""

    path: Path
    name: str  # prefix of its output files when nothing is shuffled
    labelled: bool = True

    @property
    def compressed(self) -> bool:
        return self.path.suffix == ".gz"


class FileStamps:
    """Size, times and inode of the input files before the first byte was read: they must not change while a
    run reads them, or between a run and the one that resumes it.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = list(paths)
        self.stamps = [describe_file(path) for path in self.paths]
        # a file may change within the same tick of the file system's clock, and keep the same times
        if any(abs(time.time_ns() - max(times[2], times[4])) < TICK_NS for times in self.stamps):
            time.sleep(TICK_NS / 1e9)
            self.stamps = [describe_file(path) for path in self.paths]

    def refuse_changed(self) -> None:
        """UserError for the first file that has changed."""
        for path, before in zip(self.paths, self.stamps, strict=True):
            try:
                same = describe_file(path) == before
            except UserError:
                same = False
            if not same:
                raise UserError(
                    f"{printable(path)}: has changed while it was read; run again when it is complete"
                )

    def list_recorded(self) -> list[list[Any]]:
        """For meta.json: path, size, mtime and inode of each file. Not its ctime: a chmod changes it."""
        return [stamp[:4] for stamp in self.stamps]


TICK_NS = 20_000_000  # more than a tick of the kernel's clock, which file times are taken from


def describe_file(path: Path) -> list[Any]:
    """Real path, size, mtime in ns, inode, ctime in ns. No program can set the ctime back."""
    status = check_regular(path)
    named = printable(os.path.realpath(path))
    return [named, status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns]


@dataclass(frozen=True)
class OutputDay:
    """Three output files, `<name>_dense.npy` and so on, that hold the next `rows` rows of the output."""

    name: str
    rows: int


def find_inputs(folder: Path, dataset: str = "") -> list[InputFile]:
    """The input files in order. `dataset`: one of options.DATASETS, or "" to tell it from the files."""
    with os_errors_as_user_errors(folder):
        names = sorted(os.listdir(folder))
    kaggle = {"train.txt", "train.txt.gz"} & set(names)
    if dataset == "criteo_kaggle" or (not dataset and kaggle):
        return find_kaggle_inputs(folder, names)
    days = sorted({parse_day(folder, found) for name in names if (found := DAY.fullmatch(name))})
    if not days and META in names:
        raise UserError(
            f"--input_dir {printable(folder)}: a dataset already, not text: "
            f"DATASET_DIR={quote_for_shell(folder)} ./3_train.sh trains on it"
        )
    if not days:
        raise UserError(f"--input_dir {printable(folder)}: no day_0, day_1 ... in it, and no train.txt")
    for expected, day in enumerate(days):
        if day != expected:
            raise UserError(
                f"{printable(folder)}/day_{expected} is missing: days run from day_0 to day_{days[-1]}"
            )
    return [InputFile(select_only(folder, names, day), f"day_{day}") for day in days]


DAY = re.compile(r"day_([0-9]+)(\.\w+)*", re.ASCII)


def parse_day(folder: Path, found: re.Match[str]) -> int:
    if found[1] != "0" and found[1].startswith("0"):
        raise UserError(
            f"{printable(folder / found[0])}: leading zeros; rename the files to day_0, day_1 ..."
        )
    return int(found[1])


def select_only(folder: Path, names: list[str], day: int) -> Path:
    """The one file of this day; UserError if there are two, plain and gzip, or none with a known suffix."""
    found = [name.format(day) for name in NAMES if name.format(day) in names]
    if not found:
        others = next(name for name in names if re.fullmatch(rf"day_{day}(\.\w+)+", name, re.ASCII))
        wanted = ", ".join(name.format(day) for name in NAMES[:2])
        raise UserError(f"{printable(folder / others)}: not named like {wanted}; rename it, or move it away")
    if len(found) > 1:
        raise UserError(f"{printable(folder)}: {' and '.join(found)} for day {day}; keep one")
    return check_readable(folder / found[0])


def check_readable(path: Path) -> Path:
    check_regular(path)
    return path


def find_kaggle_inputs(folder: Path, names: list[str]) -> list[InputFile]:
    found = []
    for name in ("train", "test"):
        files = [file for file in (f"{name}.txt", f"{name}.txt.gz") if file in names]
        if len(files) > 1:
            raise UserError(f"{printable(folder)}: {' and '.join(files)}; keep one")
        found += [InputFile(check_readable(folder / file), name, labelled=name == "train") for file in files]
    if not found:
        raise UserError(f"--input_dir {printable(folder)}: neither train.txt nor test.txt in it")
    return found


def plan_outputs(sources: list[InputFile], rows: list[int], steps: tuple[str, ...]) -> list[OutputDay]:
    """How the rows of all input files, one file after the other, are divided into output files.

    `rows`: the number of rows of each input file. Kaggle's train.txt becomes seven days.
    """
    outputs = []
    for source, count in zip(sources, rows, strict=True):
        if source.name == "train" and steps != ("parse",):
            outputs += [
                OutputDay(f"day_{i}", len(find_rank_rows(count, i, KAGGLE_DAYS))) for i in range(KAGGLE_DAYS)
            ]
        else:
            outputs.append(OutputDay(source.name, count))
    return outputs


def select_days(outputs: list[OutputDay]) -> list[OutputDay]:
    """The outputs that are days of the dataset: all but Kaggle's unlabelled test set."""
    return [output for output in outputs if output.name.startswith("day_")]


def count_shuffled_rows(outputs: list[OutputDay], shuffle: bool) -> int:
    """How many rows are shuffled: those of all days but the last. They are the first rows of the output."""
    return sum(output.rows for output in select_days(outputs)[:-1]) if shuffle else 0
