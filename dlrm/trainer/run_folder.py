"""The run folder: the options, the metrics of every report, the results; and the same as lines on stdout.

Only rank 0 writes and prints; on the other ranks every method does nothing. The folder has one writer at a
time (a lock). A file in it that this program did not write is never replaced: `common.owned` records which
ones it wrote. metrics.jsonl is only appended to. A run that starts at step 0 renames an earlier one to
metrics-1.jsonl, metrics-2.jsonl, ...; a run that resumes from a checkpoint cuts the lines after that
checkpoint, because it writes them again.
"""

import contextlib
import json
import os
import stat
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

from common.descriptors import close_descriptor, open_descriptor
from common.errors import UserError, os_errors_as_user_errors, printable
from common.inputs import parse_json, read_bytes
from common.lock import FolderLock
from common.owned import LEDGER, OutputFolder
from common.progress import open_terminal_bar
from dlrm.config.parser import as_json
from dlrm.runtime.new_run_folder import refuse_other_model

METRICS = "metrics.jsonl"
MAX_METRICS_BYTES = 4 << 30
PROGRESS = "progress.json"
PROGRESS_BYTES = 1024  # of progress.json, always: a reader never sees half of it
WRITTEN = ("config.json", "plan.json", "dataset.json", "results.json", METRICS, PROGRESS)


class RunFolder:
    """RUN/metrics.jsonl line by line, JSON files whole; without a folder only lines on stdout."""

    def __init__(
        self,
        folder: str | None,
        first: bool,
        tensorboard: bool = False,
        more: Iterable[str] = (),
        model: str = "",
    ) -> None:
        """Lock the folder for this run; UserError where another run writes into it, where it has a run of
        another model, or foreign files.

        folder  --output_dir, or None: nothing is written
        first   whether this is rank 0; the other ranks write nothing
        more    names of other files that this run is going to write there
        model   the title of the model's spec
        """
        self.folder = Path(folder) if folder and first else None
        self._first = first
        self.launch: dict[str, Any] = {}
        self._bar: Any = None
        self._board: Any = None
        self._metrics = self._progress = -1  # descriptors
        self._last_line = time.monotonic()  # when one was printed
        self._size = self._sum = 0  # bytes of metrics.jsonl, and their CRC-32
        self._locks: dict[str, FolderLock] = {}  # by the folder's real path
        self._locking = threading.Lock()  # the thread that writes checkpoints locks their folder
        self._total_steps, self._steps_before, self._started_at = 0, 0, time.time()
        self._output: OutputFolder | None = None
        if self.folder:
            try:
                self._open_folder(self.folder, model, tensorboard, more)
            except BaseException:
                self.close()
                raise

    def _open_folder(self, folder: Path, model: str, tensorboard: bool, more: Iterable[str]) -> None:
        """Lock the folder, and refuse foreign files in it. `more`: other files that this run writes."""
        with os_errors_as_user_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.lock_folder(folder, "training into it")
        refuse_other_model(folder, model)
        self._output = OutputFolder(folder)
        if not os.path.lexists(folder / LEDGER) or self._output.is_copy():
            self._adopt_earlier_run(folder)
        boards = ["tensorboard"] if tensorboard else []
        self._output.refuse_foreign([*WRITTEN, *more, *boards], "move it away or name another --output_dir")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._output.make_folder("tensorboard")))

    def _adopt_earlier_run(self, folder: Path) -> None:
        """A run of an earlier version, or a copy: what can be recognised as written by this program, and has
        the size that a copied list says, becomes our own. Everything else stays the user's.
        """
        if not _is_recorded(folder / "config.json", _is_config):
            return
        assert self._output is not None
        found = [
            name
            for name, check in RECORDED.items()
            if _is_recorded(folder / name, check) and self._output.has_listed_size(name)
        ]
        self._output.record_files(found, copied=True)
        board = folder / "tensorboard"
        if board.is_dir() and not board.is_symlink() and all(map(_is_board_file, board.rglob("*"))):
            self._output.make_folder("tensorboard", known=True)
        self.print_warning(
            f"{printable(folder)}: a run of an earlier version or a copy; its {', '.join(found)} are taken "
            "over, other files stay as they are"
        )

    def lock_folder(self, folder: Path, purpose: str) -> None:
        """Become the only writer of this folder until `close`, or raise UserError naming the other writer.

        `purpose` is what the other run's user reads, e.g. "saving checkpoints in it". Locking it twice is
        fine.
        """
        if not self._first:
            return
        with self._locking, os_errors_as_user_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            name = os.path.realpath(folder)
            if name not in self._locks:  # --checkpoint_dir may be the run folder itself
                lock = FolderLock(folder, purpose)
                lock.acquire()
                self._locks[name] = lock

    def write_config(self, options: Any) -> None:
        """config.json: every option as resolved, and where the run was started."""
        if self._output:
            self._output.write("config.json", as_json(options, self.launch))

    def register_growing_file(self, name: str) -> Path | None:
        """Make a file that other code in this process appends to, and record it as this program's own."""
        if self._output is None:
            return None
        close_descriptor(self._output.open_growing(name))
        return self._output.folder / name

    # --- metrics.jsonl

    def find_metrics_position(self) -> dict[str, int | None]:
        """Length and checksum of metrics.jsonl now; a checkpoint stores them for `resume_metrics`."""
        if self._metrics < 0:
            return {"metrics_bytes": None, "metrics_crc32": None}
        return {"metrics_bytes": self._size, "metrics_crc32": self._sum}

    def start_metrics(self) -> None:
        """Training starts at step 0: an earlier metrics.jsonl gets another name."""
        if self._output:
            other = None
            if os.path.lexists(self._output.folder / METRICS) and self._read_metrics():
                other = self._output.set_aside(METRICS)
            if other:
                self.print_line(f"{METRICS} of an earlier run was renamed to {other}")
            self._open_metrics()

    def resume_metrics(self, step: int, size: Any = None, checksum: Any = None) -> None:
        """Training resumes after this step: cut the lines that it is going to write again.

        `size`, `checksum`: what `find_metrics_position` returned when the checkpoint was saved, as the
        checkpoint has them, unchecked.
        """
        if not self._output:
            return
        path = self._output.folder / METRICS
        if os.path.lexists(path):
            self._output.refuse_foreign([METRICS])
            data = read_bytes(path, MAX_METRICS_BYTES)
            kept = _find_cut(data, step, size, checksum)
            if kept < len(data):
                self._open_metrics()
                os.ftruncate(self._metrics, kept)
                self._size, self._sum = kept, zlib.crc32(data[:kept])
                return
        self._open_metrics()

    def append_metrics(self) -> None:
        """Keep all lines: a run with --mode test only adds its evaluation."""
        if self._output:
            self._open_metrics()

    def _read_metrics(self) -> bytes:
        assert self._output is not None
        return read_bytes(self._output.folder / METRICS, MAX_METRICS_BYTES)

    def _open_metrics(self) -> None:
        assert self._output is not None
        self._metrics = self._output.open_growing(METRICS)
        data = self._read_metrics()
        whole = data.rfind(b"\n") + 1  # a killed process may have left half a line
        if whole < len(data):
            os.ftruncate(self._metrics, whole)
        self._size, self._sum = whole, zlib.crc32(data[:whole])

    def _append_line(self, line: bytes) -> None:
        try:
            view = memoryview(line)
            while view:
                view = view[os.write(self._metrics, view) :]
        except OSError as error:
            assert self._output is not None
            raise OSError(error.errno, error.strerror, str(self._output.folder / METRICS)) from None
        self._size, self._sum = self._size + len(line), zlib.crc32(line, self._sum)

    # --- while training

    def start_progress(self, total_steps: int, steps_before: int, show_bar: bool) -> None:
        """Training starts: `total_steps` in all, `steps_before` of them done by an earlier run.

        `show_bar`: a progress bar, where stderr is a terminal.
        """
        self._total_steps, self._steps_before, self._started_at = total_steps, steps_before, time.time()
        if show_bar and self._first:
            self._bar = open_terminal_bar("train", "step", total_steps)

    @property
    def is_first(self) -> bool:
        """Whether this rank prints and writes."""
        return self._first

    def measure_quiet_seconds(self) -> float:
        """Since the last line."""
        return time.monotonic() - self._last_line

    def write_progress(self, values: dict[str, Any]) -> None:
        """progress.json: these numbers, and those of `start_progress`. A full disk is not an error here: the
        next line of metrics.jsonl will say so.
        """
        if self._output is None:
            return
        known = {
            "total_steps": self._total_steps, "steps_before": self._steps_before, "started": self._started_at,
        }  # fmt: skip
        data = json.dumps(values | known).encode().ljust(PROGRESS_BYTES - 1)[: PROGRESS_BYTES - 1] + b"\n"
        with contextlib.suppress(OSError):
            if self._progress < 0:
                # made, and recorded as the program's own
                close_descriptor(self._output.open_growing(PROGRESS))
                flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
                self._progress = open_descriptor(self._output.folder / PROGRESS, flags)
            os.pwrite(self._progress, data, 0)

    def show_position(self, epoch: int, step: int, evaluating: bool) -> None:
        """A line for someone who waits for the next report."""
        doing = "evaluating" if evaluating else "no report yet"
        self.print_line(
            f"epoch {epoch} step {step}/{self._total_steps}: {doing}, eta {self._estimate_end(step)}"
        )

    def _estimate_end(self, step: int) -> timedelta:
        """By the mean time of the steps that this launch has done."""
        done, to_do = step - self._steps_before, self._total_steps - step
        left = (time.time() - self._started_at) * to_do / done if done > 0 else 0
        return timedelta(seconds=round(left))

    def log_metrics(self, **values: Any) -> None:
        """One line of metrics.jsonl, TensorBoard's scalars, and one line on stdout (or a step of the bar).

        An evaluation's values have "split", a training step's do not.
        """
        if not self._first:
            return
        if self._output and self._metrics < 0:
            self.append_metrics()
        if self._metrics >= 0:
            clocks = {"time": time.time(), "cpu_seconds": time.process_time()}  # of rank 0
            self._append_line((json.dumps({**values, **clocks}) + "\n").encode())
        if self._board:
            split = values.get("split", "train")
            for name, value in values.items():
                if isinstance(value, int | float) and name not in ("step", "epoch"):
                    self._board.add_scalar(f"{split}/{name}", value, values.get("step", 0))
        if "split" in values:
            shown = {k: v for k, v in values.items() if k not in ("split", "step", "epoch") and v is not None}
            self.print_line(f"{values['split']}: " + ", ".join(f"{k} {v:.6g}" for k, v in shown.items()))
        else:
            self._show_step(values)

    def _show_step(self, values: dict[str, Any]) -> None:
        text = f"loss {values['loss']:.5f}, lr {values['lr']:.4g}, " if "loss" in values else ""
        text += f"{values['samples_per_second']:,.0f} samples/s, step_time {values['step_time']:.6f}"
        if self._bar is not None and not self._bar.disable:
            self._bar.set_postfix_str(text)
            self._bar.update(values["step"] - self._bar.n)
            return
        step = values["step"]
        eta = self._estimate_end(step)
        self.print_line(f"epoch {values['epoch']} step {step}/{self._total_steps}: {text}, eta {eta}")

    def print_warning(self, text: str) -> None:
        """One line on stderr."""
        if self._first:
            print(f"dlrm: {text}", file=sys.stderr, flush=True)

    def print_line(self, text: str) -> None:
        """One line on stdout, above the progress bar if there is one."""
        self._last_line = time.monotonic()
        if self._first:
            if self._bar is not None and not self._bar.disable:
                self._bar.write(text)
            else:
                print(text, flush=True)

    def write_json(self, name: str, values: Any) -> None:
        """RUN/name as JSON: the whole file appears at once, or nothing."""
        if self._output:
            self._output.write(name, json.dumps(values, indent=1) + "\n")

    def record_plan(self, plan: dict[str, Any], description: str, show: bool) -> None:
        """plan.json: which rank holds which part of which table; `show`: print `description`, too."""
        self.write_json("plan.json", plan)
        if show:
            self.print_line(description)

    def close(self) -> None:
        """Close all files and release the locks. Called after errors too, and may be called twice."""
        for each in (self._bar, self._board):
            if each is not None:
                each.close()
        self._bar = self._board = None
        for descriptor, name in ((self._metrics, METRICS), (self._progress, PROGRESS)):
            if descriptor >= 0:
                close_descriptor(descriptor)
                if self._output:
                    with contextlib.suppress(UserError, OSError):  # full disk: the old list still holds
                        self._output.record_files([name])
        self._metrics = self._progress = -1
        for lock in self._locks.values():
            lock.release()
        self._locks.clear()


def _is_recorded(path: Path, check: Callable[[bytes], bool]) -> bool:
    """Whether this is a plain file of this user's whose content passes the check."""
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return False
        return check(read_bytes(path, MAX_METRICS_BYTES))
    except (OSError, UserError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return False


def _is_config(data: bytes) -> bool:
    values = parse_json(data, "config.json")
    groups = ("data", "model", "optim", "plan", "run", "checkpoint", "launch")
    return all(isinstance(values[group], dict) for group in groups)


def _is_plan(data: bytes) -> bool:
    tables = parse_json(data, "plan.json").values()
    return bool(tables) and all(set(table) == {"sharding", "kernel", "shards"} for table in tables)


def _is_results(data: bytes) -> bool:
    return {"steps", "samples", "world_size", "seconds", "bytes_read"} <= set(parse_json(data, "", nan=True))


def _is_metrics(data: bytes) -> bool:
    """Lines of `report`; the last may have been cut off when the run was killed."""
    lines = data.splitlines()[:-1] or data.splitlines()
    for line in (lines[0], lines[-1]):
        if not {"step", "epoch", "time"} <= set(parse_json(line, METRICS, nan=True)):
            return False
    return True


def _is_mlperf_log(data: bytes) -> bool:
    return bool(data) and all(line.startswith(b":::MLLOG ") for line in data.splitlines())


def _is_board_file(path: Path) -> bool:
    return path.name.startswith("events.out.tfevents.") and _is_recorded(path, lambda _: True)


def _is_progress(data: bytes) -> bool:
    return len(data) == PROGRESS_BYTES and {"step", "total_steps", "silent"} <= set(
        parse_json(data, PROGRESS)
    )


RECORDED: dict[str, Callable[[bytes], bool]] = {
    "config.json": _is_config, "plan.json": _is_plan, "results.json": _is_results, METRICS: _is_metrics,
    PROGRESS: _is_progress, "mlperf.log": _is_mlperf_log,
}  # fmt: skip


def _find_cut(data: bytes, step: int, size: Any, checksum: Any) -> int:
    """How many bytes of metrics.jsonl were there when the checkpoint of this step was saved.

    The checkpoint's own `size` counts if its checksum fits: the file may be another run's, or edited.
    Otherwise the file is cut before the first line of a later step, or that cannot be read.
    """
    if type(size) is int and 0 <= size <= len(data) and zlib.crc32(data[:size]) == checksum:
        return size
    kept = 0
    for line in data.splitlines(keepends=True):
        try:
            at = json.loads(line)["step"]
            if not line.endswith(b"\n") or not isinstance(at, int | float) or at > step:
                break
        except (ValueError, KeyError, TypeError, RecursionError):
            break
        kept += len(line)
    return kept
