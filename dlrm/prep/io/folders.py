"""The folders of one command: its output, which one process writes at a time, and its intermediate files.

Everything unfinished is in two work folders (see `common.owned`): intermediate files in one in --tmp_dir or
the output folder, results in one in the output folder. The folders' names contain a hash of the output's
path: the next run finds what a killed run of the same output has left, and never another output's. Finished
results are renamed into the output folder together. If a file of that name exists there and this program
cannot prove to have made it, the command ends before any work.
"""

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from common.errors import UserError, os_errors_as_user_errors, printable
from common.lock import FolderLock
from common.owned import LEDGER, OutputFolder, WorkFolders, discard_file
from dlrm.data.criteo import META, PARTS
from dlrm.prep.io.files import read_json_file, write_atomically
from dlrm.runtime.trace import sync_to_disk

SUBSETS = ("train", "val", "test", "unlabelled")
ARRAYS = rf"(day_\d+|train|test)_({'|'.join(PARTS)})\.npy"
PARQUET = rf"({'|'.join(SUBSETS)})/part_\d+\.parquet"
RESULTS = rf"{ARRAYS}|{PARQUET}|day_\d+_sparse\w*\.np[yz]|day_\d+|README\.md|{re.escape(META)}"
MADE_FILES = re.compile(
    rf"({'|'.join(SUBSETS)})/|({RESULTS})(\.partial)?|{re.escape(LEDGER)}\.[0-9a-f]{{16}}\.partial"
)
KEY = "key.json"
WORK_FILES = re.compile(
    r"((key|state)\.json|(count|lane|column|publish|md5)_\d+\.json|(message|pair)_\d+\.u32|places_\d+\.u32"
    r"|piece_\d+\.(spill|runs|final|rewritten)|lane_\d+\.(ids|map)|bucket_\d+\.done|day_\d+\.(spill|done)"
    r"|table_\d+\.i4|(day_\d+|train|test)\.text)(\.partial)?"
)
DATASET = rf"{ARRAYS}|{PARQUET}|day_\d+_sparse_multi_hot\.npz|{re.escape(META)}"  # meta.json and its files


@dataclass(frozen=True)
class Folders:
    """Where a command writes. `work` and `unfinished` contain no files but its own."""

    output_dir: Path
    work: Path  # intermediate files
    unfinished: Path  # results that have no name of their own yet

    def work_path(self, name: str) -> Path:
        return self.work / name

    def find_result(self, name: str) -> Path:
        """The path of a result: before it is published, or after."""
        path = self.unfinished / name
        if os.path.lexists(path):
            return path
        if not OutputFolder(self.output_dir).owns(name):
            raise UserError(f"{printable(self.output_dir / name)}: removed since it was made; use --restart")
        return self.output_dir / name


def name_work_folders(command: str, output_dir: Path) -> WorkFolders:
    return WorkFolders(f"{command}-{hash_path(output_dir)}", WORK_FILES)


def name_result_folders(command: str, output_dir: Path) -> WorkFolders:
    return WorkFolders(f"{command}-made-{hash_path(output_dir)}", MADE_FILES)


def hash_path(folder: Path) -> str:
    return hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:12]


def call_directly(function: Callable[[], None]) -> None:
    function()


class Output:
    """The output folder of a command. In its `with` block this process, or this job, is the only writer
    there.

    `command` is part of the work folders' names. `run_on_first` is `Workers.run_on_first` in a job with
    several ranks: rank 0 takes the lock, and all ranks fail if it is taken.
    """

    def __init__(
        self,
        command: str,
        output_dir: Path,
        tmp_dir: Path | None = None,
        run_on_first: Callable[[Callable[[], None]], None] = call_directly,
    ) -> None:
        self.command, self.output_dir = command, output_dir
        self.parent = tmp_dir or output_dir
        self._run_on_first = run_on_first
        self._lock = FolderLock(output_dir, f"python -m dlrm.prep {command}, which writes into it")
        self._work, self._made = (
            name_work_folders(command, output_dir),
            name_result_folders(command, output_dir),
        )

    def __enter__(self) -> "Output":
        self._run_on_first(self._take_lock)
        return self

    def _take_lock(self) -> None:
        with os_errors_as_user_errors(self.output_dir):
            self.output_dir.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        self._lock.release()

    def open(self, key: Any, names: Iterable[str], restart: bool = False) -> Folders:
        """The folders that a killed run with the same `key` has left, or else new ones. All other work
        folders of this output and command are removed.

        `key`: a JSON value, everything that intermediate files depend on. `names`: the results to be written;
        a file of that name that this program did not make is a UserError. `restart`: always make new folders.
        """
        refuse_foreign(self.output_dir, names)
        found: Folders | None = None
        for work in self._work.find_folders(self.parent):
            folders = None if restart or found else self._find_folders(work, key)
            if folders:
                found = folders
            else:
                report_kept(self._work.remove_folder(work))
        for made in self._made.find_folders(self.output_dir):
            if found is None or made != found.unfinished:
                report_kept(self._made.remove_folder(made))
        self._work.remove_unmarked(self.parent)
        self._made.remove_unmarked(self.output_dir)
        if found:
            return found
        made = self._made.make_folder(self.output_dir)
        work = self._work.make_folder(self.parent)
        write_atomically(work / KEY, {"key": key, "made": made.name})
        return Folders(self.output_dir, work, made)

    def _find_folders(self, work: Path, key: Any) -> Folders | None:
        """The folders of the run that made this work folder, if it had the same key."""
        try:
            values = read_json_file(work / KEY)
            made = self.output_dir / str(values["made"])
            same = values["key"] == key
        except (UserError, KeyError, TypeError):
            return None
        return Folders(self.output_dir, work, made) if same and self._made.is_ours(made) else None

    def clear(self) -> None:
        """Remove all work folders of this output and command."""
        for kind, parent in ((self._work, self.parent), (self._made, self.output_dir)):
            for folder in kind.find_folders(parent):
                report_kept(kind.remove_folder(folder))
            kind.remove_unmarked(parent)

    def has_leftovers(self) -> bool:
        """Whether there are work folders of this output and command."""
        return bool(self._work.find_folders(self.parent) or self._made.find_folders(self.output_dir))


def report_kept(kept: Sequence[Path]) -> None:
    """`kept`: files in a work folder that this program did not make, so they were not removed with it."""
    if kept:
        print(f"dlrm.prep: {printable(kept[0])}: not made by this program, not removed", file=sys.stderr)


def refuse_foreign(output_dir: Path, names: Iterable[str]) -> None:
    OutputFolder(output_dir).refuse_foreign(names)


def publish_results(
    folders: Folders, names: Sequence[str], last: str, others: str, check: Callable[[], None]
) -> None:
    """Rename the results in `folders.unfinished` into the output folder.

    `last` is one of the results, and makes the folder complete: an old one is removed first, the new one is
    renamed last. `others`: a regular expression; files of an earlier result that match it are removed if they
    are unchanged since this program made them. `check` is called before anything changes, and may raise.
    """
    output = OutputFolder(folders.output_dir, folders.unfinished)
    output.refuse_foreign([*names, last])
    check()
    made = {name: folders.unfinished / name for name in names if name != last}
    made = {name: path for name, path in made.items() if os.path.lexists(path)}
    if os.path.lexists(folders.unfinished / last):
        for name in (last, META) if re.fullmatch(others, META) else (last,):
            output.remove_file(name)
    output.publish_files(made)
    for name in set(output.list_own_names()) - {*names, last}:
        if re.fullmatch(others, name):
            output.remove_file(name)
    with os_errors_as_user_errors(folders.output_dir):
        for folder in sorted({(folders.output_dir / name).parent for name in names}):
            sync_to_disk(folder)
    if os.path.lexists(folders.unfinished / last):
        output.publish_files({last: folders.unfinished / last})
    with os_errors_as_user_errors(folders.output_dir):
        sync_to_disk(folders.output_dir)


def discard_files(folder: Path, pattern: str) -> None:
    """Remove the files of a work folder that match a glob pattern."""
    for path in folder.glob(pattern):
        discard_file(path)
