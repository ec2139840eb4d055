"""torch.profiler on a few steps of this rank: what --profile_steps A-B asks for.

In: the steps as they begin and end. Out: RUN/profile/rank00003-steps10-15-PID.json.gz, Kineto's JSON, all of
it or nothing; `analysis perfetto` shows it. torch.profiler is imported when the first of these steps begins.
"""

import gzip
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import UserError, os_errors_as_user_errors, printable
from common.owned import WorkFolders, write_file
from dlrm.runtime import entry, trace
from dlrm.runtime.ranks import Ranks

MOST_STEPS = 100  # of a profile: a step has thousands of events, which are kept in memory until the last one
# Both are in analysis/trace/kineto.py, too, which reads the profiles: dlrm/ and analysis/ share no imports.
FOLDER = "profile"
STEP_NAME = "ProfilerStep#"  # how torch.profiler itself calls the mark of a step
_COPY_BYTES = 1 << 20
_WORK = WorkFolders("profile", re.compile(r"profile\.json(\.tmp)?"))


def parse_steps(text: str) -> tuple[int, int]:
    """10-15, or 10: the first and the last step. UserError for anything else."""
    found = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise UserError(
            f"--profile_steps {printable(text)}: give the first and the last step, e.g. 10-15, from 1"
        )
    if last - first >= MOST_STEPS:
        raise UserError(
            f"--profile_steps {text}: at most {MOST_STEPS} steps, e.g. {first}-{first + MOST_STEPS - 1}"
        )
    return first, last


class StepProfiler:
    """Starts with the first of its steps that begins, and writes its file after the last one."""

    def __init__(
        self, run_dir: str | os.PathLike[str], here: Ranks, steps: tuple[int, int],
        exclude_time: Callable[[float], None] = lambda seconds: None,
    ) -> None:  # fmt: skip
        """exclude_time: is given the seconds that starting and writing took."""
        self._folder, self._here = Path(run_dir) / FOLDER, here
        self._first, self._last = steps
        self._exclude_time = exclude_time
        self._profile: Any = None  # while it runs
        self._mark: Any = None  # of the step that goes on
        self._begun = self._ended = 0  # the first and the last step that it has

    @contextmanager
    def during_step(self, step: int) -> Iterator[None]:
        self.begin_step(step)
        try:
            yield
        finally:
            self.end_step(step)

    def begin_step(self, step: int) -> None:
        if not self._first <= step <= self._last:
            return
        if self._profile is None and not self._begun:
            self._begun = step
            self._start()
        if self._profile is not None and self._mark is None:
            from torch.profiler import record_function

            self._mark = record_function(f"{STEP_NAME}{step}")
            self._mark.__enter__()
            self._ended = step

    def end_step(self, step: int) -> None:
        self._end_mark()
        if step >= self._last:
            self.close()

    def close(self) -> None:
        """Write what was profiled, if the last step was not reached. May be called twice."""
        profile, self._profile = self._profile, None
        if profile is None:
            return
        self._end_mark()
        began = time.perf_counter()
        path = self._folder / (
            f"rank{self._here.rank:05d}-steps{self._begun}-{self._ended}-{os.getpid()}.json.gz"
        )
        try:
            with trace.span("profile", "write", file=str(path)):
                profile.stop()
                write_profile(profile, path)
        except (UserError, OSError, RuntimeError) as error:  # the training goes on
            entry.print_error(self._here, f"the profile was not written: {error}")
        self._exclude_time(time.perf_counter() - began)

    def _end_mark(self) -> None:
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None

    def _start(self) -> None:
        """Import and start torch's profiler: on a GPU that takes a second."""
        began = time.perf_counter()
        with trace.span("profile", "start"):
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would say on stderr that it has started
            import torch
            from torch.profiler import ProfilerActivity, profile

            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            made = profile(activities=activities)
            try:
                made.start()
                self._profile = made
            except RuntimeError as error:  # another profiler runs
                entry.print_error(self._here, f"no steps are profiled: {str(error).splitlines()[0]}")
        self._exclude_time(time.perf_counter() - began)


def write_profile(profile: Any, path: Path) -> None:
    """Write a profile that has ended: Kineto writes plain JSON, in a folder of its own; it becomes gzip."""
    work = _WORK.make_folder(path.parent, mode=0o777)
    try:
        plain = work / "profile.json"
        profile.export_chrome_trace(str(plain))
        with write_file(path) as partial, os_errors_as_user_errors(path), open(plain, "rb") as source:
            _check_whole(source)
            with gzip.open(partial, "wb", compresslevel=4) as made:
                while piece := source.read(_COPY_BYTES):
                    made.write(piece)
    finally:
        _WORK.remove_folder(work)


def _check_whole(source: Any) -> None:
    """Kineto does not say that a disk was full."""
    source.seek(max(0, source.seek(0, os.SEEK_END) - 16))
    if not source.read().rstrip().endswith(b"}"):
        raise UserError("torch.profiler wrote a part of it only; is the disk full?")
    source.seek(0)
