"""Dataset folders for tests, written with numpy alone, and the comparison of two."""

import filecmp
from pathlib import Path

import numpy as np

PARTS = ("dense", "sparse", "labels")


def check_same_files(left: Path, right: Path, pattern: str = "day_*.npy") -> None:
    """The files of `left` are there in `right`, byte for byte."""
    names = sorted(path.name for path in left.glob(pattern))
    assert names
    for name in names:
        assert filecmp.cmp(left / name, right / name, shallow=False), name


def rows(n: int, seed: int = 0, high: int = 2**31 - 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "dense": rng.normal(size=(n, 13)).astype(np.float32),
        "sparse": rng.integers(0, high, (n, 26)).astype(np.int32),
        "labels": rng.integers(0, 2, (n, 1)).astype(np.int32),
    }


def write_days(folder: Path, days: list[int], high: int = 2**31 - 1) -> Path:
    """day_0, day_1, ...; the last one's ids are int64, as torchrec's scripts leave them."""
    folder.mkdir(parents=True, exist_ok=True)
    for day, n in enumerate(days):
        for part, array in rows(n, day, high).items():
            kind = np.int64 if part == "sparse" and day == len(days) - 1 else array.dtype
            np.save(folder / f"day_{day}_{part}.npy", array.astype(kind))
    return folder


def numbered_days(folder: Path, days: list[int]) -> Path:
    """Days whose first feature holds the number of the row in the whole set."""
    write_days(folder, days)
    first = 0
    for day, n in enumerate(days):
        ids = np.load(folder / f"day_{day}_sparse.npy")
        ids[:, 0] = np.arange(first, first + n)
        np.save(folder / f"day_{day}_sparse.npy", ids)
        first += n
    return folder
