"""A run as a workload of DLIO's main branch: one YAML file, with comments on what it cannot say.

In: RUN. Out: the file. One record is what one rank reads for one batch, as indexed binary, batch size 1: so a
step of DLIO reads what a step of the run read. What a step computes is a gamma distribution, which is never
negative, with the run's mean and its deviation between the ranks of a step. analysis/export/dlio_run.py runs
it and compares.
"""

import json
import math
import textwrap
from pathlib import Path

from analysis.export.measured import MeasuredTraining, Spread, measure_training
from analysis.run_folder.outputs import has_header, named_file
from common.errors import os_errors_as_user_errors, printable, quote_for_shell

HEADER = "# DLIO workload, made by python -m analysis export dlio"
STEPS_LOST = 0.02  # share of an epoch's steps that may be left out to have several records in a file
WIDTH = 100  # columns of the comments


def write_dlio_workload(run: str, output: Path) -> str:
    """Writes the workload; gives what to print."""
    training = measure_training(run)
    text = make_workload(training)
    with named_file(output, has_header([HEADER.encode()])) as partial, os_errors_as_user_errors(output):
        partial.write_text(text)
    return (
        f"{printable(output)}: {training.ranks} ranks, {training.steps:,} steps an epoch, records of "
        f"{training.record_bytes:,} bytes, {training.compute.mean:.4g} s of computing a step; put it into "
        f"DIR/workload/NAME.yaml, then: mpiexec -n {training.ranks} dlio_benchmark --config-dir DIR "
        f"workload=NAME (or: python -m analysis export dlio {quote_for_shell(Path(run))} -o FILE --run DIR)"
    )


def plan_files(training: MeasuredTraining) -> tuple[int, int, int]:
    """Records of a file, files of the training set, files of the evaluation's.

    DLIO rounds the number of files down to a multiple of (records of a file x ranks): so n records a file can
    only make steps in multiples of n squared. The largest n is taken that loses at most STEPS_LOST.
    """
    wanted = [steps for steps in (training.steps, training.eval_steps) if steps]
    best = 1
    for n in range(2, math.isqrt(min(wanted)) + 1):
        if all(steps % (n * n) <= STEPS_LOST * steps for steps in wanted):
            best = n
    rounds = [steps // (best * best) for steps in (training.steps, training.eval_steps)]
    return best, rounds[0] * best * training.ranks, rounds[1] * best * training.ranks


def make_workload(training: MeasuredTraining) -> str:
    """The YAML text."""
    t = training
    records, train_files, eval_files = plan_files(t)
    kept = train_files * records // t.ranks
    lines = [
        *_describe_workload(t, kept),
        "",
        "model:",
        "  name: dlrm",
        *_make_checkpoint_model(t),
        "framework: pytorch",
        "",
        "workflow:",
        "  generate_data: False  # True with train: False makes the files",
        "  train: True",
        f"  evaluation: {bool(t.eval_steps)}",
        f"  checkpoint: {bool(t.checkpoints)}",
        "",
        "dataset:",
        f"  data_folder: {json.dumps(f'data/{t.name}')}",
        "  format: indexed_binary",
        f"  num_files_train: {train_files}",
        f"  num_files_eval: {eval_files}",
        f"  num_samples_per_file: {records}",
        f"  record_length_bytes: {t.record_bytes}  # what a rank reads for a batch, on average",
        f"  record_dims: [{t.record_bytes}]  # without it DLIO rounds the length down to a square",
        "  record_element_type: uint8",
        "",
        "reader:",
        "  data_loader: pytorch",
        "  batch_size: 1  # a record is a batch",
        "  batch_size_eval: 1",
        "  read_threads: 1",
        f"  prefetch_size: {t.prefetch or 2}",
        "  file_shuffle: 'off'",
        "  sample_shuffle: 'off'",
        f"  read_type: {'on_demand' if records == 1 else 'memory'}  # a file stays open while it has records",
        "  preprocess_time:  # seconds for a batch: what the loading thread does besides file calls",
        *_make_distribution(t.load),
        "",
        "train:",
        f"  epochs: {t.epochs}",
        "  computation_time:  # seconds of a step: computing, and exchanging with the other ranks",
        *_make_distribution(t.compute),
    ]
    lines += [*_make_pauses(t, kept), "", "output:", "  metric:"]
    lines += ["    exclude_start_steps: 1", "    exclude_end_steps: 0"]
    return "\n".join([*lines, ""])


def _describe_workload(t: MeasuredTraining, kept: int) -> list[str]:
    """The comments on top. kept: steps of an epoch that the workload has."""
    about = (
        f"of the run {json.dumps(t.name)}. For DLIO's main branch: its releases up to 2.0 read no "
        "distributions and have other names for the record's length."
    )
    limits = [line for limit in _list_limits(t, kept) for line in wrap_comment(limit, "- ")]
    return [HEADER, *wrap_comment(about), "#", "# What it cannot say:", *limits]


def _make_pauses(t: MeasuredTraining, kept: int) -> list[str]:
    """The sections of evaluations and checkpoints, where the run had any."""
    lines = []
    if t.eval_steps:
        between = max(1, t.epochs // t.evaluations)
        lines += ["", "evaluation:", "  eval_time:", *_make_distribution(t.eval_compute)]
        lines += ["  eval_after_epoch: 1", f"  epochs_between_evals: {between}"]
    if t.checkpoints:
        every = max(1, min(t.checkpoint_steps, kept))
        lines += ["", "checkpoint:", f"  checkpoint_folder: {json.dumps(f'checkpoints/{t.name}')}"]
        lines += [f"  steps_between_checkpoints: {every}", "  checkpoint_after_epoch: 1"]
    return lines


def wrap_comment(text: str, before: str = "") -> list[str]:
    """A sentence as lines of comments of a YAML file; `before`: the first one's bullet."""
    indent = " " * len(before)
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"# {before}", subsequent_indent=f"# {indent}", break_on_hyphens=False
    )


def _make_distribution(spread: Spread) -> list[str]:
    if spread.mean <= 0:
        return ["    mean: 0.0"]
    if spread.stdev <= 0:
        return [f"    mean: {spread.mean:.6g}"]
    shape, scale = spread.gamma
    about = f"mean {spread.mean:.6g}, deviation {spread.stdev:.6g}"
    return ["    type: gamma", f"    shape: {shape:.6g}  # {about}", f"    scale: {scale:.6g}"]


def _make_checkpoint_model(t: MeasuredTraining) -> list[str]:
    if not t.checkpoints:
        return [""]
    return [
        f"  model_size_bytes: {t.checkpoint_bytes}  # of each rank, by zero_stage 3",
        "  parallelism:",
        "    zero_stage: 3",
        "",
    ]


def _list_limits(t: MeasuredTraining, kept: int) -> list[str]:
    """What the workload cannot say, as comments."""
    found = [
        f"a batch is read from several files here ({t.calls_per_batch:.3g} calls on average, of "
        f"{t.dataset_files} files in all); there it is one record of one file. Reads ahead of the batch "
        "(--read_chunk_mb) are not there.",
        f"the start-up ({t.starts_s:.3g} s until the first step) and the slower first step are left out.",
        "communication: DLIO has a barrier after each step; the time of the exchange is in computation_time.",
        "evaluations and checkpoints come after whole epochs, or every N steps, not where they came.",
    ]
    if t.eval_steps and abs(t.eval_record_bytes - t.record_bytes) > 0.01 * t.record_bytes:
        found.append(
            f"a batch of an evaluation has {t.eval_record_bytes:,} bytes; there all records have one length."
        )
    if t.has_other_calls:
        found.append(
            "tables in files, and other file calls of the main thread: DLIO makes none of them; the "
            f"{t.rows_s:.3g} s of a step that they take are in computation_time."
        )
    if t.checkpoints:
        found.append(
            "checkpoints are written by a thread while the next steps run (they paused the training for "
            f"{t.checkpoint_pause:.3g} s each); DLIO's steps wait until a checkpoint is written, with "
            "torch.save, into one file a rank."
        )
    if kept != t.steps:
        found.append(f"{kept} of the {t.steps} steps of an epoch: files must hold equal numbers of records.")
    return found
