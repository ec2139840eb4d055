"""The command line of `python -m dlrm.prep`: help, wrong options, renamed ones, the last line."""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.ranks import ROOT, python

from dlrm.prep.__main__ import make_parser
from dlrm.prep.tools.toy import write_days

COMMANDS = make_parser()[1]


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("it's a day")
    write_days(folder, 2, 600, 0)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command: str) -> None:
    actions = COMMANDS[command]._actions
    assert [action.dest for action in actions if not action.help] == []
    assert command in make_parser()[0].format_help()


@pytest.mark.parametrize("command", ["run", "multihot", "parse", "check"])
def test_a_wrong_option_names_its_command(command: str) -> None:
    needed: list[object] = []
    for action in COMMANDS[command]._actions:
        if action.required:
            needed += [*action.option_strings[:1], "1," * 25 + "1"]
    done = python("-m", "dlrm.prep", command, *needed, "--no_such_option", "7")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == (
        "dlrm.prep: unrecognized arguments: --no_such_option 7 "
        f"(python -m dlrm.prep {command} --help lists the options)\n"
    )


def test_the_old_name_of_an_option(days: Path, tmp_path: Path) -> None:
    words = ["-m", "dlrm.prep", "run", "--input_dir", days]
    old = python(*words, "--output_dir", tmp_path / "old", "--giant", 100)
    assert old.returncode == 0
    warning = "dlrm.prep: --giant is now --bitmap_entries; this release accepts both"
    assert old.stderr.splitlines().count(warning) == 1
    assert argparse.SUPPRESS in [action.help for action in COMMANDS["run"]._actions]  # not in --help
    again = python(*words, "--output_dir", tmp_path / "old", "--bitmap_entries", 200)
    assert "nothing to do" in again.stdout  # and the output is the same


@pytest.mark.parametrize("engine", ["numba", "plain"])
def test_the_last_line_is_the_next_command(days: Path, tmp_path: Path, engine: str) -> None:
    """It comes after the last step, and bash takes it as it stands."""
    out = tmp_path / "it's \\ \t made"
    words = ["-m", "dlrm.prep", "run", "--input_dir", days, "--output_dir", out, "--engine", engine]
    done = python(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    if engine == "numba":
        both = subprocess.run(
            [sys.executable, *map(str, words), "--restart"], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
        ).stdout.splitlines()  # fmt: skip
        assert "step 8 of 8 publish" in both[-2] and "; next: DATASET_DIR=" in both[-1]
    command = done.stdout.partition("; next: ")[2].rstrip("\n")
    shown = subprocess.run(
        ["bash", "-c", command.replace("./3_train.sh", "printenv DATASET_DIR")],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert shown.stdout == f"{out}\n"


def test_the_next_command_from_another_folder(days: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dlrm.prep", "run", "--input_dir", days, "--output_dir", "out"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    script = shlex.quote(f"{ROOT}/3_train.sh")
    assert done.stdout.endswith(f"; next: DATASET_DIR={tmp_path}/out {script}\n"), done
