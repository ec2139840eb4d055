"""torch.profiler on some steps: which ones, what is written when they are not all reached, and where not."""

import gzip
import json
import re
from pathlib import Path

import pytest
from support.ranks import python

from common.errors import UserError
from dlrm.runtime.ranks import Ranks
from dlrm.runtime.step_profiler import StepProfiler, parse_steps


def profile_steps(folder: Path, steps: tuple[int, int], until: int) -> None:
    import torch

    profiler = StepProfiler(folder, Ranks(), steps)
    for step in range(1, until + 1):
        with profiler.during_step(step):
            torch.mm(torch.ones(8, 8), torch.ones(8, 8))
    profiler.close()


def list_marks(folder: Path) -> dict[str, list[str]]:
    """File (without the pid) -> the steps' marks that it has."""
    found = {}
    for path in (folder / "profile").iterdir():
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        marks = [each["name"] for each in events if str(each.get("name")).startswith("ProfilerStep#")]
        assert sum(each.get("name") == "aten::mm" for each in events) == len(marks)
        found[re.sub(r"-\d+\.json", ".json", path.name)] = marks
    return found


@pytest.mark.parametrize("until, marked", [(9, [3, 4, 5]), (5, [3, 4, 5]), (4, [3, 4]), (2, [])])
def test_steps_that_are_profiled(tmp_path: Path, until: int, marked: list[int]) -> None:
    (tmp_path / "profile").mkdir()
    profile_steps(tmp_path, (3, 5), until)
    marks = [f"ProfilerStep#{step}" for step in marked]
    expected = {f"rank00000-steps3-{marked[-1]}.json.gz": marks} if marked else {}
    assert list_marks(tmp_path) == expected  # and nothing else is left in the folder


def test_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The training goes on, with one line."""
    (tmp_path / "profile").write_text("mine")
    profile_steps(tmp_path, (1, 1), 2)
    assert (tmp_path / "profile").read_text() == "mine"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("dlrm: the profile was not written: ")


def test_ranges() -> None:
    assert parse_steps("10-15") == (10, 15) and parse_steps("7") == (7, 7)
    for wrong in ("", "0-3", "5-3", "a", "1-", "1-2-3", "-1", "1-101", "1e3", "9" * 30, "1-2\n"):
        with pytest.raises(UserError, match="--profile_steps") as caught:
            parse_steps(wrong)
        assert "\n" not in str(caught.value)


def test_mistakes_and_what_is_imported(tmp_path: Path) -> None:
    for module, given in (
        ("dlrm.train", ["--profile_steps", "3-x", "--output_dir", tmp_path / "run"]),
        ("dlrm.bert4rec", ["--profile_steps", "3-5"]),
        ("dlrm.traced", ["--profile_steps", "0", "script.py"]),
    ):
        done = python("-m", module, *given)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done
        assert "--profile_steps" in done.stderr
    assert list(tmp_path.iterdir()) == []
    listed = (
        "import sys, dlrm.trainer.trainer, dlrm.traced.__main__; "
        "print('dlrm.runtime.step_profiler' in sys.modules)"
    )
    assert python("-c", listed).stdout == "False\n"
