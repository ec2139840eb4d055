"""0_setup_env.sh: no work when there is none, a clear end when it cannot, and what env.sh says."""

import fcntl
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
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
    for folder in ("patches", "requirements", "sites"):
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
        ["bash", "-euc", show, str(ROOT / "env.sh")], cwd="/", capture_output=True, text=True, timeout=180
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
        ([], {"DLRM_MPI": "mpich"}, "DLRM_MPI=mpich: wanted site or pypi"),
        ([], {"DLRM_HASHES": "0"}, "DLRM_HASHES=0: wanted yes or no"),
        ([], {"DLRM_ENV": "docker"}, "DLRM_ENV=docker: wanted venv or conda"),
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
    (copy / "requirements/build.txt").write_text("dlrm-io-no-such-package==1\n")
    done = setup(copy, DLRM_VARIANT="cpu", PIP_NO_INDEX="1", DLRM_HASHES="no")
    assert done.returncode == 1 and "dlrm-io-no-such-package" in done.stderr
    assert "DLRM_HASHES=no: packages are installed WITHOUT" in done.stderr
    assert "failed; the reason is above" in done.stderr.splitlines()[-1]
    assert not (copy / "env.sh").exists() and not list((copy / ".venv").glob("dlrm-io.stamp*"))


def choices(venv: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in (venv / "dlrm-io.choices").read_text().splitlines())


def test_choices_outlive_setups_that_were_interrupted(copy: Path) -> None:
    """A login node has no GPU: what was chosen there with care must not be guessed anew."""
    more = {"PIP_NO_INDEX": "1"}  # the setup ends at its first package
    assert setup(copy, DLRM_VARIANT="cuda", DLRM_MPI="pypi", **more).returncode == 1
    made = choices(copy / ".venv")
    assert made["was_variant"] == "cuda" and made["was_mpi"] == "pypi" and made["was_hashes"] == "yes"
    for _ in range(2):
        done = setup(copy, **more)
        assert done.returncode == 1 and "making" not in done.stdout
        assert choices(copy / ".venv") == made
    (copy / ".venv" / "of the old variant").symlink_to("x")
    (copy / ".venv" / "of the old variant").rename(copy / ".venv" / "lib" / "old")
    assert setup(copy, DLRM_VARIANT="cpu", DLRM_HASHES="no", **more).returncode == 1
    assert choices(copy / ".venv") == made | {"was_variant": "cpu", "was_hashes": "no"}
    assert not os.path.lexists(copy / ".venv" / "lib" / "old") and not list(copy.glob(".venv.*"))


def test_mpich_over_pbs_only_where_mpich_was_installed(copy: Path) -> None:
    """Of the choice pypi nothing is left when the site's mpiexec is chosen."""
    functions = (ROOT / "0_setup_env.sh").read_text().replace('\nmain "$@"\n', "\n")
    (copy / "functions.sh").write_text(functions)
    print_env = "source ./functions.sh; load_site; venv=$PWD/v kind=venv line=x; mkdir -p v/bin; print_env"
    for chosen in ("touch v/bin/dlrm-rsh", "rm v/bin/dlrm-rsh"):
        words = ["bash", "-c", f"mkdir -p v/bin; {chosen}; {print_env}"]
        done = subprocess.run(words, cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0 and "DLRM_MPIEXEC=" in done.stdout, done.stderr
        assert ("HYDRA_LAUNCHER_EXEC" in done.stdout) == chosen.startswith("touch")


@pytest.fixture
def conda(tmp_path: Path) -> dict[str, str]:
    """PATH with a stand-in for conda, which makes environments as `conda create` is asked to, or says why.

    The real one needs a channel, which most machines that run the tests cannot reach.
    """
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "conda").write_text(
        """#!/bin/bash
if [[ -n ${NO_CHANNEL:-} ]]; then
    printf '%s\\n' '' 'CondaHTTPError: CONNECTION FAILED for url <x>' 'more words'
    exit 1
fi
[[ "$1 $2 $3 $4 ${6%=*} $7" == "create -y -q -p python pip" ]] || exit 3
python3 -m venv "$5" && mkdir -p "$5/conda-meta" "$5/ssl"
"""
    )
    (tools / "conda").chmod(0o755)
    # not the environment of the tests: an environment within another has its Python, not its packages
    return {"PATH": f"{tools}:{os.path.dirname(os.path.realpath(sys.executable))}:/usr/bin:/bin"}


def test_conda_is_taken_where_it_is_and_remembered(copy: Path, conda: dict[str, str]) -> None:
    more = {"PIP_NO_INDEX": "1", "DLRM_VARIANT": "cpu"}  # the setup ends at its first package
    done = setup(copy, **more, **conda)
    assert done.returncode == 1 and "a conda environment, cpu variant" in done.stdout, done.stderr
    assert "DLRM_ENV=venv makes it without conda" in done.stdout
    assert (copy / ".venv" / "conda-meta").is_dir() and choices(copy / ".venv")["was_kind"] == "conda"
    done = setup(copy, PIP_NO_INDEX="1", **conda)
    assert done.returncode == 1 and "making" not in done.stdout
    assert choices(copy / ".venv")["was_kind"] == "conda"
    done = setup(copy, DLRM_ENV="venv", **more, **conda)
    assert (
        "a virtual environment, cpu variant" in done.stdout and not (copy / ".venv" / "conda-meta").exists()
    )
    done = setup(copy, **more, **conda)
    assert "making" not in done.stdout and choices(copy / ".venv")["was_kind"] == "venv"


def test_a_conda_that_cannot_make_environments(copy: Path, conda: dict[str, str]) -> None:
    """Asked for, it ends the setup; chosen by the setup, venv takes its place."""
    more = {"PIP_NO_INDEX": "1", "DLRM_VARIANT": "cpu", "NO_CHANNEL": "1"}
    done = setup(copy, DLRM_ENV="conda", **more, **conda)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "DLRM_ENV=conda: " in done.stderr and "CondaHTTPError: CONNECTION FAILED" in done.stderr
    assert "DLRM_ENV=venv" in done.stderr and not (copy / "env.sh").exists()
    shutil.rmtree(copy / ".venv")
    done = setup(copy, **more, **conda)
    assert "DLRM_ENV=venv is taken instead" in done.stdout and "a virtual environment" in done.stdout
    assert choices(copy / ".venv")["was_kind"] == "venv"


def test_no_conda_at_all(copy: Path) -> None:
    done = setup(copy, DLRM_ENV="conda", DLRM_VARIANT="cpu")
    assert done.returncode == 2 and "no conda, mamba or micromamba is here" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_polaris_puts_venv_on_top_of_its_conda() -> None:
    code = "source sites/generic.sh; source sites/polaris.sh; site_environment"
    done = subprocess.run(["bash", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "venv\n"), done.stderr


def test_a_wrong_hash_is_refused(copy: Path) -> None:
    """A package of the right name and version that is another file than the one that was locked."""
    wheel = copy / "wheels" / "setuptools-84.2.1-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as file:
        info = "setuptools-84.2.1.dist-info"
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: setuptools\nVersion: 84.2.1\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    done = setup(copy, PIP_NO_INDEX="1", PIP_FIND_LINKS=wheel.parent.as_uri(), DLRM_VARIANT="cpu")
    assert done.returncode == 1 and "DO NOT MATCH THE HASHES" in done.stderr
    assert "DLRM_HASHES=no" in done.stderr.splitlines()[-1]


def test_pins_without_their_hashes_are_refused(copy: Path) -> None:
    with open(copy / "requirements/base.txt", "a") as file:
        file.write("some-package==1\n")
    done = setup(copy, DLRM_VARIANT="cpu")
    assert done.returncode == 2 and "python requirements/lock.py base" in done.stdout


def test_every_pin_has_its_hashes() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "requirements" / "lock.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    for path in (ROOT / "requirements" / "locked").iterdir():
        assert "://" not in path.read_text(), f"{path}: an address of an index"


def foreign(folder: Path) -> None:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "mine").write_text("x")
    (folder / "thesis.txt").write_text("x")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["files", "venv", "marked", "link", "file", "inside"])
def test_only_an_environment_of_this_setup_is_used_or_removed(copy: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "mine"
    venv = folder
    if kind != "file":
        foreign(folder)
    if kind == "file":
        folder.write_text("x")
    elif kind == "venv":
        (folder / "pyvenv.cfg").write_text("")
    elif kind == "marked":  # an own environment that somebody has put files into
        (folder / "pyvenv.cfg").write_text("")
        (folder / "dlrm-io.made").write_text("")
        (folder / "dlrm-io.choices").write_text("was_variant=cuda\n")
    elif kind == "link":
        venv = tmp_path / "link"
        venv.symlink_to(folder)
    elif kind == "inside":
        venv = folder / "bin" / "mine" / "venv"
    before = files(tmp_path)
    done = setup(copy, DLRM_VENV=str(venv), DLRM_VARIANT="cpu", PIP_NO_INDEX="1")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert str(venv.resolve()) in done.stderr
    after = files(tmp_path)
    assert {name: after.get(name) for name in before} == before


def test_an_environment_behind_a_link_is_made_anew_there(copy: Path, tmp_path: Path) -> None:
    """As where the home folder is small and .venv is a link to scratch."""
    (tmp_path / "scratch").mkdir()
    (copy / ".venv").symlink_to(tmp_path / "scratch" / "venv")
    assert setup(copy, DLRM_VARIANT="cpu", PIP_NO_INDEX="1").returncode == 1
    assert choices(tmp_path / "scratch" / "venv")["was_variant"] == "cpu"
    assert setup(copy, DLRM_VARIANT="cuda", PIP_NO_INDEX="1").returncode == 1
    assert choices(tmp_path / "scratch" / "venv")["was_variant"] == "cuda"
    assert (copy / ".venv").is_symlink() and os.listdir(tmp_path / "scratch") == ["venv"]


@pytest.mark.parametrize(
    "words",
    ["analysis summary x", "dlrm.train", "dlrm.bert4rec", "dlrm.bench --batch_sizes 1", "dlrm.prep check x"],
)
def test_a_shell_that_has_not_read_env_sh(words: str) -> None:
    """One line that says so, not where the import failed. -S: Python without its packages."""
    command = [sys.executable, "-S", "-m", *words.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "source ./env.sh first" in done.stderr


def test_help_of_the_tests_makes_no_environment(copy: Path) -> None:
    (copy / "tests").mkdir()
    script = shutil.copy(ROOT / "tests" / "run.sh", copy / "tests")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "usage: tests/run.sh" in done.stdout and not (copy / ".venv").exists()


FUNCTIONS = (
    "site_is_here", "site_variant", "site_environment", "site_load_modules", "site_mpiexec", "site_print_env",
)  # fmt: skip


@pytest.mark.parametrize("path", sorted(ROOT.glob("sites/*.sh")), ids=lambda path: path.stem)
def test_a_site_is_one_file_of_known_functions(path: Path) -> None:
    """What a site's file leaves out is as everywhere; what it defines are the functions that are called."""
    code = 'set -euo pipefail; source sites/generic.sh; source "$0"; declare -F; site_print_env'
    done = subprocess.run(["bash", "-c", code, path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    defined = {line.split()[-1] for line in done.stdout.splitlines() if line.startswith("declare -f site_")}
    assert defined == set(FUNCTIONS)


def test_only_polaris_has_polaris_settings() -> None:
    code = "source sites/generic.sh; site_print_env; site_mpiexec; source sites/polaris.sh; ! site_is_here"
    done = subprocess.run(["bash", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
