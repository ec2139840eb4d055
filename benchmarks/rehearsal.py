"""The preprocessing at a size that counts: time of each step, peak memory and disk of one `run`.

    python benchmarks/rehearsal.py --folder DIR                                      120 million rows, 24 days
    python benchmarks/rehearsal.py --folder DIR --rows 52000000 --days 4 --unique 6  312 million distinct ids

Text like Criteo's is made first, by as many processes as there are cores. `--copies 2` makes half of the days
and links each of them twice, where the disk is too small. `--unique` id columns never repeat an id.
The result is verified with `dlrm.prep check`.

What it prints on the way goes to stderr; the last line of stdout is one JSON object.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.process_tree import watch_command  # noqa: E402

MIX = 2654435761  # odd: k -> k * MIX mod 2^32 hits every hash once
STEP = re.compile(r"step \d+ of \d+ (\w+).*?([0-9.]+) s done")


def write_day(path: Path, day: int, rows: int, unique: int) -> None:
    """Text of a day. unique: how many of the first id columns have an id of its own in each row."""
    from dlrm.prep.tools import toy

    known, made = toy.hash_ids, count(day * rows, toy.BLOCK)

    def hash_without_repeats(ids: np.ndarray) -> np.ndarray:
        values, first = known(ids), next(made)
        fresh = np.arange(first, first + len(ids), dtype=np.uint64) * np.uint64(MIX)
        values[:, :unique] = fresh.astype(np.uint32)[:, None]
        return values

    toy.hash_ids = hash_without_repeats if unique else known
    with path.open("wb") as file:
        for begin in range(0, rows, toy.BLOCK):
            rng = np.random.default_rng([0, day, begin])
            file.write(toy.format_tsv(min(toy.BLOCK, rows - begin), rng, 0))


def write_days(folder: Path, days: int, rows: int, copies: int, unique: int) -> None:
    folder.mkdir()
    different = days // copies
    with ProcessPoolExecutor() as pool:
        made = [pool.submit(write_day, folder / f"day_{day}", day, rows, unique) for day in range(different)]
        for number, each in enumerate(made, 1):
            each.result()
            print(f"text of {number} of {different} days", file=sys.stderr)
    for day in range(different, days):
        os.link(folder / f"day_{day % different}", folder / f"day_{day}")


def run_watched(words: list[object], folders: dict[str, Path]) -> dict[str, Any]:
    """Run a command of dlrm.prep: its seconds, those of its steps, and the most memory and disk that it took.

    folders: name -> folder whose peak is reported.
    """
    used = watch_command([sys.executable, "-m", "dlrm.prep", *words], folders)
    print(used.output, file=sys.stderr)
    if used.code:
        raise SystemExit(f"dlrm.prep {words[0]} ended with {used.code}")
    return {
        "seconds": round(used.seconds, 1),
        "processor_seconds": round(used.processor_seconds, 1),
        "peak_memory_GB": round(used.memory / 1e9, 2),
        "peak_GB_of": {name: round(size / 1e9, 2) for name, size in used.disk.items()},
        "steps": {name: float(took) for name, took in STEP.findall(used.output)},
    }


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--folder", type=Path, help="on a disk with room for 600 bytes a row")
    parser.add_argument("--rows", type=int, default=120_000_000, help="of all days")
    parser.add_argument("--days", type=int, default=24)
    parser.add_argument("--copies", type=int, default=1, help="of each day's text, as links")
    parser.add_argument("--unique", type=int, default=0, help="id columns that never repeat an id")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    if options.days % options.copies:
        parser.error(f"--copies {options.copies}: does not divide --days {options.days}")
    rows = options.rows // options.days
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        text, out, work = (Path(name) / each for each in ("text", "out", "tmp"))
        write_days(text, options.days, rows, options.copies, options.unique)
        work.mkdir()
        os.sync()
        size = sum(path.stat().st_size for path in text.iterdir())
        words = ["run", "--input_dir", text, "--output_dir", out, "--tmp_dir", work]
        row: dict[str, Any] = {"rows": rows * options.days, "text_GB": round(size / 1e9, 2)}
        row |= run_watched([*words, "--workers", options.workers], {"temporary files": work, "results": out})
        meta = json.loads((out / "meta.json").read_text())
        row["distinct_ids"] = sum(meta["table_sizes"]) - 2 * len(meta["table_sizes"])
        row["check_seconds"] = run_watched(["check", out], {})["seconds"]
    print(json.dumps(row))


if __name__ == "__main__":
    main()
