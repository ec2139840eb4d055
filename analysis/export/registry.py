"""The formats of `python -m analysis export FORMAT RUN -o WHERE`: what each is, and what writes it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ExportFormat:
    """write: (run, output) -> what is printed. The run is a folder or a trace file; the output is a new file
    or folder, as `metavar` says. run: the same with the other tool, in a new folder.
    """

    write: Callable[[str, Path], str]
    metavar: str
    help: str
    run: Callable[[str, Path], str] | None = None


def _write_fio(run: str, output: Path) -> str:
    from analysis.export import fio

    return fio.write_fio_job(run, output)


def _write_dlio(run: str, output: Path) -> str:
    from analysis.export import dlio

    return dlio.write_dlio_workload(run, output)


def _run_dlio(run: str, folder: Path) -> str:
    from analysis.export import dlio_run

    return dlio_run.run_dlio(run, folder)


def _write_mlperf(run: str, output: Path) -> str:
    from analysis.export import mlperf

    return mlperf.write_mlperf_workload(run, output)


EXPORT_FORMATS = {
    "dlio": ExportFormat(
        _write_dlio,
        "FILE",
        "a workload of DLIO: records, reader, computing time, evaluation, checkpoints",
        _run_dlio,
    ),
    "mlperf": ExportFormat(
        _write_mlperf, "FILE", "the measured numbers in the form of MLPerf Storage's DLRM, beside theirs"
    ),
    "fio": ExportFormat(
        _write_fio, "DIR", "an I/O log for each thread, and a job for fio that replays them all"
    ),
}
