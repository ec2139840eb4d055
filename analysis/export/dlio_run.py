"""Run an exported workload with the DLIO that is installed, and compare its numbers with the run's.

In: RUN and a new folder on the storage to be measured. Out: in that folder the workload, DLIO's data and its
own results; and a table to print.
"""

import shutil
import subprocess
from pathlib import Path
from typing import Any

from analysis.export.dlio import make_workload, plan_files
from analysis.export.measured import MeasuredTraining, measure_training
from common.errors import UserError, os_errors_as_user_errors, printable
from common.inputs import read_json_object

NAME = "exported"  # of the workload
PROGRAM = "dlio_benchmark"
REMEDY = (
    "install the main branch of github.com/argonne-lcf/dlio_benchmark in an environment of its own, and put "
    "its bin folder on PATH"
)


def run_dlio(run: str, folder: Path) -> str:
    """Makes the data, runs the workload, and gives the comparison as text."""
    program = shutil.which(PROGRAM)
    if program is None:
        raise UserError(f"--run: there is no {PROGRAM} on PATH: {REMEDY}")
    training = measure_training(run)
    launcher: list[str] = []
    if training.ranks > 1:
        mpiexec = shutil.which("mpiexec", path=str(Path(program).parent)) or shutil.which("mpiexec")
        if mpiexec is None:
            raise UserError(f"--run: {training.ranks} ranks need an mpiexec on PATH")
        launcher = [mpiexec, "-n", str(training.ranks)]
    with os_errors_as_user_errors(folder):
        folder.mkdir(exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"--run {printable(folder)}: is not empty; name a new folder")
        (folder / "workload").mkdir()
        (folder / "workload" / f"{NAME}.yaml").write_text(make_workload(training))
    folder = folder.resolve()
    command = [*launcher, program, f"--config-dir={folder}", f"workload={NAME}"]
    off = [f"++workload.workflow.{part}=False" for part in ("train", "checkpoint", "evaluation")]
    _run(folder, [*command, "++workload.workflow.generate_data=True", *off], "making data")
    _run(folder, [*command, f"++workload.output.folder={folder / 'output'}"], "running")
    metric = read_json_object(folder / "output" / "summary.json").get("metric", {})
    epochs = read_json_object(folder / "output" / "0_per_epoch_stats.json")
    return compare(training, float(metric.get("train_au_mean_percentage") or 0), sum_block_seconds(epochs))


def sum_block_seconds(epochs: dict[str, Any]) -> float:
    """Seconds in blocks of training steps, by DLIO's statistics of its epochs. Its throughput leaves out two
    steps of each block, whatever is excluded: of short blocks that is much.
    """
    blocks = (block for epoch in epochs.values() for name, block in epoch.items() if name.startswith("block"))
    return sum(float(block.get("duration", 0)) for block in blocks)


def _run(folder: Path, command: list[str], what: str) -> None:
    """DLIO's files are relative to the folder; its output goes into a log there."""
    log = folder / f"{what.replace(' ', '_')}.log"
    with open(log, "wb") as out:
        code = subprocess.run(
            command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False
        ).returncode
    if code:
        raise UserError(
            f"--run: {PROGRAM} failed in {what} (exit code {code}): {_find_reason(log)}; all of it is in "
            f"{printable(log)}"
        )


def _find_reason(log: Path) -> str:
    """The last line of a traceback, else the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    return printable((errors or lines or ["it printed nothing"])[-1][:200])


def compare(training: MeasuredTraining, utilisation: float, seconds: float) -> str:
    """The run's numbers beside DLIO's: its utilisation in %, and the seconds that its training steps took."""
    records, files, _ = plan_files(training)
    steps = records * files // training.ranks
    steps_per_s = training.epochs * steps / max(1e-9, seconds)
    rows = [
        ("steps of an epoch", training.steps, steps),
        ("steps a second", 1 / max(1e-9, training.step.mean), steps_per_s),
        ("MB/s, all ranks", training.ranks * training.record_bytes / 1e6 / max(1e-9, training.step.mean),
         training.ranks * training.record_bytes / 1e6 * steps_per_s),
        ("accelerator utilisation, %", 100 * training.utilisation, utilisation),
    ]  # fmt: skip
    lines = [f"{'':<28}{'run':>12}{'DLIO':>12}{'difference':>12}"]
    for name, ours, theirs in rows:
        lines.append(f"{name:<28}{ours:>12.4g}{theirs:>12.4g}{theirs / ours - 1 if ours else 0:>+12.1%}")
    return "\n".join(lines)
