"""The folders of one command: its output, which one process writes at a time, and its intermediate files.

Whatever is not finished lies in two work folders of `common.owned`, one for intermediate files in --tmp_dir
(or in the output folder), one for results in the output folder. Their names hold a digest of the output's
path, so that the next run finds what a killed one has left, and no other output's. Finished results get
their names together; a file there that the program cannot prove to have made is refused before any work.
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
DATASET = rf"{ARRAYS}|{PARQUET}|day_\d+_sparse_multi_hot\.npz|{re.escape(META)}"  # and what it describes


@dataclass(frozen=True)
class Folders:
    """Where a command writes. `work` and `made` are its own."""

    output_dir: Path
    work: Path  # intermediate files
    unfinished: Path  # results that have no name of their own yet

    def path(self, name: str) -> Path:
        return self.work / name

    def find_result(self, name: str) -> Path:
        """A result before it has its name, or after."""
        path = self.unfinished / name
        if os.path.lexists(path):
            return path
        if not OutputFolder(self.output_dir).owns(name):
            raise UserError(f"{printable(self.output_dir / name)} is gone: start again with --restart")
        return self.output_dir / name


def name_work_folders(command: str, output_dir: Path) -> WorkFolders:
    return WorkFolders(f"{command}-{hash_path(output_dir)}", WORK_FILES)


def name_result_folders(command: str, output_dir: Path) -> WorkFolders:
    return WorkFolders(f"{command}-made-{hash_path(output_dir)}", MADE_FILES)


def hash_path(folder: Path) -> str:
    return hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:12]


def call_directly(work: Callable[[], None]) -> None:
    work()


class Output:
    """The output folder in the hands of one process, from `with` on until its end.

    `first_does`: in a job of many ranks the first one holds the lock, and all learn whether it got it.
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
        self._first_does = run_on_first
        self._lock = FolderLock(output_dir, f"python -m dlrm.prep {command}, which writes into it")
        self._work, self._made = (
            name_work_folders(command, output_dir),
            name_result_folders(command, output_dir),
        )

    def __enter__(self) -> "Output":
        self._first_does(self._acquire)
        return self

    def _acquire(self) -> None:
        with os_errors_as_user_errors(self.output_dir):
            self.output_dir.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        self._lock.release()

    def open(self, key: Any, names: Iterable[str], restart: bool = False) -> Folders:
        """What a killed run of the same `key` has left, or new folders. Others of this output are removed.
        `names`: what will be written, and must not be somebody else's.
        """
        refuse_foreign(self.output_dir, names)
        found: Folders | None = None
        for work in self._work.find(self.parent):
            folders = None if restart or found else self._opened(work, key)
            if folders:
                found = folders
            else:
                report_kept(self._work.remove(work))
        for made in self._made.find(self.output_dir):
            if found is None or made != found.unfinished:
                report_kept(self._made.remove(made))
        self._work.remove_unmarked(self.parent)
        self._made.remove_unmarked(self.output_dir)
        if found:
            return found
        made = self._made.make(self.output_dir)
        work = self._work.make(self.parent)
        write_atomically(work / KEY, {"key": key, "made": made.name})
        return Folders(self.output_dir, work, made)

    def _opened(self, work: Path, key: Any) -> Folders | None:
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
            for folder in kind.find(parent):
                report_kept(kind.remove(folder))
            kind.remove_unmarked(parent)

    def has_leftovers(self) -> bool:
        """Whether work folders lie about."""
        return bool(self._work.find(self.parent) or self._made.find(self.output_dir))


def report_kept(left: Sequence[Path]) -> None:
    if left:
        print(f"dlrm.prep: {printable(left[0])}: not made by this program, left where it is", file=sys.stderr)


def refuse_foreign(output_dir: Path, names: Iterable[str]) -> None:
    OutputFolder(output_dir).refuse_foreign(names)


def publish_results(
    folders: Folders, names: Sequence[str], last: str, others: str, check: Callable[[], None]
) -> None:
    """Give results their names. `last`, without which the folder is not complete, goes first if there is an
    old one, and comes last. An earlier result's files that match `others` and are as the program left them
    are removed. `check` has the final word.
    """
    output = OutputFolder(folders.output_dir, folders.unfinished)
    output.refuse_foreign([*names, last])
    check()
    made = {name: folders.unfinished / name for name in names if name != last}
    made = {name: path for name, path in made.items() if os.path.lexists(path)}
    if os.path.lexists(folders.unfinished / last):
        for name in (last, META) if re.fullmatch(others, META) else (last,):
            output.remove(name)
    output.publish(made)
    for name in set(output.own_names()) - {*names, last}:
        if re.fullmatch(others, name):
            output.remove(name)
    with os_errors_as_user_errors(folders.output_dir):
        for folder in sorted({(folders.output_dir / name).parent for name in names}):
            sync_to_disk(folder)
    if os.path.lexists(folders.unfinished / last):
        output.publish({last: folders.unfinished / last})
    with os_errors_as_user_errors(folders.output_dir):
        sync_to_disk(folders.output_dir)


def discard(folder: Path, pattern: str) -> None:
    """Files of a work folder that nobody needs any more."""
    for path in folder.glob(pattern):
        discard_file(path)
