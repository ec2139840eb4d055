"""Foreign files beside every analysis command: not one byte of them changes, and one line says why."""

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.made_traces import Made
from support.reports import ROOT, a_run, analysis

Make = Callable[[Path], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has been written to yet; its name becomes the name of its trace."""
    return a_run(tmp_path_factory.mktemp("outputs") / "run")


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def snapshot(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            found[str(path)] = os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            found[str(path)] = path.read_bytes()
        else:
            found[str(path)] = stat.S_IFMT(status.st_mode)
    return found


def refused(folder: Path, *words: object) -> str:
    """Exit code 2 and one line; all is as before, and nothing new is there."""
    before = snapshot(folder)
    out, errors = analysis(*words, code=2)
    assert errors.startswith("analysis: ") and errors.count("\n") == 1 and not out
    assert snapshot(folder) == before
    return errors


def write_foreign(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("somebody's own\n")


def write_nearly_ours(path: Path) -> None:
    """As if an own page had been edited: what was written into it is not to be lost."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("<!doctype html>my notes\n<!-- made by python -m analysis report; sha256 of all before "
                    f"this line: {'0' * 64} -->\n")  # fmt: skip


def make_folder(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "thesis").write_text("precious")


def make_link(path: Path) -> None:
    """A foreign file is at its end."""
    target = path.parent.parent / "elsewhere"
    target.write_text("precious")
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target)


def make_dangling_link(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.symlink_to("nowhere")


def make_fifo(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)


KINDS = (write_foreign, write_nearly_ours, make_folder, make_link, make_dangling_link, make_fifo)
PLACES = (
    ("report", "report.html"), ("report", "summary.json"), ("report", "tables/steps.csv"),
    ("perfetto", "run.pftrace"), ("perfetto --posix", "run-posix.pftrace"),
    ("perfetto --format json", "run.json"), ("compare", "compare.html"),
)  # fmt: skip


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize(("command", "name"), PLACES)
def test_foreign_file_in_a_run_folder(run: Path, command: str, name: str, make: Make) -> None:
    make(run / name)
    words = [*command.split(), run, *([run] if command == "compare" else [])]
    assert name.split("/")[-1] in refused(run.parent, *words)


@pytest.mark.parametrize("make", [make_link, write_foreign, make_fifo, make_dangling_link])
def test_foreign_tables_folder(run: Path, make: Make) -> None:
    make(run / "tables")
    assert "tables" in refused(run.parent, "report", run)


def test_link_to_a_foreign_folder_as_tables(run: Path, tmp_path: Path) -> None:
    make_folder(tmp_path / "theirs")
    (run / "tables").symlink_to(tmp_path / "theirs")
    refused(tmp_path, "report", run)


def test_other_files_stay(run: Path) -> None:
    make_folder(run / "tables" / "sub")
    write_foreign(run / "tables" / "mine.csv")
    write_foreign(run / "report.html.part")
    write_foreign(run / "other.pftrace")
    before = snapshot(run)
    for words in (
        ("report", run),
        ("report", run),
        ("perfetto", run),
        ("perfetto", run),
        ("compare", run, run),
    ):
        analysis(*words)
    after = snapshot(run)
    assert before.items() <= after.items()
    assert not [path for path in after if ".partial" in path or ".dlrm-io-analysis" in path]


@pytest.mark.parametrize("command", ["perfetto", "perfetto --format json", "report", "compare"])
@pytest.mark.parametrize("make", [*KINDS, lambda path: None])
def test_o_names_a_file(run: Path, tmp_path: Path, command: str, make: Make) -> None:
    path = tmp_path / "sub" / "x"
    path.parent.mkdir()
    make(path)
    words = [*command.split(), run, *([run] if command == "compare" else []), "-o", path]
    if not os.path.lexists(path):
        analysis(*words)
        analysis(*words)  # over its own
        other = "perfetto" if command != "perfetto" else "report"
        assert str(path) in refused(tmp_path, other, run, "-o", path)  # not over another command's
    elif command == "report" and path.is_dir():
        before = snapshot(path)
        analysis(*words)
        assert before.items() <= snapshot(path).items() and (path / "report.html").exists()
    else:
        assert str(path) in refused(tmp_path, *words)


def test_devices_stay(run: Path) -> None:
    for command in (["perfetto", run], ["report", run], ["compare", run, run]):
        analysis(*command, "-o", "/dev/null", code=2)
    assert stat.S_ISCHR(os.lstat("/dev/null").st_mode)


def test_a_changed_file_of_ours_stays(run: Path) -> None:
    analysis("report", run)
    for name in ("report.html", "summary.json", "tables/steps.csv"):
        path, text = run / name, (run / name).read_text()
        path.write_text(text + "my notes\n")
        assert name in refused(run, "report", run)
        path.unlink()
        analysis("report", run)


def test_a_folder_of_an_earlier_version_and_a_copy_go_on(run: Path) -> None:
    """Without the list, or with other times than it has, own files are known by their content."""
    analysis("report", run)
    analysis("perfetto", run)
    for change in ("unlisted", "copied"):
        for path in run.rglob("*"):
            os.utime(path, (1, 1))
        if change == "unlisted":
            (run / ".dlrm-io.json").unlink()
            page = (run / "report.html").read_text()
            (run / "report.html").write_text(page[: page.rindex("<!-- made by")])
            numbers = json.loads((run / "summary.json").read_text())
            earlier = ("run", "ranks", "hosts", "events", "calls", "headline", "findings", "notes")
            numbers = {key: numbers[key] for key in earlier}
            (run / "summary.json").write_text(json.dumps(numbers, indent=1) + "\n")
        analysis("report", run)
        analysis("perfetto", run)


def test_tables_of_an_earlier_report_go(run: Path) -> None:
    analysis("report", run)
    (run / "tables" / "mine.csv").write_text("a\n")
    steps = (run / "tables" / "steps.csv").exists()
    for path in (run / "trace").iterdir():
        path.unlink()
    other = a_run(run.parent / "other")
    for path in (other / "trace").iterdir():
        path.rename(run / "trace" / path.name)
    for path in (run / "trace").iterdir():
        path.unlink()
    made = Made(0, 1, role="prep")
    made.span("prep", "scan", 0, 50_000, bytes=1_000_000)
    made.write(run)
    analysis("report", run)
    assert steps and not (run / "tables" / "steps.csv").exists() and (run / "tables" / "mine.csv").exists()


def test_two_at_once(run: Path) -> None:
    command = [sys.executable, "-m", "analysis", "report", str(run)]
    both = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in "ab"
    ]
    assert [process.communicate(timeout=120)[1] for process in both] == [b"", b""]
    assert [process.returncode for process in both] == [0, 0]
    analysis("report", run)  # the list knows what lies there
    assert not list(run.glob(".dlrm-io-analysis*"))


ODD_NAMES = ['it\'s "quoted"', "new\nline", "back\\slash", "=1+1", "<!--<script>", "-o"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_of_runs(run: Path, name: str) -> None:
    odd = run.rename(run.with_name(name))
    for command in ("report", "perfetto"):
        _, errors = analysis(command, odd)
        assert errors == ""
    analysis("compare", odd, odd)
    page = (odd / "report.html").read_text()
    assert page.count("<script") == page.count("</script>") and "<!--<" not in page


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_of_runs_in_the_other_commands(run: Path, name: str) -> None:
    odd = run.rename(run.with_name(name))
    for words in (["summary"], ["perfetto", "--posix"]):
        _, errors = analysis(*words, odd)
        assert errors == ""


def test_a_name_that_is_not_utf8(run: Path) -> None:
    odd = os.fsencode(run.with_name("bad")) + b"\xff"
    os.rename(run, odd)
    for command in ("report", "summary", "perfetto"):
        analysis(command, os.fsdecode(odd))
    assert os.path.exists(odd + b"/report.html")


@pytest.mark.parametrize("command", ["report", "summary", "perfetto", "check", "view"])
def test_what_is_no_run(tmp_path: Path, command: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("fifo", "file", "link", "loop", "missing\nname", "/dev/null"):
        _, errors = analysis(command, tmp_path / name, code=2)
        assert errors.count("\n") == 1 and name.split("\n")[0] in errors


def test_who_reads_has_seen_enough(run: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m analysis summary {run}"
    for unbuffered in ("", "1"):
        asked = {"shell": True, "cwd": ROOT, "env": os.environ | {"PYTHONUNBUFFERED": unbuffered}}
        done = subprocess.run(f"{command} | true", capture_output=True, text=True, timeout=180, **asked)
        assert done.returncode == 0 and done.stderr == ""
        done = subprocess.run(f"{command} > /dev/full", capture_output=True, text=True, timeout=180, **asked)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
