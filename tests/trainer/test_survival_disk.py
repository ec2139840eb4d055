"""Bad disks: full ones, failing reads and writes, files that shrink. One line; good checkpoints stay."""

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.disk import mount_small_disk
from support.ranks import LiveRanks, words

from dlrm.checkpoint.blocks import read_blocks
from dlrm.checkpoint.folder import list_checkpoints, read_description

# Fails the calls of one kind on files whose path matches FAULT_PATH, after the first FAULT_AFTER of them.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fnmatch.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static atomic_int seen;
static int fails(const char *call, int fd) {
    const char *path = getenv("FAULT_PATH"), *which = getenv("FAULT_CALL");
    char link[64], name[4096];
    if (!path || !which || strcmp(which, call)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, name, sizeof name - 1);
    if (n < 0) return 0;
    name[n] = 0;
    if (fnmatch(path, name, 0) || atomic_fetch_add(&seen, 1) < atoi(getenv("FAULT_AFTER"))) return 0;
    errno = atoi(getenv("FAULT_ERRNO"));
    return 1;
}
#define REAL(type, name, ...) ((type (*)(__VA_ARGS__)) dlsym(RTLD_NEXT, name))
ssize_t read(int fd, void *to, size_t n) {
    return fails("read", fd) ? -1 : REAL(ssize_t, "read", int, void *, size_t)(fd, to, n);
}
ssize_t write(int fd, const void *from, size_t n) {
    return fails("write", fd) ? -1 : REAL(ssize_t, "write", int, const void *, size_t)(fd, from, n);
}
int fsync(int fd) { return fails("fsync", fd) ? -1 : REAL(int, "fsync", int)(fd); }
"""


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("gcc"):
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", "-o", folder / "shim.so", folder / "shim.c", "-ldl"], check=True
    )
    return folder / "shim.so"


def make_fault(shim: Path, call: str, path: str, number: int, after: int) -> dict[str, Any]:
    return {
        "LD_PRELOAD": str(shim), "FAULT_CALL": call, "FAULT_PATH": f"*{path}*", "FAULT_ERRNO": str(number),
        "FAULT_AFTER": str(after),
    }  # fmt: skip


def is_whole(path: Path) -> bool:
    found = read_description(path)
    for name, facts in found.files.items():
        for _ in read_blocks(path / name, facts, 0, facts["bytes"], found.reader):
            pass
    found.reader.close()
    return True


@pytest.mark.mpi
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_read_error_names_file_and_rank(toy: Path, tmp_path: Path, shim: Path, number: int) -> None:
    more = ["--read_chunk_mb", 0.01, "--checkpoint_every_steps", 5]
    with LiveRanks(
        tmp_path, 2, *words(toy, *more), **make_fault(shim, "read", "day_3_sparse", number, 3)
    ) as ranks:
        codes = ranks.wait()
    assert 0 not in codes, codes
    assert str(toy / "day_3_sparse.npy") in ranks.stderr and os.strerror(number) in ranks.stderr, ranks.stderr
    assert "Traceback" not in ranks.stderr
    assert is_whole(list_checkpoints(tmp_path / "checkpoints")[0])


@pytest.mark.mpi
def test_a_mapped_file_that_shrinks(toy: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(toy, data)
    more = ["--mmap_mode", "--epochs", 100, "--checkpoint_every_steps", 40]
    with LiveRanks(tmp_path / "run", 2, *words(data, *more)) as ranks:
        ranks.until_step(60)
        victim = data / "day_2_dense.npy"
        os.truncate(victim, victim.stat().st_size // 2)
        codes = ranks.wait()
    assert codes == [2, 2], (codes, ranks.stderr)
    assert str(victim) in ranks.stderr and "Traceback" not in ranks.stderr, ranks.stderr
    assert is_whole(list_checkpoints(tmp_path / "run" / "checkpoints")[0])


@pytest.mark.mpi
@pytest.mark.parametrize(("call", "number"), [("write", errno.ENOSPC), ("fsync", errno.EIO)])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    toy: Path, tmp_path: Path, shim: Path, call: str, number: int
) -> None:
    """Training continues: its progress is worth more than a checkpoint."""
    more = ["--max_steps", 20, "--checkpoint_every_steps", 6, "--keep_checkpoints", 1]
    with LiveRanks(
        tmp_path, 2, *words(toy, *more), **make_fault(shim, call, "step-12-*/rank00001", number, 0)
    ) as ranks:
        assert ranks.wait() == [0, 0], ranks.stderr
    assert "checkpoint not written, the one before it is kept" in ranks.stderr
    assert "rank 1: " in ranks.stderr and f"rank00001.safetensors: {os.strerror(number)}" in ranks.stderr
    left = os.listdir(tmp_path / "checkpoints")
    assert len(left) == 1 and is_whole(tmp_path / "checkpoints" / left[0])


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Its parameter: megabytes."""
    with mount_small_disk(tmp_path / "small disk", request.param) as folder:
        yield folder


@pytest.mark.mpi
@pytest.mark.parametrize("small_disk", [1], indirect=True)
def test_a_last_checkpoint_that_is_not_written_is_exit_code_1(toy: Path, small_disk: Path) -> None:
    run = small_disk / "run"
    with LiveRanks(run, 2, *words(toy, "--max_steps", 7, "--checkpoint_every_steps", 3)) as ranks:
        assert ranks.wait() == [1, 1], ranks.stderr
    last = ranks.stderr.strip().splitlines()[-1]
    assert "checkpoint of step 7 was not written" in last and "No space left" in last, ranks.stderr
    assert (run / "results.json").exists() and "Traceback" not in ranks.stderr
    assert not list_checkpoints(run / "checkpoints")


@pytest.mark.mpi
@pytest.mark.parametrize("small_disk", [3], indirect=True)
def test_a_disk_that_fills_up_with_the_run_folder(toy: Path, small_disk: Path) -> None:
    """Metrics, traces and checkpoints share it."""
    run = small_disk / "run"
    more = ["--trace", "--epochs", 3, "--checkpoint_every_steps", 10, "--keep_checkpoints", 0]
    with LiveRanks(run, 2, *words(toy, *more)) as ranks:
        ranks.until_step(5)
        filler = os.open(small_disk / "filler", os.O_WRONLY | os.O_CREAT)
        with contextlib.suppress(OSError):
            while True:
                os.write(filler, bytes(4096))
        os.close(filler)
        codes = ranks.wait(90)
    assert "No space left on device" in ranks.stderr or "checkpoint not written" in ranks.stderr, ranks.stderr
    assert all(code in (0, 1) for code in codes), (codes, ranks.stderr)
    assert all(is_whole(path) for path in list_checkpoints(run / "checkpoints"))
