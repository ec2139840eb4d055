"""Which files to read, as what: Criteo 1TB's day_0.., plain or gzip, or Kaggle's train.txt and test.txt."""

import re
from dataclasses import dataclass
from pathlib import Path

from dlrm.criteo import rank_rows
from dlrm.errors import UserError

KAGGLE_DAYS = 7  # facebookresearch/dlrm cuts train.txt into seven days; the last one validates and tests
NAMES = ("day_{}", "day_{}.gz", "day_{}.txt", "day_{}.tsv", "day_{}.txt.gz", "day_{}.tsv.gz")


@dataclass(frozen=True)
class Source:
    """One text file. Its dense minimum is taken over all of it, as torchrec does."""

    path: Path
    name: str  # what its outputs are called when nothing is shuffled
    labelled: bool = True

    @property
    def packed(self) -> bool:
        return self.path.suffix == ".gz"

    def stamp(self) -> list[str | int]:
        """Changes when the file does: a resumed run refuses to mix two versions of its input."""
        stat = self.path.stat()
        return [str(self.path.resolve()), stat.st_size, stat.st_mtime_ns]


@dataclass(frozen=True)
class Output:
    """One triple of files, `<name>_dense.npy` and so on: the next `rows` rows."""

    name: str
    rows: int


def find(folder: Path, dataset: str = "") -> list[Source]:
    """The input files in order, or one line that says which is missing."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise UserError(f"--input_dir {folder}: {error.strerror}") from None
    kaggle = {"train.txt", "train.txt.gz"} & set(names)
    if dataset == "criteo_kaggle" or (not dataset and kaggle):
        return find_kaggle(folder, names)
    days = sorted({int(found[1]) for name in names if (found := re.fullmatch(r"day_(\d+)(\.\w+)*", name))})
    if not days:
        raise UserError(f"--input_dir {folder}: no day_0, day_1 ... in it, and no train.txt")
    missing = sorted(set(range(days[-1] + 1)) - set(days))
    if missing:
        raise UserError(f"{folder}/day_{missing[0]} is missing: days run from day_0 to day_{days[-1]}")
    return [Source(only(folder, names, day), f"day_{day}") for day in days]


def only(folder: Path, names: list[str], day: int) -> Path:
    found = [name.format(day) for name in NAMES if name.format(day) in names]
    if len(found) != 1:
        those = " and ".join(found) or f"no file named like {', '.join(NAMES[:2])}".format(day)
        raise UserError(f"{folder}: {those} for day {day}; keep one")
    return readable(folder / found[0])


def readable(path: Path) -> Path:
    if path.is_dir():
        raise UserError(f"{path}: a folder, not a file")
    return path


def find_kaggle(folder: Path, names: list[str]) -> list[Source]:
    found = []
    for name in ("train", "test"):
        files = [file for file in (f"{name}.txt", f"{name}.txt.gz") if file in names]
        if len(files) > 1:
            raise UserError(f"{folder}: {' and '.join(files)}; keep one")
        found += [Source(readable(folder / file), name, labelled=name == "train") for file in files]
    if not found:
        raise UserError(f"--input_dir {folder}: neither train.txt nor test.txt in it")
    return found


def outputs(sources: list[Source], rows: list[int], steps: tuple[str, ...]) -> list[Output]:
    """What the sources' rows, one after the other, are cut into."""
    made = []
    for source, count in zip(sources, rows, strict=True):
        if source.name == "train" and steps != ("parse",):
            made += [Output(f"day_{i}", len(rank_rows(count, i, KAGGLE_DAYS))) for i in range(KAGGLE_DAYS)]
        else:
            made.append(Output(source.name, count))
    return made


def days_of(made: list[Output]) -> list[Output]:
    """The outputs that are days of the dataset: all but Kaggle's unlabelled test set."""
    return [output for output in made if output.name.startswith("day_")]


def shuffled_rows(made: list[Output], shuffle: bool) -> int:
    """How many of the first rows change places: all days but the last."""
    return sum(output.rows for output in days_of(made)[:-1]) if shuffle else 0
