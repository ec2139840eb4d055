"""`list`: a row for each run folder, its state by evidence, and what makes it differ from the others."""

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
from support.analysis_command import run_command, run_hostile
from support.lock_holder import hold_lock

ROOT = Path(__file__).parents[3]


def make_run(folder: Path, batch: int, optimizer: str = "sgd", results: bool = True, log: str = "") -> Path:
    """A run folder's small files, as the trainer leaves them."""
    folder.mkdir(parents=True)
    config = {
        "data": {"batch_size": batch, "dataset_name": "criteo_1t"}, "model": {"embedding_dim": 16},
        "optim": {"learning_rate": 0.1, "optimizer": optimizer}, "run": {"epochs": 1, "seed": batch},
        "launch": {"model": "DLRM", "world_size": 4, "nodes": 1, "device": "cpu"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    row = {"step": 40, "epoch": 0, "loss": 0.5, "lr": 0.1, "samples_per_second": 10.0 * batch, "time": 1.7e9}
    score = {"step": 40, "epoch": 1, "split": "val", "auroc": 0.75, "time": 1.7e9}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(score) + "\n")
    (folder / "log.txt").write_text(log)
    if results:
        ended = {
            "steps": 50, "samples_per_second": 12.0 * batch, "evaluations": {"test": {"auroc": batch / 1000}},
        }  # fmt: skip
        (folder / "results.json").write_text(json.dumps(ended))
        phase = {"rank": 0, "phase": "train", "io_not_hidden_s": 1.5}
        phases = [phase, phase | {"rank": 1, "io_not_hidden_s": 0.5}, phase | {"phase": "startup"}]
        summary = {"metrics": {"wait_share": 0.25}, "phases_s": phases}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    make_run(folder / "a", 512)
    make_run(folder / "b", 128, "adagrad")
    make_run(folder / "c", 256, results=False, log="training ended with exit code 75\n")
    make_run(folder / "d", 256, results=False, log="3_train.sh: training ended with exit code 1\n")
    make_run(folder / "e", 256, results=False)
    (folder / "notes").mkdir()
    (folder / "notes" / "x.txt").write_text("mine")
    return folder


def list_json(*words: object) -> list[dict]:
    done = run_command("list", *words, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_a_row_has_the_runs_numbers(results: Path) -> None:
    first, *_ = list_json(results)
    wanted = {
        "run": "a", "state": "done", "model": "DLRM", "ranks": 4, "batch": 512, "rate": 0.1, "step": 50,
        "samples_per_second": 6144.0, "wait_share": 0.25, "io_not_hidden_seconds": 1.0, "score": 0.512,
        "score_name": "auroc", "differs": {"optimizer": "sgd"},
    }  # fmt: skip
    assert {name: first[name] for name in wanted} == wanted


def test_the_state_follows_the_evidence(results: Path, tmp_path: Path) -> None:
    states = {row["run"]: row["state"] for row in list_json(results)}
    assert states == {"a": "done", "b": "done", "c": "stopped", "d": "failed (1)", "e": "ended early"}
    run = make_run(tmp_path / "now", 64)
    with hold_lock(run):
        assert [row["state"] for row in list_json(tmp_path)] == ["running"]
    assert [row["state"] for row in list_json(tmp_path)] == ["done"]


def test_filters_and_orders(results: Path) -> None:
    def names(*words: str) -> str:
        return "".join(row["run"] for row in list_json(results, *words))

    assert names("--where", "batch>=256", "--where", "state=done") == "a"
    assert names("--where", "optimizer=adagrad") == "b"
    assert names("--where", "optim.optimizer!=adagrad") == "acde"
    assert names("--sort", "batch", "--reverse", "--where", "state=DONE") == "ab"
    assert names("--sort", "score") == "bacde"
    for words, said in (
        (("--where", "batch"), "--where batch: give a name, a sign and a value"),
        (("--where", "colour=red"), "--where colour: no run has such a value"),
        (("--sort", "colour"), "--sort colour: no run has such a value"),
    ):
        done = run_command("list", results, *words)
        assert done.code == 2 and done.err.count("\n") == 1 and said in done.err


def test_csv_and_text_have_the_same_rows(results: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(run_command("list", results, "--csv").out)))
    assert [row["run"] for row in rows] == list("abcde")
    assert rows[1]["differs"] == "optimizer adagrad"
    text = run_command("list", results).out.splitlines()
    assert [line.split()[0] for line in text[1:6]] == list("abcde")
    assert "25.0%" in text[1] and "1.00 s" in text[1] and "auroc 0.5120" in text[1]


def test_a_folder_of_runs_is_listed_by_commands_that_take_one_run(results: Path) -> None:
    for command in ("summary", "view"):
        done = run_command(command, results)
        assert done.code == 2 and "holds 5 runs; name one of them" in done.err
        assert [line.split()[0] for line in done.out.splitlines()[1:6]] == list("abcde")


def test_a_folder_without_runs(tmp_path: Path) -> None:
    for folder, said in ((tmp_path, "no runs in it"), (tmp_path / "absent", "no such folder")):
        done = run_command("list", folder)
        assert done.code == 2 and said in done.err and done.err.count("\n") == 1


def test_damaged_files_leave_empty_cells(results: Path, tmp_path: Path) -> None:
    damages = {
        "config.json": b"[1, 2",
        "results.json": b'{"samples_per_second": "x", "evaluations": [3], "steps": 1e400}',
        "summary.json": b'{"metrics": [], "phases_s": {"rank": {}}}', "metrics.jsonl": b"{\xff}\n" * 9,
        "log.txt": b"training ended with exit code \xff\n", "plan.json": b'{"a": {"shards": 5}}',
    }  # fmt: skip
    for name, data in damages.items():
        folder = tmp_path / name
        shutil.copytree(results / "a", folder / "run")
        (folder / "run" / name).write_bytes(data)
        for form in ("--json", "--csv"):
            done = run_hostile("list", folder, form)
            assert done.code == 0 and not done.err and "run" in done.out


def test_an_exit_code_that_is_none(results: Path, tmp_path: Path) -> None:
    """Of a run without results, whose state the log tells."""
    shutil.copytree(results / "c", tmp_path / "run")
    (tmp_path / "run" / "log.txt").write_text("training ended with exit code " + "9" * 5000 + "\n")
    done = run_hostile("list", tmp_path, "--json")
    assert done.code == 0 and json.loads(done.out)[0]["state"] == "ended early", done.err
