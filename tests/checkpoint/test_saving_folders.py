"""Where a training saves, in every arrangement: no foreign file is lost, nothing is left behind.

Trainings are real, short, and run in forks of a server process.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.command_server import run_program

from common.lock import FolderLock
from common.owned import LEDGER, MARK
from dlrm.checkpoint.folder import list_checkpoints

TRAIN = [
    "--max_steps", "4", "--batch_size", "16", "--embedding_dim", "8", "--num_embeddings", "50",
    "--dense_arch_layer_sizes", "16,8", "--over_arch_layer_sizes", "8,1", "--limit_train_batches", "4",
    "--learning_rate", "0.1", "--timeout", "30", "--report_every", "1",
]  # fmt: skip
SAVING = ["--checkpoint_every_steps", "1", "--keep_checkpoints", "1"]
BERT = ["--dataset_name", "random", "--max_steps", "2", "--emb_dim", "8", "--max_len", "8", "--timeout", "30"]
THEIRS = ("thesis.tex", "notes/README", "00001-step-3/notes", "t_cat_0.old", ".hidden", "config.json.bak")


def put_theirs(folder: Path) -> None:
    for name in THEIRS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"precious {name}")


def read_tree(root: Path) -> dict[str, Any]:
    """Every file's bytes, every link's target, every folder."""
    found: dict[str, Any] = {}
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = path.read_bytes() if path.is_file() else "folder"
    return found


def check_theirs(before: dict[str, Any], root: Path) -> None:
    after = read_tree(root)
    lost = {name for name, content in before.items() if after.get(name) != content}
    assert not lost, lost


# name -> where each option points, below one folder that is full of foreign files
PLACES: dict[str, dict[str, str]] = {
    "all in one": {"output_dir": ".", "checkpoint_dir": ".", "persistent_path": "."},
    "inside": {"output_dir": ".", "checkpoint_dir": "notes", "persistent_path": "notes"},
    "above": {"output_dir": "notes/run", "checkpoint_dir": "notes", "persistent_path": "."},
    "beside": {"output_dir": "a", "checkpoint_dir": "b", "persistent_path": "c"},
    "in its own": {"output_dir": ".", "checkpoint_dir": "checkpoints", "persistent_path": "store"},
    "crossed": {"output_dir": ".", "checkpoint_dir": "store", "persistent_path": "checkpoints"},
    "a checkpoint's name": {"output_dir": ".", "checkpoint_dir": "00001-step-3"},
    "linked": {"output_dir": "link", "checkpoint_dir": "link", "persistent_path": "link/notes"},
    "linked inside": {"output_dir": "run", "checkpoint_dir": "link/notes", "persistent_path": "link"},
    "dangling": {"output_dir": "dangling"},
    "read only": {"output_dir": "closed"},
    "checkpoints read only": {"output_dir": "run", "checkpoint_dir": "closed"},
    "store read only": {"output_dir": "run", "persistent_path": "closed"},
    "a file": {"output_dir": "thesis.tex"},
    "checkpoints in a file": {"output_dir": "run", "checkpoint_dir": "thesis.tex"},
    "store in a file": {"output_dir": "run", "persistent_path": "thesis.tex"},
}


@pytest.mark.parametrize("arrangement", PLACES)
def test_folders_of_a_training(tmp_path: Path, arrangement: str) -> None:
    """Twice: the second run finds what the first one has left."""
    base = tmp_path / "base"
    put_theirs(base)
    (tmp_path / "elsewhere").mkdir()
    put_theirs(tmp_path / "elsewhere")
    (base / "link").symlink_to(tmp_path / "elsewhere")
    (base / "dangling").symlink_to("nowhere")
    (base / "closed").mkdir()
    put_theirs(base / "closed")
    (base / "closed").chmod(0o555)
    before = read_tree(tmp_path)
    words = [word for name, place in PLACES[arrangement].items() for word in (f"--{name}", base / place)]
    if "persistent_path" in PLACES[arrangement]:
        words += ["--store_type", "cached_ssd", "--cache_memory_budget_mb", "1"]
    for _ in range(2):
        found = run_program("dlrm.train", *TRAIN, *SAVING, *words)
        assert found.code in (0, 1, 2), (found.code, found.err)
        assert "Traceback" not in found.err and (found.code == 0 or found.err.strip()), found.err
        check_theirs(before, tmp_path)
    if arrangement in ("all in one", "inside", "beside", "in its own", "linked"):
        assert found.code == 0, found.err


@pytest.mark.parametrize("place", ["base", "base/notes", "base/link", "base/run/cache", "base/thesis.tex"])
def test_the_cache_of_bert4rec(tmp_path: Path, place: str) -> None:
    base = tmp_path / "base"
    put_theirs(base)
    put_theirs(tmp_path / "elsewhere")
    (base / "link").symlink_to(tmp_path / "elsewhere")
    before = read_tree(tmp_path)
    for _ in range(2):
        folders = ["--output_dir", base / "run", "--cache_dir", tmp_path / place]
        found = run_program("dlrm.bert4rec", *BERT, *folders)
        assert found.code == (2 if place.endswith("tex") else 0), found.err
        check_theirs(before, tmp_path)


def test_a_refused_run_leaves_nothing(tmp_path: Path) -> None:
    """Neither a trace nor a folder for it, whoever has the run folder."""
    run = tmp_path / "run"
    assert run_program("dlrm.train", *TRAIN, "--output_dir", run).code == 0
    before = read_tree(run)
    with FolderLock(run, "training into it"):
        found = run_program("dlrm.train", *TRAIN, "--trace", "--output_dir", run)
        assert found.code == 2 and "in use since" in found.err, found.err
        assert len(found.err.strip().splitlines()) == 1
    assert read_tree(run) == before
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text("{}")
    found = run_program("dlrm.train", *TRAIN, "--trace", "--output_dir", theirs)
    assert found.code == 2 and "config.json" in found.err, found.err
    assert read_tree(theirs) == {"config.json": b"{}"}


def test_another_run_s_trace_stays_where_a_run_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_program("dlrm.train", *TRAIN, "--trace", "--output_dir", run).code == 0
    before = read_tree(run)
    assert any(name.endswith(".pfw.gz") for name in before)
    with FolderLock(run, "training into it"):
        assert run_program("dlrm.train", *TRAIN, "--trace", "--output_dir", run).code == 2
    assert read_tree(run) == before


def make_old(run: Path) -> None:
    """As the version before wrote it, or a copy: without lists and marks."""
    (run / LEDGER).unlink()
    for path in list_checkpoints(run / "checkpoints"):
        (path / MARK).unlink()


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    rows = ["--limit_train_batches", "9"]  # of random data: also how many rows there are
    assert run_program("dlrm.train", *TRAIN, *rows, *SAVING, "--output_dir", run, "--mllog").code == 0
    make_old(run)
    put_theirs(run)
    old = {path.name for path in list_checkpoints(run / "checkpoints")}
    theirs = {name: content for name, content in read_tree(run).items() if name in THEIRS}
    more = [*TRAIN, *rows, "--max_steps", "6", *SAVING, "--mllog"]
    found = run_program("dlrm.train", *more, "--output_dir", run)
    assert found.code == 0, found.err
    assert "a run of an earlier version or a copy" in found.err and len(found.err.splitlines()) == 1, (
        found.err
    )
    check_theirs(theirs, run)
    assert old <= {path.name for path in list_checkpoints(run / "checkpoints")}  # without a mark they stay
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert json.loads((run / "results.json").read_text())["steps"] == 6
    found = run_program("dlrm.train", *more, "--output_dir", run)
    assert found.code == 0 and not found.err, found.err


@pytest.mark.parametrize("killed", [False, True])
def test_a_copy_with_its_list_goes_on(tmp_path: Path, killed: bool) -> None:
    """As cp -r makes it: with other times and inodes than the list has."""
    run, copy = tmp_path / "run", tmp_path / "copy"
    rows = ["--limit_train_batches", "9", "--max_steps"]
    assert run_program("dlrm.train", *TRAIN, *rows, "3", *SAVING, "--output_dir", run).code == 0
    if killed:  # the list still says what it said while the file grew
        listed = json.loads((run / LEDGER).read_text())
        del listed["files"]["metrics.jsonl"]
        listed["growing"]["metrics.jsonl"] = os.stat(run / "metrics.jsonl").st_ino
        (run / LEDGER).write_text(json.dumps(listed))
    shutil.copytree(run, copy, copy_function=shutil.copyfile)
    before = read_tree(run)
    for warnings in (1, 0):
        found = run_program("dlrm.train", *TRAIN, *rows, "6", *SAVING, "--output_dir", copy)
        assert found.code == 0 and len(found.err.splitlines()) == warnings, found.err
        assert "a run of an earlier version or a copy" in found.err or not warnings
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert read_tree(run) == before


def test_what_was_edited_in_a_copy_stays(tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    assert run_program("dlrm.train", *TRAIN, "--output_dir", run).code == 0
    shutil.copytree(run, copy, copy_function=shutil.copyfile)
    with open(copy / "results.json", "a") as file:
        file.write(" ")  # still what this program could have written
    before = {name: content for name, content in read_tree(copy).items() if name != LEDGER}
    found = run_program("dlrm.train", *TRAIN, "--output_dir", copy)
    assert found.code == 2 and "results.json" in found.err and "move it away" in found.err, found.err
    check_theirs(before, copy)


@pytest.mark.parametrize("name", ["metrics.jsonl", "results.json", "plan.json", "config.json"])
def test_what_is_not_recognised_in_it_stays(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    assert run_program("dlrm.train", *TRAIN, "--output_dir", run).code == 0
    (run / LEDGER).unlink()
    (run / name).write_text('{"step": 3, "mine": "thesis"}\n')
    before = read_tree(run)
    found = run_program("dlrm.train", *TRAIN, "--output_dir", run)
    assert found.code == 2 and "move it away" in found.err, found.err
    check_theirs(before, run)


def test_a_copy_with_links_is_not_followed(tmp_path: Path) -> None:
    run, theirs = tmp_path / "run", tmp_path / "theirs.jsonl"
    assert run_program("dlrm.train", *TRAIN, "--output_dir", run).code == 0
    (run / LEDGER).unlink()
    shutil.move(run / "metrics.jsonl", theirs)
    (run / "metrics.jsonl").symlink_to(theirs)
    before = read_tree(tmp_path)
    assert run_program("dlrm.train", *TRAIN, "--output_dir", run).code == 2
    check_theirs(before, tmp_path)
