"""A run's measured numbers in the form of MLPerf Storage's DLRM workload, with theirs beside.

In: RUN. Out: one YAML file. Here a sample is a row, as theirs is, not a batch: so this file describes the
workload, and does not reproduce its requests (that is analysis/export/dlio.py).
"""

import json
from pathlib import Path

import polars as pl

from analysis.export.dlio import wrap_comment
from analysis.export.measured import MeasuredTraining, measure_training
from analysis.run_folder.outputs import has_header, named_file
from common.errors import UserError, os_errors_as_user_errors, printable

HEADER = "# MLPerf Storage's DLRM, measured; made by python -m analysis export mlperf"
# of configs/dlio/workload in mlcommons/storage, as read in November 2026: their names -> their numbers
THEIRS = {
    "dlrm_h100 (npz)": {
        "format": "npz", "num_files_train": 65_536, "num_samples_per_file": 1, "record_length_bytes": 512,
        "batch_size": 8_192, "read_threads": 8, "prefetch_size": "-", "computation_time": 0.005,
    },
    "dlrm_b200 (parquet)": {
        "format": "parquet", "num_files_train": 1_024, "num_samples_per_file": 4_718_592,
        "record_length_bytes": 761, "batch_size": 16_384, "read_threads": 4, "prefetch_size": 2,
        "computation_time": 0.000375,
    },
}  # fmt: skip
AU = 0.7  # that they ask for


def write_mlperf_workload(run: str, output: Path) -> str:
    """Writes the file; gives what to print."""
    training = measure_training(run)
    if not training.batch_rows:
        raise UserError(
            f"{printable(run)}: no config.json that says the batch size: rows cannot be counted; give "
            "the run folder of a training of this project"
        )
    with named_file(output, has_header([HEADER.encode()])) as partial, os_errors_as_user_errors(output):
        partial.write_text(make_workload(training))
    return (
        f"{printable(output)}: rows of {_find_row_bytes(training):.4g} bytes, batches of "
        f"{training.batch_rows:,}, {training.compute.mean:.4g} s of computing a step"
    )


def make_workload(t: MeasuredTraining) -> str:
    """The YAML text."""
    rows = t.steps * t.ranks * t.batch_rows
    files = max(1, t.dataset_files)
    ours = {
        "format": "npy", "num_files_train": files, "num_samples_per_file": -(-rows // files),
        "record_length_bytes": round(_find_row_bytes(t)), "batch_size": t.batch_rows, "read_threads": 1,
        "prefetch_size": t.prefetch or 2, "computation_time": float(f"{t.compute.mean:.6g}"),
    }  # fmt: skip
    lines = [HEADER, f"# of the run {json.dumps(t.name)}: {t.ranks} ranks, {t.steps:,} steps an epoch", "#"]
    lines += [f"# {line}".rstrip() for line in _compare(ours)]
    lines += ["#", "# Requests, as measured:"]
    lines += [f"# {line}" for line in _describe_requests(t)]
    lines += ["#", "# Differences that no number shows:"]
    lines += [line for each in _list_differences(t) for line in wrap_comment(each, "- ")]
    lines += [
        "",
        "model:",
        "  name: dlrm",
        "framework: pytorch",
        "",
        "workflow:",
        "  generate_data: False",
        "  train: True",
        "  checkpoint: False",
        "",
        "dataset:",
        "  data_folder: data/dlrm/",
        f"  format: {ours['format']}  # a row is in several arrays: see the differences",
        f"  num_files_train: {ours['num_files_train']}",
        f"  num_samples_per_file: {ours['num_samples_per_file']}",
        f"  record_length_bytes: {ours['record_length_bytes']}",
        "",
        "reader:",
        "  data_loader: pytorch",
        f"  batch_size: {ours['batch_size']}",
        f"  read_threads: {ours['read_threads']}",
        f"  prefetch_size: {ours['prefetch_size']}",
        "",
        "train:",
        f"  epochs: {t.epochs}",
        f"  computation_time: {ours['computation_time']}  # deviation {t.compute.stdev:.4g}",
        "",
        "metric:",
        f"  au: {AU}  # this run: {t.utilisation:.3f}",
        "",
    ]
    return "\n".join(lines)


def _find_row_bytes(t: MeasuredTraining) -> float:
    return t.record_bytes / t.batch_rows


def _compare(ours: dict) -> list[str]:
    """A table: this run, and each of theirs."""
    width = 22
    lines = ["".join(f"{name:<{width}}" for name in ("", "this run", *THEIRS))]
    for name, value in ours.items():
        cells = [name, f"{value}", *(f"{theirs[name]}" for theirs in THEIRS.values())]
        lines.append("".join(f"{cell:<{width}}" for cell in cells))
    per_s = [("rows/s of one rank", ours), *((name, theirs) for name, theirs in THEIRS.items())]
    rates = [each["batch_size"] / each["computation_time"] for _, each in per_s if each["computation_time"]]
    lines.append(
        "".join(f"{cell:<{width}}" for cell in ("rows/s asked, a rank", *(f"{r:.4g}" for r in rates)))
    )
    needs = [
        each["batch_size"] * each["record_length_bytes"] / each["computation_time"] / 1e6
        for _, each in per_s
        if each["computation_time"]
    ]
    lines.append("".join(f"{cell:<{width}}" for cell in ("MB/s asked, a rank", *(f"{r:.4g}" for r in needs))))
    return lines


def _describe_requests(t: MeasuredTraining) -> list[str]:
    if not len(t.requests):
        return ["no call shows them (mapped files)"]
    sizes = t.requests["bytes"].cast(pl.Float64)
    return [
        f"{t.calls_per_batch:.3g} reads for a batch, of {sizes.quantile(0.05):,.0f} to "
        f"{sizes.quantile(0.95):,.0f} bytes (5th and 95th percentile), median {sizes.median():,.0f}",
        f"a read takes {t.requests['dur_us'].median():,.0f} us at the median, "
        f"{t.requests['dur_us'].quantile(0.99):,.0f} us at the 99th percentile",
    ]


def _list_differences(t: MeasuredTraining) -> list[str]:
    others = (
        f"of computation_time {t.rows_s:.3g} s are waiting for rows of tables in files and other file calls "
        "of the main thread."
    )
    return [
        "a row here is in several arrays (numerical, categorical, labels), and a batch is one read of each; "
        "theirs are whole records, each in a file of its own (npz), or columns of row groups (parquet).",
        "rows are read in file order here, unless shuffled; theirs are shuffled by file (npz: and sample).",
        "their Parquet rows have 200 columns, of which a part is read: fewer bytes than record_length_bytes.",
        "computation_time is of this run's machine, and has the exchange between the ranks in it.",
        *([others] if t.has_other_calls else []),
        f"a step here waits for data, for rows or for other ranks {1 - t.utilisation:.1%} of the time.",
    ]
