"""Only what the program made is removed or replaced, whatever else is there."""

import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.owned import LEDGER, MARK, OutputFolder, WorkFolders, write_file, write_whole

WORK = WorkFolders("test", re.compile(r"(sub/)?(part_\d+|sub/)|sub/[ab]"))
NAMES = (
    "part_0",
    "part_1",
    "part_x",
    "a",
    "thesis.tex",
    MARK,
    "sub",
    "b",
    ".dlrm-io.json",
    "état",
    "new\nline",
)


def snapshot(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = "folder" if path.is_dir() else path.read_bytes()
    return found


def make_tree(folder: Path, chance: random.Random, depth: int) -> None:
    folder.mkdir(exist_ok=True)
    for name in chance.sample(NAMES, chance.randrange(len(NAMES))):
        path = folder / name
        if os.path.lexists(path):
            continue
        kind = chance.randrange(6)
        if kind == 0:
            path.symlink_to(chance.choice(("../../elsewhere", "..", "nowhere", "part_0")))
        elif kind == 1 and depth:
            make_tree(path, chance, depth - 1)
        else:
            path.write_bytes(chance.randbytes(chance.randrange(9)))


@pytest.mark.parametrize("seed", range(200))
def test_remove_takes_what_the_program_puts_there_and_nothing_else(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    make_tree(tmp_path / "elsewhere", chance, 2)
    outside = snapshot(tmp_path / "elsewhere")
    folder = WORK.make_folder(tmp_path / "tmp")
    mark = (folder / MARK).read_bytes()
    make_tree(folder, chance, 2)
    before = snapshot(folder)
    left = WORK.remove_folder(folder)
    assert snapshot(tmp_path / "elsewhere") == outside
    after = snapshot(folder) if folder.exists() else {}
    for name, content in before.items():
        path = Path(name)
        own_names = WORK.files.fullmatch(name) and all(
            WORK.files.fullmatch(f"{parent}/") for parent in list(path.parents)[:-1]
        )
        linked = (folder / name).is_symlink()
        if content == "folder" or name == MARK:
            continue
        assert (after.get(name) == content) == (not own_names or linked or isinstance(content, str)), name
    assert folder.exists() == bool(left)
    if left:
        assert (folder / MARK).read_bytes() == mark


def forgeries(folder: Path, base: Path) -> dict[str, Path]:
    """What looks like a work folder and is not one that the program made."""
    copy = base / "tmp" / folder.name.replace(folder.name[-16:], "0123456789abcdef")
    shutil.copytree(folder, copy)
    same_name = base / "other" / folder.name
    shutil.copytree(folder, same_name)
    link = base / "third" / folder.name
    link.parent.mkdir()
    link.symlink_to(folder)
    moved = base / "fourth" / ".dlrm-io-other-0123456789abcdef"
    shutil.copytree(folder, moved)
    return {"copy": copy, "copy elsewhere": same_name, "link": link, "other kind": moved}


def test_a_copy_a_link_and_a_forgery_are_not_ours(tmp_path: Path) -> None:
    folder = WORK.make_folder(tmp_path / "tmp")
    (folder / "part_0").write_text("x")
    for kind, path in forgeries(folder, tmp_path).items():
        before = snapshot(path)
        assert not WORK.is_ours(path), kind
        assert WORK.remove_folder(path) == [path]
        assert snapshot(path) == before
    assert WORK.find_folders(tmp_path / "tmp") == [folder]
    assert WORK.remove_folder(folder) == []
    assert not folder.exists()


@pytest.mark.parametrize("mark", [b"", b"{}", b"[" * 3000, b"\xff", b"null", b"x" * 5000])
def test_a_damaged_mark_proves_nothing(tmp_path: Path, mark: bytes) -> None:
    folder = WORK.make_folder(tmp_path)
    (folder / MARK).write_bytes(mark)
    (folder / "part_0").write_text("x")
    assert not WORK.find_folders(tmp_path)
    assert WORK.remove_folder(folder) == [folder]
    WORK.remove_unmarked(tmp_path)
    assert (folder / "part_0").read_text() == "x"


def test_what_was_cut_short_while_it_was_made_goes(tmp_path: Path) -> None:
    for number, content in enumerate((None, b"", b"mine")):
        folder = tmp_path / f".dlrm-io-test-{number:016x}"
        folder.mkdir()
        if content is not None:
            (folder / MARK).write_bytes(content)
    (tmp_path / ".dlrm-io-tests-0000000000000000").mkdir()
    WORK.remove_unmarked(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [
        ".dlrm-io-test-0000000000000002",
        ".dlrm-io-tests-0000000000000000",
    ]


def test_only_own_results_are_replaced(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path)
    output.write("a", "one")
    output.write("sub/b", "two")
    again = OutputFolder(tmp_path)
    again.write("a", "three")
    assert (tmp_path / "a").read_text() == "three"
    (tmp_path / "a").write_text("edited by hand")
    for name in ("a", "foreign", "link", "linked/x"):
        path = tmp_path / name
        if name == "foreign":
            path.write_text("mine")
        elif name == "link":
            path.symlink_to("foreign")
        elif name == "linked/x":
            path.parent.symlink_to("sub")
        with pytest.raises(UserError):
            OutputFolder(tmp_path).write(name, "program's")
        assert not OutputFolder(tmp_path).remove_file(name)
    assert (tmp_path / "a").read_text() == "edited by hand"
    assert (tmp_path / "foreign").read_text() == "mine"
    assert OutputFolder(tmp_path).list_own_names() == ["sub/b"]
    assert not list(tmp_path.rglob("*.partial"))


def test_however_often_publishing_is_cut_off_the_old_file_stays_own(tmp_path: Path) -> None:
    """The list comes first: what it says of a file that never came must not make it forget the one there."""
    out, made = tmp_path / "out", tmp_path / "made"
    out.mkdir()
    OutputFolder(out).write("a", "first")
    for attempt in range(4):
        write_whole(made.with_name(f"made{attempt}"), b"x" * attempt)
        output = OutputFolder(out)
        missing = tmp_path / "gone"
        write_whole(missing, b"y" * (10 + attempt))
        real = os.lstat(missing)
        output._record_replacement("a", real)
        output._write_ledger()  # and killed
        assert OutputFolder(out).owns("a")
    OutputFolder(out).write("a", "last")
    assert (out / "a").read_text() == "last"


@pytest.mark.parametrize(
    "content",
    [b"mine", b"{}", b"[]", b'{"made_by": "dlrm-io"}', b'{"files": 3, "made_by": "dlrm-io"}', b"[" * 9999],
)
def test_a_foreign_list_owns_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LEDGER).write_bytes(content)
    (tmp_path / "a").write_text("mine")
    output = OutputFolder(tmp_path)
    assert output.list_names() == []
    with pytest.raises(UserError):
        output.write("a", "program's")
    assert (tmp_path / "a").read_text() == "mine"
    assert (tmp_path / LEDGER).read_bytes() == content


def test_write_file_takes_an_empty_file_or_an_own_one(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.touch()
    with write_file(path) as partial:
        partial.write_text("one")
    with pytest.raises(UserError, match="was not made by this command"), write_file(path, option="-o"):
        pass
    with write_file(path, is_own=lambda path: path.read_text() == "one") as partial:
        partial.write_text("two")
    with pytest.raises(RuntimeError), write_file(tmp_path / "y"):
        raise RuntimeError
    assert os.listdir(tmp_path) == ["x"]
