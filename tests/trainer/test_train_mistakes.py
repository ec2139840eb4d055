"""Bad input and bad options: one line from one rank, every rank ends with code 2, soon."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.command_server import run_program
from support.made_traces import Made

from dlrm.runtime.errors import UserError

Spoil = Callable[[Path], object]


def edit_array(path: Path, change: Callable[[np.ndarray], np.ndarray | None]) -> None:
    array = np.load(path)
    changed = change(array)
    np.save(path, array if changed is None else changed)


def put_at(row: int, column: int, value: float) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array[row, column] = value

    return change


def cut_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


FOLDERS: dict[str, tuple[Spoil, list[str]]] = {
    "a day is missing": (lambda f: (f / "day_2_sparse.npy").unlink(), ["day_2_sparse.npy"]),
    "a file was cut": (lambda f: cut_file(f / "day_1_dense.npy"), ["day_1_dense.npy"]),
    "shapes disagree": (
        lambda f: edit_array(f / "day_3_labels.npy", lambda a: a[:-5]),
        ["day_3_labels.npy", "3000", "2995"],
    ),
    "a column is missing": (
        lambda f: edit_array(f / "day_0_dense.npy", lambda a: a[:, :12]),
        ["day_0_dense.npy"],
    ),
    "NaN": (lambda f: edit_array(f / "day_0_dense.npy", put_at(200, 4, np.nan)), ["day_0_dense.npy", "nan"]),
    "an id too large": (
        lambda f: edit_array(f / "day_0_sparse.npy", put_at(77, 5, 10**6)),
        ["day_0_sparse.npy", "cat_5", "1000000"],
    ),
    "a label of 7": (
        lambda f: edit_array(f / "day_0_labels.npy", put_at(9, 0, 7)),
        ["day_0_labels.npy", "7"],
    ),
    "no files": (lambda f: [path.unlink() for path in f.glob("*")], ["run"]),
}  # fmt: skip


def test_a_trace_in_a_folder_whose_name_is_not_utf8(tmp_path: Path) -> None:
    """DFTracer takes no such name; without a trace it is a name like any other."""
    odd = os.fsdecode(os.fsencode(tmp_path / "run") + b"\xff")
    for program, words in (
        ("dlrm.train", ["--preset", "toy", "--source", "random", "--trace"]),
        ("dlrm.replay", [write_run(tmp_path)]),
    ):
        done = run_program(program, *words, "--output_dir", odd)
        assert done.code == 2 and done.err.count("\n") == 1 and "is not UTF-8" in done.err, done.err
        assert not os.path.exists(odd)


def write_run(folder: Path) -> Path:
    made = Made(None)
    made.posix("pread64", 0, 5, "/d/a", ret=10, count=10, offset=0)
    made.write(folder / "made")
    return folder / "made"


def only_line(err: list[str]) -> str:
    """The one line that one rank says; the others may at most say that they end."""
    lines = [line for text in err for line in text.splitlines() if "ends because rank" not in line]
    assert len(lines) == 1, err
    assert lines[0].startswith("dlrm: ") and "Traceback" not in lines[0]
    return lines[0]


@pytest.mark.parametrize("what", FOLDERS)
def test_bad_data_is_named(what: str, toy: Path, tmp_path: Path, train_here: Any) -> None:
    spoil, words = FOLDERS[what]
    folder = tmp_path / "run"
    shutil.copytree(toy, folder)
    spoil(folder)
    with pytest.raises(UserError) as message:
        train_here("--preset", "toy", "--in_memory_binary_criteo_path", folder)
    assert "\n" not in str(message.value)
    for word in words:
        assert word in str(message.value)


@pytest.mark.parametrize("what", ["a day is missing", "NaN", "an id too large"])
def test_bad_data_ends_all_ranks(what: str, toy: Path, tmp_path: Path, train: Any) -> None:
    spoil, words = FOLDERS[what]
    folder = tmp_path / "data"
    shutil.copytree(toy, folder)
    spoil(folder)
    done = train(2, "--preset", "toy", "--in_memory_binary_criteo_path", folder, timeout=180)
    assert done.codes == [2, 2] and done.seconds < 60, done
    output = only_line(done.err)
    for word in words:
        assert word in output, output


OPTIONS: dict[str, tuple[list[str], list[str]]] = {
    "unknown flag": (["--bogus", "1"], ["--bogus"]),
    "a plan that does not fit": (
        ["--num_embeddings", "2000000000", "--interaction_type", "dcn", "--embedding_dim", "128"],
        ["no sharding plan", "ranks", "--store_type cached_ssd"],
    ),
    "an infinite loss": (
        ["--num_embeddings", "9", "--learning_rate", "1e30", "--limit_train_batches", "40"],
        ["--learning_rate", "loss"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", OPTIONS)
def test_bad_options_end_all_ranks(what: str, train: Any) -> None:
    words, said_words = OPTIONS[what]
    done = train(2, *words, timeout=180)
    assert done.codes == [2, 2], done
    output = only_line(done.err)
    for word in said_words:
        assert word in output, output


ALONE: dict[str, list[str]] = {
    "/nowhere/at/all": ["--in_memory_binary_criteo_path", "/nowhere/at/all"],
    "/nowhere.json": ["--sharding_file", "/nowhere.json"],
    "--num_embeddings_per_feature": ["--num_embeddings_per_feature", "1,0,3"],
    "--embedding_dim": ["--embedding_dim", "32", "--num_embeddings", "9"],
    "--multi_hot_sizes": ["--multi_hot_sizes", "1,2", "--num_embeddings", "9"],
    "--amp": ["--amp", "int8"],
    "--grad_clip": ["--grad_clip", "0"],
}


@pytest.mark.parametrize("word", ALONE)
def test_a_bad_option_is_named(word: str, train_here: Any) -> None:
    with pytest.raises(UserError, match=word):
        train_here(*ALONE[word])


def test_bad_data_late_in_the_training_ends_all_ranks(toy: Path, tmp_path: Path, train: Any) -> None:
    """One of three ranks reads it and prints why, another that it ends, all exit with the same code."""
    folder = tmp_path / "data"
    shutil.copytree(toy, folder)
    edit_array(folder / "day_1_dense.npy", put_at(2500, 4, np.nan))
    done = train(3, "--preset", "toy", "--in_memory_binary_criteo_path", folder, timeout=180)
    assert done.codes == [2, 2, 2], done
    assert "day_1_dense.npy, row 2500: nan" in only_line(done.err)
    assert sum("ends because rank" in text for text in done.err) == 1, done.err


def test_another_dataset_than_named(toy: Path, train_here: Any) -> None:
    with pytest.raises(UserError, match="--dataset_name criteo_kaggle: .* has 6 days, Kaggle's set has 7"):
        train_here("--dataset_name", "criteo_kaggle", "--in_memory_binary_criteo_path", toy)


def test_too_few_rows(toy: Path, train_here: Any) -> None:
    words = ["--preset", "toy", "--in_memory_binary_criteo_path", toy, "--batch_size", 20000]
    with pytest.raises(UserError, match="--batch_size"):
        train_here(*words, "--drop_last_training_batch")
    assert train_here(*words).results["steps"] == 1


def test_an_id_is_folded_when_sizes_are_given(toy: Path, tmp_path: Path, train_here: Any) -> None:
    """As MLCommons' loader: an id beyond a table asked for by its size is taken modulo that size."""
    folder = tmp_path / "data"
    shutil.copytree(toy, folder)
    edit_array(folder / "day_0_sparse.npy", put_at(77, 5, 10**6))
    meta = json.loads((folder / "meta.json").read_text())
    sizes = ",".join(map(str, meta["table_sizes"]))
    words = ["--preset", "toy", "--in_memory_binary_criteo_path", folder, "--max_steps", 2]
    done = train_here(*words, "--num_embeddings_per_feature", sizes)
    assert done.results["steps"] == 2
