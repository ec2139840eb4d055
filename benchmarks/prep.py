"""Preprocessing against torchrec's own: the same files and core, alternately, the bytes compared.

    python benchmarks/prep.py [--rows N] [--rounds N] [--folder DIR]

Each round runs every step of both once; the table holds the medians, of the ratios as well.
A table to read on stderr; the last line of stdout is one JSON object with the same numbers.
"""

import argparse
import filecmp
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
DAYS = 24
SCRIPTS = {"parse": "npy_preproc", "contiguous": "contiguous_preproc", "shuffle": "shuffle_preproc"}
TARGETS = {"parse": 38, "contiguous": 20, "contiguous, threshold 3": 24, "shuffle": 3.5, "pipeline": 20}
REFERENCE = """
import contextlib, io, os, resource, sys, time
from torchrec.datasets.scripts import {script}_criteo as script
print("ready", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
begun, cpu = time.monotonic(), time.process_time()
with contextlib.redirect_stdout(io.StringIO()):
    script.main({arguments!r})
print("took", time.monotonic() - begun, time.process_time() - cpu, file=sys.stderr)
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""
OURS = """
import resource, sys, time
from dlrm.prep.__main__ import main
def usages():  # with forks that have ended
    return [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
def used():
    return sum(one.ru_utime + one.ru_stime for one in usages())
arguments, warm = {arguments!r}, {warm!r}
for words in warm:
    assert main(words) == 0  # machine code is loaded, and compiled where it never was
print("ready", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
begun, cpu = time.monotonic(), used()
assert main(arguments) == 0
print("took", time.monotonic() - begun, used() - cpu, file=sys.stderr)
print("peak", max(one.ru_maxrss for one in usages()), file=sys.stderr)  # of the largest process
"""


def settle_disk() -> None:
    """Earlier steps' files go to the disk; a virtual machine's unused memory went to its host: fetch some."""
    os.sync()
    program = "block = bytearray(2 << 30); block[:: 4096] = b'1' * (len(block) // 4096)"
    subprocess.run([sys.executable, "-c", program], check=True)


def run_measured(program: str, cores: list[int]) -> dict[str, float]:
    """Run in a process of its own on these cores: seconds, CPU seconds and peak memory of the work alone."""
    settle_disk()
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    said = {line.split()[0]: line.split()[1:] for line in done.stderr.splitlines() if line.strip()}
    return {
        "wall": float(said["took"][0]),
        "cpu": float(said["took"][1]),
        "peak_mb": int(said["peak"][0]) / 1024,
    }


def clear_folder(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def reference_steps(tsv: Path, out: Path, threshold: int, core: int) -> dict[str, dict[str, float]]:
    """The MLPerf recipe: three scripts, one after the other."""
    one, two, three = (clear_folder(out / name) for name in ("one", "two", "three"))
    arguments = {
        "parse": ["--input_dir", tsv, "--output_dir", one],
        "contiguous": ["--input_dir", one, "--output_dir", two, "--frequency_threshold", threshold],
        "shuffle": ["--input_dir_labels_and_dense", one, "--input_dir_sparse", two,
                    "--output_dir_shuffled", three],
    }  # fmt: skip
    took = {}
    for step, script in SCRIPTS.items():
        words = [str(word) for word in arguments[step]]
        took[step] = run_measured(REFERENCE.format(script=script, arguments=words), [core])
        if step == "contiguous":
            for path in two.glob("*_contig_freq.npy"):
                path.rename(path.with_name(path.name.replace("_contig_freq", "")))
    return took


def our_step(command: list[Any], cores: list[int], small: Path) -> dict[str, float]:
    """The command, after the same kind of work on a few rows."""
    one, two, three, whole = (clear_folder(small.parent / "warm" / name) for name in "1234")
    folders = ["--input_dir_labels_and_dense", one, "--input_dir_sparse", one]
    warm = [
        ["parse", "--input_dir", small, "--output_dir", one, "--workers", len(cores)],
        ["contiguous", "--input_dir", one, "--output_dir", two],
        ["contiguous", "--input_dir", one, "--output_dir", two, "--frequency_threshold", 3],
        ["shuffle", *folders, "--output_dir_shuffled", three],
        run_command(small, whole, "--workers", len(cores)),
    ]
    words = [[str(word) for word in line] for line in [*warm, command]]
    return run_measured(OURS.format(arguments=words[-1], warm=words[:-1]), cores)


def check_same_files(left: Path, right: Path, ours: str = "") -> int:
    """Compare the .npy files of two folders byte by byte; returns how many. ours: the end of their names in
    `right`.
    """
    names = [path.name for path in left.glob("day_*.npy")]
    for name in names:
        other = right / name.replace(".npy", f"{ours}.npy")
        if not filecmp.cmp(left / name, other, shallow=False):
            raise SystemExit(f"{other} differs from the reference")
    assert names
    return len(names)


def run_command(tsv: Path, out: Path, *flags: Any) -> list[Any]:
    return [
        "run",
        "--input_dir",
        tsv,
        "--output_dir",
        out,
        "--compat",
        "torchrec",
        "--restart",
        *flags,
    ]


def one_round(folder: Path, small: Path, cores: list[int]) -> dict[str, tuple[Any, Any]]:
    """Every step and the whole, on one core; then on all. Name -> what the reference took, and what ours."""
    tsv, scratch = folder / "tsv", folder / "scratch"
    found: dict[str, tuple[Any, Any]] = {}
    wanted = reference_steps(tsv, folder / "reference", 0, cores[0])
    one, two, three = (folder / "reference" / name for name in ("one", "two", "three"))
    steps = {
        "parse": (["parse", "--input_dir", tsv], one, ""),
        "contiguous": (["contiguous", "--input_dir", one], two, "_contig_freq"),
        "shuffle": (["shuffle", "--input_dir_labels_and_dense", one, "--input_dir_sparse", two], three, ""),
    }
    for step, (command, right, suffix) in steps.items():
        flag = "--output_dir_shuffled" if step == "shuffle" else "--output_dir"
        took = our_step([*command, flag, clear_folder(scratch / "out")], cores[:1], small)
        check_same_files(right, scratch / "out", suffix)
        found[step] = wanted[step], took
    command = ["parse", "--input_dir", tsv, "--output_dir", clear_folder(scratch / "out"),
               "--workers", len(cores)]  # fmt: skip
    found[f"parse, {len(cores)} workers"] = wanted["parse"], our_step(command, cores, small)
    check_same_files(one, scratch / "out")
    whole = {key: sum(wanted[step][key] for step in SCRIPTS) for key in ("wall", "cpu")}
    whole["peak_mb"] = max(wanted[step]["peak_mb"] for step in SCRIPTS)
    ways = {
        "pipeline": (cores[:1], "--no_md5"),
        f"pipeline, {len(cores)} workers": (cores, "--no_md5"),
        "pipeline with md5": (cores[:1], "--restart"),
    }
    for name, (own, flag) in ways.items():
        command = run_command(tsv, clear_folder(scratch / "out"), flag, "--workers", len(own))
        found[name] = whole, our_step(command, own, small)
        assert check_same_files(three, scratch / "out") == 3 * DAYS
    return found | round_with_threshold(folder, small, cores)


def round_with_threshold(folder: Path, small: Path, cores: list[int]) -> dict[str, tuple[Any, Any]]:
    """The reference and this project with a threshold, once each. folder: with the reference's output. cores:
    to run on. small: input that compiles or loads the kernels beforehand.
    """
    scratch = folder / "scratch"
    one, two = folder / "reference" / "one", clear_folder(folder / "reference" / "two")
    words = ["--input_dir", str(one), "--output_dir", str(two), "--frequency_threshold", "3"]
    wanted = run_measured(REFERENCE.format(script=SCRIPTS["contiguous"], arguments=words), cores[:1])
    took = our_step(["contiguous", *words[:3], clear_folder(scratch / "out"), *words[4:]], cores[:1], small)
    check_same_files(two, scratch / "out")
    return {"contiguous, threshold 3": (wanted, took)}


def summarize_rounds(pairs: list[tuple[dict[str, float], dict[str, float]]], rows: int) -> dict[str, Any]:
    """Medians over the rounds."""
    ratios = sorted(theirs["cpu"] / ours["cpu"] for theirs, ours in pairs)
    return {
        "reference_rows_per_s": round(rows / median(theirs["cpu"] for theirs, _ in pairs)),
        "rows_per_s": round(rows / median(ours["cpu"] for _, ours in pairs)),
        "rows_per_s_wall": round(rows / median(ours["wall"] for _, ours in pairs)),
        "ratio_cpu": round(median(ratios), 1),
        "ratio_cpu_range": [round(ratios[0], 1), round(ratios[-1], 1)],
        "ratio_wall": round(median(theirs["wall"] / ours["wall"] for theirs, ours in pairs), 1),
        "reference_peak_mb": round(max(theirs["peak_mb"] for theirs, _ in pairs)),
        "peak_mb": round(max(ours["peak_mb"] for _, ours in pairs)),
    }


def measure_growth(folder: Path, rows: int, cores: list[int]) -> dict[str, Any]:
    """Peak memory and speed of the whole pipeline for 1, 4 and 16 times the rows."""
    found = {}
    for times in (1, 4, 16):
        tsv = make_tsv(folder / "growing", rows * times)
        command = run_command(tsv, clear_folder(folder / "scratch" / "out"), "--no_md5")
        took = our_step(command, cores[:1], folder / "small")
        found[str(rows * times)] = {
            "peak_mb": round(took["peak_mb"]),
            "rows_per_s": round(rows * times / took["cpu"]),
        }
        shutil.rmtree(tsv)
    return found


def make_tsv(folder: Path, rows: int) -> Path:
    from dlrm.prep.tools.toy import write_days

    write_days(clear_folder(folder), DAYS, max(1, rows // DAYS), seed=0)
    return folder


def print_tables(results: dict[str, Any]) -> None:
    lines = [
        f"{results['machine']}; {results['rows']:,} rows, {results['tsv_mb']:,} MB in {results['folder']}",
        "",
        "| step | torchrec, rows/s of CPU | here | of wall | ratio of CPU | of wall | peak MB | target |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in results["steps"].items():
        low, high = row["ratio_cpu_range"]
        lines.append(
            f"| {name} | {row['reference_rows_per_s']:,} | {row['rows_per_s']:,} "
            f"| {row['rows_per_s_wall']:,} | {row['ratio_cpu']} ({low} .. {high}) | {row['ratio_wall']} "
            f"| {row['reference_peak_mb']:,} -> {row['peak_mb']:,} | {TARGETS.get(name, '')} |"
        )
    lines += ["", "| rows | peak MB | rows/s of CPU |", "|--:|--:|--:|"]
    for rows, row in results["growth"].items():
        lines.append(f"| {int(rows):,} | {row['peak_mb']:,} | {row['rows_per_s']:,} |")
    print("\n".join(lines), file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=360_000, help="for the comparison")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--growth_rows", type=int, default=120_000, help="times 1, 4 and 16")
    parser.add_argument("--folder", type=Path, help="on the file system to be measured")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder, begun = Path(name), time.monotonic()
        tsv, small = make_tsv(folder / "tsv", args.rows), make_tsv(folder / "small", 2400)
        rows = args.rows // DAYS * DAYS
        rounds = [one_round(folder, small, cores) for _ in range(args.rounds)]
        results = {
            "machine": f"{len(cores)} cores {platform.machine()}, python {platform.python_version()}",
            "folder": str(args.folder or tempfile.gettempdir()),
            "rows": rows,
            "tsv_mb": round(sum(path.stat().st_size for path in tsv.iterdir()) / 1e6),
            "bytes_equal": True,  # anything else ends the run
            "rounds": args.rounds,
            "steps": {name: summarize_rounds([found[name] for found in rounds], rows) for name in rounds[0]},
            "growth": measure_growth(folder, args.growth_rows, cores) if args.growth_rows else {},
            "seconds": round(time.monotonic() - begun),
            "own_peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        }
    print_tables(results)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
