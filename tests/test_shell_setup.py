"""0_setup_env.sh: no work when there is none, a clear end when it cannot, and what env.sh says."""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DROP = ("DLRM_", "PYTHON", "VIRTUAL_ENV")


def setup(root: Path, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(DROP)}
    return subprocess.run(
        [str(root / "0_setup_env.sh"), *words], env=kept | more, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The project at a path with a space and an umlaut, without its environment."""
    root = tmp_path / "ä copy"
    root.mkdir()
    shutil.copy(ROOT / "0_setup_env.sh", root)
    for folder in ("patches", "requirements"):
        shutil.copytree(ROOT / folder, root / folder)
    return root


def test_nothing_to_do_takes_no_time() -> None:
    assert setup(ROOT, "--dev").returncode == 0
    begun = time.monotonic()
    done = setup(ROOT, "--dev")
    assert done.returncode == 0 and "nothing to do" in done.stdout and time.monotonic() - begun < 5


def test_one_setup_at_a_time() -> None:
    with open(ROOT / ".cache" / "setup.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = subprocess.Popen([ROOT / "0_setup_env.sh"], stdout=subprocess.PIPE, text=True)
        assert waiting.stdout and "another setup is running" in waiting.stdout.readline()
        time.sleep(0.2)
        assert waiting.poll() is None
    assert waiting.wait(60) == 0


def test_env_sh_can_be_sourced_twice_from_anywhere() -> None:
    show = 'source "$0" && source "$0" && python -c "import dlrm, sys; print(sys.prefix)" && echo "$PATH"'
    done = subprocess.run(
        ["bash", "-euc", show, str(ROOT / "env.sh")], cwd="/", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    prefix, path = done.stdout.splitlines()
    assert path.split(":").count(f"{prefix}/bin") == 1


@pytest.mark.parametrize(
    ("words", "more", "says"),
    [
        (["--fast"], {}, "unknown option --fast"),
        ([], {"DLRM_VARIANT": "tpu"}, "DLRM_VARIANT=tpu: wanted cpu or cuda"),
        ([], {"PYTHON": "/no/python"}, "PYTHON=/no/python is not a Python 3.10 to 3.13"),
    ],
)
def test_mistakes(copy: Path, words: list[str], more: dict[str, str], says: str) -> None:
    done = setup(copy, *words, **more)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (copy / ".venv").exists() and not (copy / "env.sh").exists()


def test_a_python_that_cannot_make_environments(copy: Path, tmp_path: Path) -> None:
    """Debian's without python3-venv; as root apt-get is asked once, and here it has nothing."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python").write_text('#!/bin/bash\n[[ $2 != v* ]] || exit 1\nexec python3 "$@"\n')
    (tools / "apt-get").write_text('#!/bin/bash\necho "apt-get $*"\nexit 1\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    done = setup(copy, PYTHON=str(tools / "python"), PATH=f"{tools}:{os.environ['PATH']}", DLRM_VARIANT="cpu")
    assert done.returncode == 2 and "apt-get install python3-venv" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert ("apt-get -q update" in done.stdout) == (os.geteuid() == 0)


def test_a_package_that_cannot_be_had(copy: Path) -> None:
    (copy / "requirements/cpu.txt").write_text("dlrm-io-no-such-package==1\n")
    (copy / "requirements/base.txt").write_text("")
    done = setup(copy, DLRM_VARIANT="cpu", PIP_NO_INDEX="1")
    assert done.returncode == 1 and "dlrm-io-no-such-package" in done.stderr
    assert "failed; the reason is above" in done.stderr.splitlines()[-1]
    assert not (copy / "env.sh").exists() and not list((copy / ".venv").glob("dlrm-io.stamp*"))


@pytest.mark.parametrize(
    "words",
    ["analysis summary x", "dlrm.train", "dlrm.bert4rec", "dlrm.bench --batch_sizes 1", "dlrm.prep check x"],
)
def test_a_shell_that_has_not_read_env_sh(words: str) -> None:
    """One line that says so, not where the import failed. -S: Python without its packages."""
    command = [sys.executable, "-S", "-m", *words.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "source ./env.sh first" in done.stderr


def test_help_of_the_tests_makes_no_environment(copy: Path) -> None:
    (copy / "tests").mkdir()
    script = shutil.copy(ROOT / "tests" / "run.sh", copy / "tests")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=10)
    assert done.returncode == 0 and "usage: tests/run.sh" in done.stdout and not (copy / ".venv").exists()
