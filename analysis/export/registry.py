"""The formats of `python -m analysis export FORMAT RUN -o WHERE`: what each is, and what writes it."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ExportFormat:
    """write: what the command line says -> lines to print, each when it is known. Its `run` is a folder or a
    trace file; its `output` is a new file or folder, as `metavar` says.
    """

    write: Callable[[argparse.Namespace], Iterator[str]]
    metavar: str
    help: str
    add_options: Callable[[argparse.ArgumentParser], None] = lambda _: None  # of its own


def _write_fio(options: argparse.Namespace) -> Iterator[str]:
    from analysis.export import fio

    yield fio.write_fio_job(options.run, options.output, options.data_only)


def _add_fio_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data_only", action="store_true", help="leave out files of programs and of the system"
    )


def _write_dlio(options: argparse.Namespace) -> Iterator[str]:
    from analysis.export import dlio, dlio_run

    yield dlio.write_dlio_workload(options.run, options.output)
    if options.run_in is not None:
        yield dlio_run.run_dlio(options.run, options.run_in)


def _add_dlio_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", dest="run_in", type=Path, metavar="DIR",
        help="then run it, where DLIO is installed, in a new folder on the storage to measure, and compare",
    )  # fmt: skip


def _write_mlperf(options: argparse.Namespace) -> Iterator[str]:
    from analysis.export import mlperf

    yield mlperf.write_mlperf_workload(options.run, options.output)


EXPORT_FORMATS = {
    "dlio": ExportFormat(
        _write_dlio,
        "FILE",
        "a workload of DLIO: records, reader, computing time, evaluation, checkpoints",
        _add_dlio_options,
    ),
    "mlperf": ExportFormat(
        _write_mlperf, "FILE", "the measured numbers in the form of MLPerf Storage's DLRM, beside theirs"
    ),
    "fio": ExportFormat(
        _write_fio,
        "DIR",
        "an I/O log for each thread, and a job for fio that replays them all",
        _add_fio_options,
    ),
}
