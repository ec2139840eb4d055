"""The counts of ids: in the run folder, and never over a foreign file."""

from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from dlrm.models.dlrm.dataloaders import IdFrequencies

SIZES = [3] * 26
NAMES = ("stats_pre_hash_0_uniform.npz", "stats_post_hash_0_uniform.npz")


def count(folder: Path, times: int) -> None:
    made = IdFrequencies(SIZES, str(folder), "0_uniform")
    for each in (*made.before, *made.after):
        each[1] = times
    made.save()


def test_a_later_run_replaces_its_own(tmp_path: Path) -> None:
    for times in (3, 4):
        count(tmp_path / "run", times)
        for name in NAMES:
            with np.load(tmp_path / "run" / name) as found:
                assert [found[str(feature)].tolist() for feature in range(26)] == [[0, times, 0]] * 26
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["text", "npz", "link", "folder"])
def test_a_foreign_file_is_refused_at_the_start(tmp_path: Path, name: str, kind: str) -> None:
    path, theirs = tmp_path / name, tmp_path / "theirs"
    count(tmp_path / "other", 1)
    if kind == "text":
        path.write_text("my own counts")
    elif kind == "npz":
        np.savez(path, **{str(feature): np.zeros(3, np.int64) for feature in range(26)})  # type: ignore[arg-type]
    elif kind == "link":
        theirs.write_bytes((tmp_path / "other" / name).read_bytes())
        path.symlink_to(theirs)
    else:
        path.mkdir()
    before = {each: each.read_bytes() for each in (path, theirs) if each.is_file()}
    with pytest.raises(UserError, match=name) as refused:
        IdFrequencies(SIZES, str(tmp_path), "0_uniform")
    assert "move it away" in str(refused.value)
    assert all(each.read_bytes() == content for each, content in before.items())


def test_a_file_that_came_meanwhile_stays(tmp_path: Path) -> None:
    made = IdFrequencies(SIZES, str(tmp_path), "0_uniform")
    (tmp_path / NAMES[0]).write_text("precious")
    with pytest.raises(UserError, match="remove it or name another"):
        made.save()
    assert (tmp_path / NAMES[0]).read_text() == "precious"
