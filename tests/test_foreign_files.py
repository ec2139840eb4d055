"""No user's file is lost: every command, beside folders full of foreign files, leaves each byte of them.

Trees are random: names that this program uses itself (meta.json, tables/, 00001-step-3/, report.html ...)
among others, links, read-only folders. Every option that names a place points at the tree, into it, above it,
or at a link to it. What the command prints does not matter here; what is there afterwards does.
"""

import itertools
import os
import random
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.command_server import run_program

ROOT = Path(__file__).parents[1]
NAMES = (
    "thesis.tex", "README", "state.json", "notes", "meta.json", "day_0_dense.npy", "day_0_sparse.npy",
    "day_0_labels.npy", "day_1_labels.npy", "day_0", "day_1", "train_dense.npy", "meta.json.partial",
    "day_0_dense.npy.partial", "part_00000.parquet", "config.json", "results.json", "metrics.jsonl",
    "plan.json", "log.txt", "env.txt", "gpu.txt", "report.html", "summary.json", "compare.html",
    "run.pftrace", "run-posix.pftrace", "checkpoint.json", "rank00000.safetensors", "store.json",
    "steps.csv", "files.csv",
    ".dlrm-io.json", ".dlrm-io.lock", ".dlrm-io-made-this.json", "places.u32", "piece_00000.spill",
    "lane_00000.json", "day_0_sparse_multi_hot.npz", "mlperf.log", "train.parquet", "cache.json",
)  # fmt: skip
FOLDERS = (
    "tables", "trace", "checkpoints", "store", "train", "val", "test", "prep.tmp", "shuffle.tmp", "sub",
    "plots", "00001-step-3", "00002-step-6", ".00003-step-9", ".bert4rec", "tensorboard", "results",
    "t_cat_0", ".dlrm-io-prep-0123456789abcdef", ".dlrm-io-checkpoint-0123456789abcdef",
)  # fmt: skip


def make_tree(folder: Path, chance: random.Random, depth: int = 3) -> None:
    """A user's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in chance.sample(NAMES, chance.randrange(1, 10)):
        path = folder / name
        if chance.random() < 0.1:
            path.symlink_to(chance.choice(("thesis.tex", "../elsewhere", "nowhere", "/etc/hostname")))
        else:
            size = chance.choice((0, 1, 20, 5000))
            path.write_bytes(chance.choice((b"{}", b"mine\n", b"\x93NUMPY", chance.randbytes(8))) * size)
    if depth:
        for name in chance.sample(FOLDERS, chance.randrange(4)):
            make_tree(folder / name, chance, depth - 1)
        if chance.random() < 0.2:
            (folder / "linked").symlink_to(folder / "sub")


def snapshot(folder: Path) -> dict[str, Any]:
    """Every file's bytes and every link's target. An empty file holds no bytes to lose."""
    found: dict[str, Any] = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                found[str(path)] = os.readlink(path)
            elif stat.S_ISREG(status.st_mode) and status.st_size:
                found[str(path)] = path.read_bytes()
            elif stat.S_ISDIR(status.st_mode):
                found[str(path)] = "folder"
    return found


class World:
    """A user's folder, and what the commands work on: small, made once, only read."""

    def __init__(self, base: Path, tsv: Path, npy: Path, run: Path, chance: random.Random) -> None:
        self.tree, self.tsv, self.npy, self.run, self.chance = base / "somebody", tsv, npy, run, chance
        self.base = base
        make_tree(self.tree, chance)
        (base / "elsewhere").write_text("precious")
        (base / "link").symlink_to(self.tree)

    def place(self) -> Path:
        """Somewhere in, at or around the tree."""
        folders = [Path(root) for root, _, _ in os.walk(self.tree)]
        kind = self.chance.randrange(6)
        if kind == 0:
            return self.tree
        if kind == 1:
            return self.base / "link"
        if kind == 2:
            return self.chance.choice(folders) / "new"
        if kind == 3:
            return self.base / "link" / self.chance.choice(FOLDERS)
        return self.chance.choice(folders)

    def file(self) -> Path:
        """A file's name, often one that is taken."""
        if self.chance.random() < 0.6:
            files = [path for path in self.tree.rglob("*") if not path.is_dir() or path.is_symlink()]
            return self.chance.choice(files) if files else self.place() / "x"
        return self.place() / self.chance.choice(NAMES)


def commands(world: World) -> list[tuple[str, str, list[Any]]]:
    """(what it is, the program, its words) of each."""
    place, file, chance = world.place, world.file, world.chance
    run_prep = ["run", "--input_dir", world.tsv, "--output_dir", place()]
    if chance.random() < 0.6:
        run_prep += ["--tmp_dir", place()]
    run_prep += chance.choice(
        ([], ["--format", "parquet"], ["--restart"], ["--keep_tmp"], ["--engine", "plain"])
    )
    # a short training that saves often; where it may write is somebody's
    training = [
        "--in_memory_binary_criteo_path", world.npy, "--preset", "toy", "--max_steps", 4, "--batch_size", 64,
        "--embedding_dim", 8, "--dense_arch_layer_sizes", "16,8", "--over_arch_layer_sizes", "8,1",
        "--timeout", 20, "--output_dir", place(),
    ]  # fmt: skip
    training += chance.choice((
        [], ["--checkpoint_every_steps", 1, "--keep_checkpoints", 1],
        ["--checkpoint_every_steps", 1, "--keep_checkpoints", 1, "--checkpoint_dir", place()],
        ["--store_type", "cached_ssd", "--persistent_path", place()],
        ["--trace"], ["--mllog"], ["--tensorboard"],
    ))  # fmt: skip
    bert = [
        "--preset",
        "toy",
        "--max_steps",
        2,
        "--output_dir",
        place(),
        "--cache_dir",
        place(),
        "--timeout",
        20,
    ]
    emulation = [
        "--from", world.run, "--ranks", 1, "--max_steps", 2, "--timeout", 20, "--output_dir", place(),
        *chance.choice((
            ["--in_memory_binary_criteo_path", place(), "--make_data", chance.choice(("sparse", "real"))],
            ["--checkpoint_every_steps", 1, "--keep_checkpoints", 1, "--checkpoint_dir", place()],
            ["--store_type", "cached_ssd", "--persistent_path", place()],
        )),
    ]  # fmt: skip
    replaying = [world.run, "--data_only", "--speed", "max", "--output_dir", place()]
    replaying += chance.choice(([], ["--root", place()], ["--root", place(), "--real_bytes"]))
    return [
        ("prep run", "dlrm.prep", run_prep),
        ("prep toy", "dlrm.prep", ["toy", place(), "--days", 2, "--rows", 30]),
        ("prep parse", "dlrm.prep", ["parse", "--input_dir", world.tsv, "--output_dir", place()]),
        ("prep contiguous", "dlrm.prep", ["contiguous", "--input_dir", world.npy, "--output_dir", place()]),
        ("prep shuffle", "dlrm.prep", [
            "shuffle", "--input_dir_labels_and_dense", world.npy, "--input_dir_sparse", world.npy,
            "--output_dir_shuffled", place(), "--tmp_dir", place(),
        ]),
        ("prep multihot", "dlrm.prep", [
            "multihot", "--input_dir", world.npy, "--output_dir", place(),
            "--multi_hot_sizes", ",".join(["2"] * 26), "--copy_labels_and_dense",
        ]),
        ("prep check", "dlrm.prep", ["check", place()]),
        ("train", "dlrm.train", training),
        ("bert4rec", "dlrm.bert4rec", bert),
        ("perfetto", "analysis", ["perfetto", world.run, "-o", file()]),
        ("perfetto there", "analysis", ["perfetto", place()]),
        ("report", "analysis", ["report", place()]),
        ("check", "analysis", ["check", place()]),
        ("compare", "analysis", ["compare", world.run, world.run, "-o", file()]),
        ("emulate", "dlrm.emulate", emulation),
        ("replay", "dlrm.replay", replaying),
        ("finish", "analysis", ["finish", place()]),
        ("export fio", "analysis", ["export", "fio", world.run, "-o", chance.choice((place, file))()]),
        ("export dlio", "analysis", ["export", "dlio", world.run, "-o", chance.choice((place, file))()]),
        ("report there", "analysis", ["report", world.run, "--parquet", "-o", place()]),
        ("list", "analysis", ["list", place()]),
        ("watch", "analysis", ["watch", "--once", place()]),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, Path]]:
    """Small text, a dataset and a traced run, made by the real commands."""
    base = tmp_path_factory.mktemp("given")
    tsv, npy, run = base / "tsv", base / "npy", base / "run"
    for module, words in (
        ("dlrm.prep", ["toy", tsv, "--days", "3", "--rows", "400"]),
        ("dlrm.prep", ["run", "--input_dir", tsv, "--output_dir", npy]),
        ("dlrm.train", [
            "--preset", "toy", "--in_memory_binary_criteo_path", npy, "--max_steps", "4",
            "--batch_size", "64", "--output_dir", run, "--trace",
        ]),
        ("analysis", ["report", run]),
    ):  # fmt: skip
        words = [sys.executable, "-m", module, *map(str, words)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    yield tsv, npy, run


def run_seed(base: Path, given: tuple[Path, Path, Path], seed: int) -> None:
    """Every command once, each on a tree of its own."""
    chance = random.Random(seed)
    for number in itertools.count():
        folder = base / f"{seed}-{number}"
        world = World(folder, *given, chance)
        every = commands(world)
        if number == len(every):
            break
        name, program, words = every[number]
        if chance.random() < 0.1:
            os.chmod(world.tree, 0o555)
        before, theirs = snapshot(folder), [snapshot(path) for path in given]
        found = run_program(program, *words, seconds=180)
        after = snapshot(folder)
        situation = f"seed {seed}, {name} {' '.join(map(str, words))}\n{found.err[-1500:]}"
        assert found.code >= 0, situation
        for path, content in before.items():
            assert path in after, f"{path} is gone after {situation}"
            assert after[path] == content, f"{path} was changed by {situation}"
        assert [snapshot(path) for path in given] == theirs, situation
        os.chmod(world.tree, 0o755)
        shutil.rmtree(folder)


def test_every_command_leaves_foreign_files(tmp_path: Path, given: tuple[Path, Path, Path]) -> None:
    run_seed(tmp_path, given, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, *range(100, 140)])
def test_every_command_leaves_foreign_files_of_many_kinds(
    tmp_path: Path, given: tuple[Path, Path, Path], seed: int
) -> None:
    run_seed(tmp_path, given, seed)
