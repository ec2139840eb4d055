"""The run folder: what was asked, what happened, step by step; and the same for a person who watches.

Rank 0 writes and speaks; on the other ranks everything here does nothing. The folder has one writer at a time
(a lock), and what lies in it and was not written by this program is never replaced: `common.owned` lists what
was. metrics.jsonl only grows; a run that begins anew gives an earlier one the next name of metrics-1.jsonl,
metrics-2.jsonl, ...; one that goes on from a checkpoint cuts what came after it, since that comes again.
"""

import contextlib
import json
import os
import shutil
import stat
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.errors import UserError, os_errors_as_user_errors, printable
from common.inputs import parse_json, read_bytes
from common.lock import FolderLock
from common.owned import LEDGER, OutputFolder
from dlrm.config.parser import as_json

METRICS = "metrics.jsonl"
LARGEST = 4 << 30  # bytes of it
WRITTEN = ("config.json", "plan.json", "results.json", METRICS)


class RunFolder:
    """RUN/metrics.jsonl as it goes, JSON files whole; without a folder only words on stdout."""

    def __init__(
        self, folder: str | None, first: bool, tensorboard: bool = False, more: Iterable[str] = ()
    ) -> None:
        """`more`: other files that this run is going to write there."""
        self.folder = Path(folder) if folder and first else None
        self._first = first
        self.launch: dict[str, Any] = {}
        self._bar: Any = None
        self._board: Any = None
        self._metrics = -1  # descriptor
        self._size = self._sum = 0  # bytes of metrics.jsonl, and their checksum
        self._locks: dict[str, FolderLock] = {}
        self._claiming = threading.Lock()
        self._steps, self._done, self._begun = 0, 0, time.time()
        self._output: OutputFolder | None = None
        if self.folder:
            try:
                self._open(self.folder, tensorboard, more)
            except BaseException:
                self.close()
                raise

    def _open(self, folder: Path, tensorboard: bool, more: Iterable[str]) -> None:
        with os_errors_as_user_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.claim(folder, "training into it")
        self._output = OutputFolder(folder)
        if not os.path.lexists(folder / LEDGER):
            self._adopt_earlier_run(folder)
        boards = ["tensorboard"] if tensorboard else []
        self._output.refuse_foreign([*WRITTEN, *more, *boards], "move it away or name another --output_dir")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._output.make_folder("tensorboard")))

    def _adopt_earlier_run(self, folder: Path) -> None:
        """A run of an earlier version, or a copy of one without its list of files: what can be recognised as
        written by this program becomes our own. Everything else stays the user's.
        """
        if not _is_recorded(folder / "config.json", _is_config):
            return
        assert self._output is not None
        found = [name for name, check in RECORDED.items() if _is_recorded(folder / name, check)]
        self._output.adopt(found)
        board = folder / "tensorboard"
        if board.is_dir() and not board.is_symlink() and all(map(_is_board_file, board.rglob("*"))):
            self._output.make_folder("tensorboard", known=True)
        self.warn(
            f"{printable(folder)}: a run of an earlier version or a copy; its {', '.join(found)} are taken "
            "over, other files stay as they are"
        )

    def claim(self, folder: Path, purpose: str) -> None:
        """Be the only writer of this folder until `close`; on the first rank."""
        if not self._first:
            return
        with self._claiming, os_errors_as_user_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            name = os.path.realpath(folder)
            if name not in self._locks:  # --checkpoint_dir may be the run folder itself
                lock = FolderLock(folder, purpose)
                lock.acquire()
                self._locks[name] = lock

    def describe(self, cfg: Any) -> None:
        """Every option as it was understood. Not over an earlier run's, before it is known to go on."""
        if self._output:
            self._output.write("config.json", as_json(cfg, self.launch))

    def grow(self, name: str) -> Path | None:
        """A file that somebody else here appends to, listed as our own."""
        if self._output is None:
            return None
        os.close(self._output.open_growing(name))
        return self._output.folder / name

    # --- metrics.jsonl

    def position(self) -> dict[str, int | None]:
        """How long metrics.jsonl is now, for a checkpoint."""
        if self._metrics < 0:
            return {"metrics_bytes": None, "metrics_crc32": None}
        return {"metrics_bytes": self._size, "metrics_crc32": self._sum}

    def start_anew(self) -> None:
        """Training begins at its start: an earlier metrics.jsonl gets another name."""
        if self._output:
            other = None
            if os.path.lexists(self._output.folder / METRICS) and self._lines():
                other = self._output.set_aside(METRICS)
            if other:
                self.say(f"{METRICS} of an earlier start is now {other}")
            self._open_metrics()

    def go_on(self, step: int, size: Any = None, checksum: Any = None) -> None:
        """Training goes on behind this step, of a checkpoint which says how long metrics.jsonl was then: what
        came after is going to come again.
        """
        if not self._output:
            return
        path = self._output.folder / METRICS
        if os.path.lexists(path):
            self._output.refuse_foreign([METRICS])
            data = read_bytes(path, LARGEST)
            kept = _before(data, step, size, checksum)
            if kept < len(data):
                self._open_metrics()
                os.ftruncate(self._metrics, kept)
                self._size, self._sum = kept, zlib.crc32(data[:kept])
                return
        self._open_metrics()

    def append(self) -> None:
        """Only tests are going to be reported."""
        if self._output:
            self._open_metrics()

    def _lines(self) -> bytes:
        assert self._output is not None
        return read_bytes(self._output.folder / METRICS, LARGEST)

    def _open_metrics(self) -> None:
        assert self._output is not None
        self._metrics = self._output.open_growing(METRICS)
        data = self._lines()
        whole = data.rfind(b"\n") + 1  # a killed process may have left half a line
        if whole < len(data):
            os.ftruncate(self._metrics, whole)
        self._size, self._sum = whole, zlib.crc32(data[:whole])

    def _append(self, line: bytes) -> None:
        try:
            view = memoryview(line)
            while view:
                view = view[os.write(self._metrics, view) :]
        except OSError as error:
            assert self._output is not None
            raise OSError(error.errno, error.strerror, str(self._output.folder / METRICS)) from None
        self._size, self._sum = self._size + len(line), zlib.crc32(line, self._sum)

    # --- as it goes

    def begin(self, steps: int, done: int, bar: bool) -> None:
        """Training starts: `steps` in all, some done before. A bar where a person looks on."""
        self._steps, self._done, self._begun = steps, done, time.time()
        if bar and self._first:
            size = shutil.get_terminal_size((100, 24))  # some terminals say 0 x 0: tqdm would hide the bar
            self._bar = tqdm(
                total=steps, unit="step", desc="train", disable=not sys.stderr.isatty(),
                ncols=size.columns, nrows=size.lines,
            )  # fmt: skip

    def report(self, **values: Any) -> None:
        """One line of metrics.jsonl, one line (or a step of the bar) for people."""
        if not self._first:
            return
        if self._output and self._metrics < 0:
            self.append()
        if self._metrics >= 0:
            clocks = {"time": time.time(), "cpu_seconds": time.process_time()}  # of this rank
            self._append((json.dumps({**values, **clocks}) + "\n").encode())
        if self._board:
            split = values.get("split", "train")
            for name, value in values.items():
                if isinstance(value, int | float) and name not in ("step", "epoch"):
                    self._board.add_scalar(f"{split}/{name}", value, values.get("step", 0))
        if "split" in values:
            shown = {k: v for k, v in values.items() if k not in ("split", "step", "epoch") and v is not None}
            self.say(f"{values['split']}: " + ", ".join(f"{k} {v:.6g}" for k, v in shown.items()))
        else:
            self._show_step(values)

    def _show_step(self, values: dict[str, Any]) -> None:
        text = (
            f"loss {values['loss']:.5f}, lr {values['lr']:.4g}, {values['samples_per_second']:,.0f} samples/s"
        )
        if self._bar is not None and not self._bar.disable:
            self._bar.set_postfix_str(text)
            self._bar.update(values["step"] - self._bar.n)
            return
        done = values["step"] - self._done
        left = (time.time() - self._begun) * (self._steps - values["step"]) / done if done > 0 else 0
        self.say(f"epoch {values['epoch']} step {values['step']}/{self._steps}: {text}, {left:.0f} s left")

    def warn(self, text: str) -> None:
        if self._first:
            print(f"dlrm: {text}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        if self._first:
            if self._bar is not None and not self._bar.disable:
                self._bar.write(text)
            else:
                print(text, flush=True)

    def save(self, name: str, values: Any) -> None:
        """RUN/name as JSON, published whole."""
        if self._output:
            self._output.write(name, json.dumps(values, indent=1) + "\n")

    def record_plan(self, plan: dict[str, Any], description: str, show: bool) -> None:
        """plan.json: which rank holds which part of which table; `show`: print it, too."""
        self.save("plan.json", plan)
        if show:
            self.say(description)

    def close(self) -> None:
        """Give the folders back; also after an error, and more than once."""
        for each in (self._bar, self._board):
            if each is not None:
                each.close()
        self._bar = self._board = None
        if self._metrics >= 0:
            os.close(self._metrics)
            self._metrics = -1
            if self._output:
                with contextlib.suppress(UserError, OSError):  # on a full disk the list stays as it was
                    self._output.adopt([METRICS])
        for lock in self._locks.values():
            lock.release()
        self._locks.clear()


def _is_recorded(path: Path, check: Callable[[bytes], bool]) -> bool:
    """Whether this is a plain file of this user's whose content passes the check."""
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return False
        return check(read_bytes(path, LARGEST))
    except (OSError, UserError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return False


def _is_config(data: bytes) -> bool:
    values = parse_json(data, "config.json")
    return {"data", "model", "optim", "plan", "run", "checkpoint", "launch"} <= set(values) and all(
        isinstance(value, dict) for value in values.values()
    )


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


RECORDED: dict[str, Callable[[bytes], bool]] = {
    "config.json": _is_config, "plan.json": _is_plan, "results.json": _is_results, METRICS: _is_metrics,
    "mlperf.log": _is_mlperf_log,
}  # fmt: skip


def _before(data: bytes, step: int, size: Any, checksum: Any) -> int:
    """The bytes of metrics.jsonl that a checkpoint of this step had seen: as many as it says, if they are the
    same ones (the file may be another run folder's); else the lines up to the first of a later step.
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
