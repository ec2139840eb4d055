"""A project that this user cannot write and a read-only home: what its owner has set up works."""

import subprocess
from pathlib import Path

import pytest
from support.job_scripts import clean_environment

from common.numba_cache import use_private_cache

ROOT = Path(__file__).parents[2]
SMALL = "--limit_train_batches 2 --limit_val_batches 1 --limit_test_batches 1 --report_every 1"
# A mount namespace of its own: project and home read-only, and no data of an earlier demo.
ENTER = """
set -e
mount --make-rprivate /
mount --bind "$PROJECT" "$PROJECT"
[[ ! -d $PROJECT/data ]] || mount -t tmpfs -o ro none "$PROJECT/data"
mount -o remount,bind,ro "$PROJECT"
mount --bind "$HOME" "$HOME"
mount -o remount,bind,ro "$HOME"
cd "$START"
exec "$@"
"""


def can_unshare() -> bool:
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", "mount --make-rprivate / && mount -t tmpfs none /mnt"],
        capture_output=True,
    )
    return done.returncode == 0


pytestmark = pytest.mark.skipif(not can_unshare(), reason="no mount namespaces for this user here")


@pytest.fixture
def start(tmp_path: Path):  # noqa: ANN201
    (tmp_path / "home").mkdir()

    def run(*words: object, **more: object) -> "subprocess.Popen[str]":
        names = {"PROJECT": ROOT, "START": tmp_path, "HOME": tmp_path / "home"} | more
        use_private_cache()  # the real home's: where compiled loops go is not this test's subject
        return subprocess.Popen(
            ["unshare", "-m", "bash", "-c", ENTER, "bash", *map(str, words)], stdin=subprocess.DEVNULL,
            env=clean_environment(**names),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return run


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def test_the_setup_has_nothing_to_do(start) -> None:  # noqa: ANN001
    code, out, err = finish(start(ROOT / "0_setup_env.sh"))
    assert code == 0 and "nothing to do" in out and not err


def test_another_setup_is_refused_in_one_line(start, tmp_path: Path) -> None:  # noqa: ANN001
    code, _, err = finish(start(ROOT / "0_setup_env.sh", DLRM_VENV=tmp_path / "venv"))
    assert code == 2 and err.count("\n") == 1 and f"{ROOT} cannot be written" in err


def test_runs_without_a_place_name_the_variable(start, toy: Path) -> None:  # noqa: ANN001
    code, _, err = finish(start(ROOT / "3_train.sh", DATASET_DIR=toy))
    assert code == 2 and err.count("\n") == 1 and "RESULTS=FOLDER" in err


@pytest.mark.mpi
def test_two_demos_at_once_share_their_data(start, tmp_path: Path) -> None:  # noqa: ANN001
    """Started in the same second: each has a run folder, and the data are made once, beside them."""
    results = tmp_path / "results"
    both = [start(ROOT / "3_train.sh", RESULTS=results, ARGS=SMALL, TRACE="no", NPROC=1) for _ in range(2)]
    ends = [finish(process) for process in both]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert sum("another demo is making the toy data" in out for _, out, _ in ends) <= 1
    assert sum("1_split_dataset.sh: done" in out for _, out, _ in ends) == 1
    runs = sorted(path for path in results.iterdir() if path.name != "data")
    assert len(runs) == 2 and all((run / "results.json").exists() for run in runs)
    assert sorted(path.name for path in (results / "data").iterdir()) == ["toy", "toy.lock"]


def test_data_beside_the_results(start, tmp_path: Path, toy: Path) -> None:  # noqa: ANN001
    code, out, err = finish(start(
        ROOT / "3_train.sh", RESULTS=tmp_path / "it's \\ \"here\"", DATASET_DIR=toy, NPROC=1, ARGS=SMALL
    ))  # fmt: skip
    assert code == 0 and not err and "not all of that was done" not in out, out + err
    [run] = (tmp_path / 'it\'s \\ "here"').iterdir()
    assert (run / "report.html").exists()
