"""Foreign files stay: in the run folder, among checkpoints, stores and caches; one writer each."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.ranks import LiveRanks, on_ranks, words
from test_checkpoint_files import make_whole_piece, save

from common.errors import UserError
from common.lock import FolderLock
from dlrm.checkpoint import folder
from dlrm.embeddings.ssd.row_file import RowFile
from dlrm.models.bert4rec import cache as prepared
from dlrm.trainer.run_folder import RunFolder

THEIRS = b'{"step": 3, "mine": "thesis"}\n'


def read_tree(root: Path) -> dict[str, bytes | str]:
    return {
        str(path.relative_to(root)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in root.rglob("*")
        if path.is_symlink() or path.is_file()
    }


@pytest.mark.parametrize(
    "name", ["config.json", "results.json", "metrics.jsonl", "plan.json", "tensorboard/x"]
)
def test_a_run_folder_with_a_foreign_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(THEIRS)
    before = read_tree(tmp_path)
    with pytest.raises(UserError, match="move it away") as refused:
        RunFolder(str(tmp_path), True, tensorboard=True)
    assert read_tree(tmp_path) == before and len(str(refused.value).splitlines()) == 1


def test_a_link_in_place_of_a_file(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_bytes(THEIRS)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to(theirs)
    with pytest.raises(UserError):
        RunFolder(str(tmp_path / "run"), True)
    assert theirs.read_bytes() == THEIRS


def write_reports(run: Path, steps: range, **known: Any) -> dict[str, Any]:
    records = RunFolder(str(run), True)
    records.resume_metrics(**known) if known else records.start_metrics()
    place: dict[str, Any] = {}
    for step in steps:
        records.log_metrics(step=step, epoch=0, loss=1.0, lr=0.1, samples_per_second=1.0, step_time=1.0)
        place = records.find_metrics_position()
    records.close()
    return place


def read_steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_steps_are_never_twice_in_metrics(tmp_path: Path) -> None:
    place = write_reports(tmp_path, range(1, 6))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # killed
    write_reports(tmp_path, range(1, 4))  # from the start again
    assert read_steps(tmp_path / "metrics.jsonl") == [1, 2, 3] and steps_before(tmp_path) == [1, 2, 3, 4, 5]
    shutil.rmtree(tmp_path)
    place = write_reports(tmp_path, range(1, 6))
    write_reports(tmp_path, range(6, 9), step=5, size=place["metrics_bytes"], checksum=place["metrics_crc32"])
    write_reports(tmp_path, range(6, 8), step=5, size=place["metrics_bytes"], checksum=place["metrics_crc32"])
    assert read_steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5, 6, 7]
    write_reports(tmp_path, range(4, 6), step=3, size=7, checksum=1)  # of another folder
    assert read_steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5]


def steps_before(run: Path) -> list[int]:
    lines = (run / "metrics-1.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def test_checkpoints_beside_foreign_files(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "rank00000.safetensors").write_bytes(THEIRS)
    root = tmp_path / "checkpoints"
    for name in ("00001-step-3", ".00002-step-9", ".dlrm-io-checkpoint-0123456789abcdef", "notes"):
        (root / name).mkdir(parents=True)
        for file in ("checkpoint.json", "rank00000.safetensors", "notes"):
            (root / name / file).write_bytes(THEIRS)
    (root / "00003-step-5").symlink_to(elsewhere)
    before = read_tree(tmp_path)
    made = [save(root, [make_whole_piece("t", torch.ones(3))], step, keep=1) for step in range(10, 13)]
    assert [path.exists() for path in made] == [False, False, True]
    copy = root / "00099-step-99"
    shutil.copytree(made[-1], copy)  # a copy is the user's
    with_notes = save(root, [make_whole_piece("t", torch.ones(3))], 100, keep=1)
    (with_notes / "notes").write_bytes(THEIRS)
    save(root, [make_whole_piece("t", torch.ones(3))], 101, keep=1)
    after = read_tree(tmp_path)
    assert {name: after.get(name) for name in before} == before
    assert copy.exists() and (with_notes / "notes").exists() and folder.read_description(with_notes)


def make_row_file(root: Path) -> RowFile:
    return RowFile(root, "t_cat_0", 100, 4, 0, "sgd", 0)


@pytest.mark.parametrize("name", ["t_cat_0.rows", "t_cat_0.json", "t_cat_0.json.partial"])
def test_a_store_beside_foreign_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(THEIRS)
    if name.endswith("partial"):
        make_row_file(tmp_path).close()
    else:
        with pytest.raises(UserError, match="persistent_path"):
            make_row_file(tmp_path)
    assert (tmp_path / name).read_bytes() == THEIRS


ARRAYS = {
    "items": np.array([1, 2, 3, 1, 2, 3], np.int32), "starts": np.array([0, 3, 6]),
    "negatives": np.array([[3], [2]], np.int32),
}  # fmt: skip


def test_a_cache_whose_place_is_taken(tmp_path: Path) -> None:
    cache = tmp_path / "markov-1"
    cache.mkdir()
    (cache / "prepared.json").write_bytes(THEIRS)
    before = read_tree(tmp_path)
    with pytest.raises(UserError, match="--cache_dir"):
        prepared.save_prepared(cache, ARRAYS, {"items": 3})
    assert read_tree(tmp_path) == before
    prepared.save_prepared(tmp_path / "markov-2", ARRAYS, {"items": 3})
    prepared.save_prepared(tmp_path / "markov-2", ARRAYS, {"items": 3})
    found = prepared.load_prepared(tmp_path / "markov-2", {})
    assert found is not None and all(np.array_equal(found[0][name], each) for name, each in ARRAYS.items())


# --- one writer


def _try_to_lock(place: str, gate: Any, results: Any) -> None:
    gate.wait()
    try:
        with FolderLock(place, "training into it"):
            results.put("held")
            gate.wait()  # until both have tried
    except UserError as error:
        results.put(str(error))
        gate.wait()


def start_pairs(count: int, root: Path) -> None:
    fork = multiprocessing.get_context("fork")
    for _ in range(count):
        gate, results = fork.Barrier(2), fork.Queue()
        both = [fork.Process(target=_try_to_lock, args=(str(root), gate, results)) for _ in range(2)]
        for each in both:
            each.start()
        output = sorted(results.get(timeout=180) for _ in both)
        for each in both:
            each.join(60)
        assert output.count("held") == 1, output
        other = next(text for text in output if text != "held")
        assert "in use" in other and str(root) in other, other
        assert not os.listdir(root)


def test_pairs_of_writers(tmp_path: Path) -> None:
    start_pairs(10, tmp_path)


@pytest.mark.slow
def test_many_pairs_of_writers(tmp_path: Path) -> None:
    start_pairs(200, tmp_path)


@pytest.mark.mpi
def test_a_second_training_in_the_same_folder(toy: Path, tmp_path: Path) -> None:
    with LiveRanks(tmp_path, 2, *words(toy, "--epochs", 200)) as first:
        first.until_step(1)
        second = on_ranks(tmp_path, 2, "dlrm.train", *words(toy))
        assert second.codes == [2, 2], second.err
        lines = [line for output in second.err for line in output.splitlines()]
        assert len(lines) == 1 and "in use since" in lines[0] and "training into it" in lines[0], lines
        for process in first.processes:
            process.send_signal(signal.SIGTERM)
        assert first.wait() == [75, 75], first.stderr
