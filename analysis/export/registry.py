"""The formats of `python -m analysis export FORMAT RUN -o WHERE`: what each is, and what writes it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ExportFormat:
    """write: (run, output) -> what is printed. The run is a folder or a trace file; the output is a new file
    or folder, as `metavar` says.
    """

    write: Callable[[str, Path], str]
    metavar: str
    help: str


def _write_fio(run: str, output: Path) -> str:
    from analysis.export import fio

    return fio.write_fio_job(run, output)


EXPORT_FORMATS = {
    "fio": ExportFormat(
        _write_fio, "DIR", "an I/O log for each thread, and a job for fio that replays them all"
    ),
}
