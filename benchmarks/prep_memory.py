"""Peak memory of the ids step of the preprocessing at Criteo 1TB's cardinalities, results checked.

    python benchmarks/prep_memory.py [--folder DIR] [--distinct 292775614]

The lists of Criteo's largest column, as 24 parts of the text would leave them, numbered by the bitmap.
A whole `run` is in rehearsal.py.

A table to read on stderr; the last line of stdout is one JSON object with the same numbers.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
LANES = 24
MIX = 2654435761  # odd: k -> k * MIX mod 2^32 hits every hash once
AROUND = """
import resource, sys, time
sys.path.insert(0, {root!r})
from benchmarks import prep_memory
begun, cpu = time.monotonic(), time.process_time()
prep_memory.{work}(*{arguments!r})
took = time.monotonic() - begun, time.process_time() - cpu
print(*took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def run_measured(work: str, *arguments: Any) -> dict[str, float]:
    program = AROUND.format(root=str(ROOT), work=work, arguments=arguments)
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT
    )
    wall, cpu, peak = map(float, done.stdout.split()[-3:])
    return {"seconds": round(wall, 1), "cpu_seconds": round(cpu, 1), "peak_mb": round(peak)}


def find_id_range(lane: int, distinct: int) -> tuple[int, int]:
    """A lane meets its share of the ids and the second half of the share before it."""
    share = distinct // LANES
    return max(0, lane * share - share // 2), (lane + 1) * share


def work_folder(folder: str, least: int) -> Any:
    from dlrm.prep.io.folders import Folders
    from dlrm.prep.job.options import PrepOptions
    from dlrm.prep.steps.plan import PrepPlan

    path = Path(folder)
    work = PrepPlan(
        PrepOptions(path, path / "out", frequency_threshold=least, tmp_dir=path),
        [],
        [],
        Folders(path / "out", path, path),
    )
    work.lanes = [[] for _ in range(LANES)]
    return work


def make_lists(folder: str, distinct: int) -> None:
    """Each id twice in every lane that meets it."""
    work = work_folder(folder, 0)
    for lane in range(LANES):
        begin, end = find_id_range(lane, distinct)
        with open(work.file_path("lane", lane, "ids"), "wb") as file:
            for at in range(begin, end, 1 << 20):
                ids = np.arange(at, min(end, at + (1 << 20)), dtype=np.uint64) * np.uint64(MIX)
                file.write(ids.astype(np.uint32).tobytes())
            for at in range(begin, end, 1 << 20):
                file.write(np.full(min(1 << 20, end - at), 2, np.uint32).tobytes())


def number_column(folder: str, distinct: int, least: int) -> None:
    """Merge the ids of one column. distinct: in all lanes together. least: the frequency threshold."""
    from common.progress import StepProgress
    from dlrm.data.criteo import CRITEO
    from dlrm.prep.steps.assign_ids import merge_column

    work = work_folder(folder, least)
    sizes = np.zeros((LANES, CRITEO.categorical), np.int64)
    for lane in range(LANES):
        begin, end = find_id_range(lane, distinct)
        sizes[lane, 0] = end - begin
    merge_column(work, sizes, 0, StepProgress(1, False))


def check_maps(folder: str, distinct: int, least: int) -> int:
    """Ids are met in the order of k, so the k-th is k + 2; with a threshold ids of two lanes are kept."""
    work, share = work_folder(folder, least), distinct // LANES
    for lane in range(LANES):
        begin, end = find_id_range(lane, distinct)
        k = np.arange(begin, end, dtype=np.int64)
        if least <= 1:
            wanted = k + 2
        else:
            twice = (k % share >= share - share // 2) & (k < (LANES - 1) * share)
            wanted = np.where(twice, 2 + (k // share) * (share // 2) + k % share - (share - share // 2), 1)
        assert (np.fromfile(work.file_path("lane", lane, "map"), np.int32) == wanted).all(), lane
    kept = json.loads(work.file_path("column", 0).read_text())["kept"]
    work.file_path("column", 0).unlink()
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="a folder with space for 16 bytes a distinct id")
    parser.add_argument("--distinct", type=int, default=292_775_614, help="Criteo 1TB's largest column")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    results: dict[str, Any] = {"distinct": args.distinct // LANES * LANES}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        make_lists(name, args.distinct)
        results["entries"] = sum(
            e - b for b, e in (find_id_range(lane, args.distinct) for lane in range(LANES))
        )
        for least in (0, 3):
            results[f"ids, threshold {least}"] = run_measured("number_column", name, args.distinct, least)
            results[f"ids, threshold {least}"]["kept"] = check_maps(name, args.distinct, least)
    for key, value in results.items():
        print(f"{key}: {value}", file=sys.stderr)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
