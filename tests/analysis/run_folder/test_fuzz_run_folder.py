"""Damaged JSON files beside good traces: every analysis command says so in one line, or continues."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from support.analysis_command import run_hostile
from support.fuzzing import check, mutate
from support.made_traces import training
from support.reports import a_run, analysis

FILES = ("config.json", "results.json", "plan.json", "metrics.jsonl", "progress.json", "replay.json")
LIGHT = ("check", "perfetto", "list", "watch")  # the commands that need no tables
VALUES: tuple[Any, ...] = (
    None, True, [], {}, "", "abc", "\ud800", -1, 1e999, float("nan"), 10**10, 2**63, 10**30, [[1]],
    {"a": {"b": []}},
    "<!--<script>", "x" * 5000, {"0": None}, {"x": {}}, {"0": {"f": "1"}}, {"99999999999": {"f": 1}},
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = a_run(tmp_path_factory.mktemp("fuzz") / "run")
    for path in (folder / "trace").iterdir():
        path.unlink()
    training(steps=3, reads=1).write(folder)
    config = {
        "data": {"batch_size": 256, "dataset_path": "/d", "read_chunk_mb": 8, "mmap_mode": False},
        "model": {"embedding_dim": 16, "interaction_type": "dot"},
        "launch": {"device": "cpu", "world_size": 2, "nodes": 1, "local_world_size": 2},
        "run": {"epochs": 1, "output_dir": "x"}, "optim": {"optimizer": "sgd", "learning_rate": 0.1},
    }  # fmt: skip
    results = {
        "samples_per_second": 1000.0, "test_auroc": 0.8, "samples": 100,
        "evaluations": {"val": {"NDCG@10": 0.5}}, "bytes_read": {"0": {"/data/day_0_sparse.npy": 3 << 20}},
        "bytes_written": {"0": {}},
    }  # fmt: skip
    plan = {"t_cat_0": {"shards": [{"offset": [0, 0], "size": [100, 16]}]}}
    progress = {
        "step": 3, "total_steps": 9, "epoch": 1, "evaluating": False, "time": 1.7e9 + 60, "started": 1.7e9,
        "steps_before": 0, "wait_seconds": 1.5, "bytes_read": 3 << 20, "silent": [[1, "n1", 40.0]],
        "silent_count": 2,
    }  # fmt: skip
    made = {
        "config": config, "results": results, "plan": plan, "progress": progress,
        "replay": {"run": str(folder)},
    }  # fmt: skip
    for name, value in made.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    analysis("report", folder)
    return folder


def replace_value(value: Any, chance: random.Random) -> Any:
    """One value somewhere inside becomes another."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(list(value))
        return {**value, key: replace_value(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.85:
        return [replace_value(value[0], chance), *value[1:]]
    return chance.choice(VALUES)


def damage(name: str, data: bytes, chance: random.Random) -> bytes:
    kind = chance.randrange(8)
    if kind < 4:
        lines = data.splitlines() if name.endswith("l") else [data]
        at = chance.randrange(len(lines))
        lines[at] = json.dumps(replace_value(json.loads(lines[at]), chance)).encode()
        return b"\n".join(lines)
    if kind == 4:
        deep = chance.choice((b"[", b'{"data":', b'{"bytes_read":')) * 100_000
        return deep if chance.random() < 0.5 else data + b"\n" + deep
    return mutate(data, chance)


def fuzz(run: Path, folder: Path, seed: int, cases: int, every: int) -> None:
    """The commands read a folder of links, so that only the damaged file is written."""
    chance = random.Random(seed)
    good = {name: (run / name).read_bytes() for name in FILES}
    (folder / "trace").symlink_to(run / "trace")
    for number in range(cases):
        changed = chance.sample(FILES, chance.choice((1, 1, 2)))
        for name in FILES:
            (folder / name).write_bytes(damage(name, good[name], chance) if name in changed else good[name])
        # the tables cost most of the time: `every` so many cases are of a command that needs them
        heavy = ("summary", "compare", "report")[number // every % 3]
        command = LIGHT[number % len(LIGHT)] if number % every else heavy
        words = [command, *([run] if command == "compare" else []), folder]
        if command in ("perfetto", "compare", "report"):
            words += ["-o", folder / f"{command}.out"]
        words += ["--once"] if command == "watch" else []
        found = run_hostile(*words)
        try:
            check(found)
        except AssertionError as error:
            error.add_note(f"seed {seed}, case {number}: {command}; kept in {folder}")
            raise


@pytest.mark.parametrize("command", ["check", "perfetto", "list", "watch", "summary", "compare", "report"])
def test_half_a_character_as_a_name(run: Path, tmp_path: Path, command: str) -> None:
    """JSON can hold one of a pair of surrogates, as a value and as a key; no encoding can."""
    half = "\ud800"
    for name in FILES:
        lines = (run / name).read_text().splitlines() or ["{}"]
        last = json.loads(lines[-1]) | {half: half}
        for key, value in last.items():
            if isinstance(value, dict):
                last[key] = value | {half: half}
        if name == "results.json":
            last["bytes_read"] = {"0": {half: 3, f"/data/{half}": 4}}
        if name == "metrics.jsonl":
            last |= {half: 0.5}
        (tmp_path / name).write_text("\n".join([*lines[:-1], json.dumps(last), ""]))
    (tmp_path / "trace").symlink_to(run / "trace")
    folders = [run, tmp_path] if command == "compare" else [tmp_path]
    more = ["-o", tmp_path / "made.out"] if command in ("perfetto", "compare", "report") else []
    more += ["--once"] if command == "watch" else []
    check(run_hostile(command, *folders, *more))


def test_damaged_files(run: Path, tmp_path: Path) -> None:
    fuzz(run, tmp_path, 1, 60, 8)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 110))
def test_damaged_files_of_many_kinds(run: Path, tmp_path: Path, seed: int) -> None:
    fuzz(run, tmp_path, seed, 500, 3)
