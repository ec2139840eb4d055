"""One writer at a time: the second learns who writes, a killed owner holds no lock, foreign files stay."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.lock_holder import hold_lock

from common.errors import UserError
from common.lock import LOCK_NAME, FolderLock, find_lock_owner, try_lock

ROOT = Path(__file__).parents[2]


def test_the_second_learns_who_since_when_and_where(tmp_path: Path) -> None:
    with hold_lock(tmp_path) as process, pytest.raises(UserError) as error:
        FolderLock(tmp_path, "another").acquire()
    output = str(error.value)
    assert (
        f"by process {process.pid} of " in output
        and f" on {socket.gethostname()} (testing into it)" in output
    )
    assert re.search(r"in use since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", output)


def test_a_killed_owner_holds_nothing(tmp_path: Path) -> None:
    with hold_lock(tmp_path):
        pass  # it is killed
    assert (tmp_path / LOCK_NAME).exists()
    with FolderLock(tmp_path, "next"):
        pass
    assert not os.listdir(tmp_path)


def test_one_process_cannot_hold_it_twice(tmp_path: Path) -> None:
    with FolderLock(tmp_path, "one"):
        with pytest.raises(UserError, match="in use"):
            FolderLock(tmp_path, "two").acquire()
        assert (tmp_path / LOCK_NAME).exists()
    assert not os.listdir(tmp_path)


def test_it_is_the_same_folder_by_another_name(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    with FolderLock(tmp_path / "out", "one"), pytest.raises(UserError, match="in use"):
        FolderLock(tmp_path / "link", "two").acquire()


OWNER = {"host": "n1", "pid": 7, "start_time": "1", "user": "u", "since": 1.7e9, "purpose": "testing"}


@pytest.mark.parametrize("odd", [
    {"pid": float("inf")}, {"pid": 10**300}, {"pid": -1}, {"since": 1e300}, {"since": float("nan")},
    {"since": -1e300}, {"since": "x"}, {"user": "u" * 3000},
])  # fmt: skip
def test_a_held_lock_file_with_odd_values(tmp_path: Path, odd: dict[str, object]) -> None:
    """The second writer still gets one line, which is not long, and a look at the folder works."""
    path = tmp_path / LOCK_NAME
    path.write_text(json.dumps(OWNER | odd))
    holding = os.open(path, os.O_RDWR)
    try:
        assert try_lock(holding)
        with pytest.raises(UserError, match="in use") as error:
            FolderLock(tmp_path, "another").acquire()
        assert len(str(error.value)) < 600 and "\n" not in str(error.value)
        assert len(str(find_lock_owner(tmp_path))) < 600
    finally:
        os.close(holding)


@pytest.mark.parametrize("content", [b"mine", b"{}", b"[1]", b'{"host": 1}', b"\xff\xfe", b"[" * 5000])
def test_a_foreign_file_of_that_name_is_not_touched(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / LOCK_NAME
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a lock file of this program"):
        FolderLock(tmp_path, "one").acquire()
    assert path.read_bytes() == content


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "fifo"])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    path, elsewhere = tmp_path / LOCK_NAME, tmp_path / "elsewhere"
    if kind == "link":
        elsewhere.write_text("")
        path.symlink_to(elsewhere)
    elif kind == "dangling link":
        path.symlink_to(elsewhere)
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    before = path.lstat()
    with pytest.raises(UserError, match=re.escape(LOCK_NAME)):
        FolderLock(tmp_path, "one").acquire()
    assert path.lstat().st_ino == before.st_ino
    assert elsewhere.exists() == (kind == "link")


TURNS = """
import os, sys, time
from common.errors import UserError
from common.lock import FolderLock
folder, done = sys.argv[1], 0
while done < 30:
    try:
        with FolderLock(folder, "taking turns"):
            os.close(os.open(folder + "/alone", os.O_CREAT | os.O_EXCL))
            os.unlink(folder + "/alone")
            done += 1
    except UserError:
        time.sleep(0)
"""


def test_never_two_at_once(tmp_path: Path) -> None:
    """The file is removed on release while others open it; still nobody holds a file without a name."""
    command = [sys.executable, "-c", TURNS, str(tmp_path)]
    processes = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) for _ in range(4)]
    for process in processes:
        assert process.communicate(timeout=120)[1] == b""
        assert process.returncode == 0
    assert not os.listdir(tmp_path)
