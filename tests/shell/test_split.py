"""1_split_dataset.sh: the same lines in order, cut where asked, published whole or not at all."""

import gzip
import os
import stat
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "1_split_dataset.sh"
PARTS = 24


def split(*words: object, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *map(str, words)], env=os.environ | more, capture_output=True, text=True, timeout=180
    )


def lines(count: int) -> bytes:
    return b"".join(b"%d\tabc\n" % i for i in range(count))


def parts(folder: Path) -> list[bytes]:
    count = sum(path.name.startswith("day_") for path in folder.iterdir())
    return [(folder / f"day_{i}").read_bytes() for i in range(count)]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "räw data"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("count", "each", "made"), [(240, 10, 24), (1000, 10, 24), (95, 10, 10), (7, 10, 1)])
def test_the_lines_in_order(raw: Path, packed: bool, count: int, each: int, made: int) -> None:
    data = lines(count)
    if packed:
        (raw / "day_0.gz").write_bytes(gzip.compress(data))
    else:
        (raw / "day_0").write_bytes(data)
    out = raw.parent / "new folder" / "split"
    done = split(raw, out, each)
    assert done.returncode == 0, done.stderr
    got = parts(out)
    assert len(got) == made and b"".join(got) == lines(min(count, PARTS * each))
    assert all(part.count(b"\n") == each for part in got[:-1])
    assert ("dropped" in done.stdout) == (count > PARTS * each)
    assert [path.name for path in out.parent.iterdir()] == ["split"]  # nothing half-made beside it
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask()


def umask() -> int:
    old = os.umask(0)
    os.umask(old)
    return old


def test_again_is_no_work_and_nothing_else_is_overwritten(raw: Path) -> None:
    (raw / "day_0").write_bytes(lines(100))
    out = raw.parent / "split"
    assert split(raw, out, 10).returncode == 0
    inode = (out / "day_0").stat().st_ino
    again = split(raw, out, 10)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert (out / "day_0").stat().st_ino == inode
    other = split(raw, out, 20)
    assert other.returncode == 2 and "something else" in other.stderr
    (raw / "day_0").write_bytes(lines(101))
    assert split(raw, out, 10).returncode == 2
    assert (out / "day_0").stat().st_ino == inode


def test_a_damaged_file_publishes_nothing(raw: Path) -> None:
    packed = gzip.compress(os.urandom(100_000) + b"\n" + lines(1000))
    (raw / "day_0.gz").write_bytes(packed[: len(packed) // 2])
    done = split(raw, raw.parent / "split", 10_000)
    assert done.returncode == 2 and "damaged" in done.stderr
    assert [path.name for path in raw.parent.iterdir()] == [raw.name]


def test_too_few_parts(raw: Path) -> None:
    (raw / "day_0").write_bytes(lines(2000))
    done = split(raw, raw.parent / "one")
    assert f"only 1 of 24 parts: {raw}/day_0 has 2000 lines" in done.stdout
    assert "for 24 parts give SPLIT_LINE=84" in done.stdout
    done = split(raw, raw.parent / "all", 84)
    assert len(parts(raw.parent / "all")) == 24 and "only" not in done.stdout


def test_the_umask_of_site_sh(raw: Path, tmp_path: Path) -> None:
    (raw / "day_0").write_bytes(lines(10))
    site = tmp_path / "site.sh"
    site.write_text("export DLRM_UMASK=027\n")
    out = raw.parent / "split"
    done = split(raw, out, 5, DLRM_SITE=str(site))
    assert done.returncode == 0, done.stderr
    assert stat.S_IMODE(out.stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o640}


def test_which_file(raw: Path) -> None:
    out = raw.parent / "split"
    (raw / "day_7").write_bytes(lines(10))
    assert split(raw, out / "one", 5).returncode == 0  # the only one
    (raw / "day_8").write_bytes(lines(10))
    done = split(raw, out / "two", 5)
    assert done.returncode == 2 and "no day_0" in done.stderr
    (raw / "day_0").write_bytes(lines(3))
    assert split(raw, out / "three", 5).returncode == 0
    assert parts(out / "three") == [lines(3)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "wanted DATASET_DIR SPLIT_DIR"),
        (["raw"], "wanted DATASET_DIR SPLIT_DIR"),
        (["missing", "out"], "missing is not a folder"),
        (["raw", "out"], "holds no day_0"),
        (["raw", "out", "0"], "SPLIT_LINE=0"),
        (["raw", "out", "many"], "SPLIT_LINE=many"),
        (["empty", "out"], "is empty"),
    ],
)
def test_mistakes(tmp_path: Path, words: list[str], says: str) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "day_0").touch()
    done = split(*[tmp_path / word for word in words[:2]], *words[2:])
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_help() -> None:
    done = split("--help")
    assert done.returncode == 0 and "usage: ./1_split_dataset.sh" in done.stdout
