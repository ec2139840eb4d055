"""Compiled code is kept where only its user can write, and nowhere else."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def cache_folder(**environment: str) -> Path:
    """The folder that a process of this environment would use."""
    kept = {k: v for k, v in os.environ.items() if k not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    code = "import analysis, os; print(os.environ['NUMBA_CACHE_DIR'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=kept | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def test_the_cache_is_the_users_alone(tmp_path: Path) -> None:
    found = cache_folder(HOME=str(tmp_path))
    assert found == tmp_path / ".cache/dlrm-io/numba"
    assert found.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_can_write_to_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "dlrm-io/numba"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert cache_folder(XDG_CACHE_HOME=str(tmp_path), TMPDIR=str(tmp_path)) != folder


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "dlrm-io").mkdir()
    (tmp_path / "dlrm-io/numba").symlink_to(tmp_path / "elsewhere")
    found = cache_folder(XDG_CACHE_HOME=str(tmp_path), TMPDIR=str(tmp_path))
    assert found.parent == tmp_path and found.stat().st_mode & 0o777 == 0o700


def test_without_a_home_a_private_temporary_folder_serves(tmp_path: Path) -> None:
    found = cache_folder(HOME="/proc/nothing", TMPDIR=str(tmp_path))
    assert found.parent == tmp_path and found.stat().st_mode & 0o777 == 0o700


def test_a_value_of_the_users_stays(tmp_path: Path) -> None:
    assert cache_folder(NUMBA_CACHE_DIR=str(tmp_path / "mine")) == tmp_path / "mine"
