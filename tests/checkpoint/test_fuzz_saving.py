"""Damaged and hostile bytes in what a training reads back: checkpoints, stores, the BERT4Rec cache, metrics.

Each case is a fork of `CASES`, which calls the reading code itself: no training is started.
"""

import json
import random
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.case_server import CaseServer
from support.fuzzing import EXTREMES, check, mutate, outcome
from test_checkpoint_files import make_whole_piece
from test_foreign_saving import ARRAYS, make_row_file

from common.errors import UserError
from dlrm.checkpoint import folder, state
from dlrm.models.bert4rec import cache
from dlrm.runtime.ranks import Ranks
from dlrm.trainer import loop, resume
from dlrm.trainer.meter import ThroughputMeter
from dlrm.trainer.run_folder import RunFolder

CASES = CaseServer(__file__)
SIZES = (9, 3)
STATE: dict[str, Any] = {
    "step": 4, "epoch": 0, "score": 0.5, "results": {"val": {"auroc": 0.5}}, "evaluate_seconds": 0.5,
    "meter_steps": 2, "metrics_bytes": 10, "metrics_crc32": 7, "world_size": 1,
    "progress": vars(loop.Progress(step=4, val_scores=[0.5], position={
        "epoch": 0, "step": 4, "rows": 100, "segments": [[3, 50], [60, 100]], "seed": 0, "window": None,
        "block": None,
    })),
}  # fmt: skip


class Small(torch.nn.Module):
    """Stands for a model of one layer; what is read into it is what a training would read."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(*SIZES)


class Job:
    def __init__(self) -> None:
        self.meter = ThroughputMeter(torch.device("cpu"))


def checkpoint(root: Path) -> Path:
    job, model = Job(), Small()
    own = {"meter/0": job.meter.sums, "rng/cpu/0": torch.get_rng_state()}
    pieces = state.list_rank_pieces(model, None, 0)
    pieces += [make_whole_piece(name, value) for name, value in own.items()]
    saver = state.open_writer(root, Ranks(), torch.distributed.HashStore(), None, timeout=10)
    saver.save(pieces, STATE, 4)
    assert saver.wait_for_save() is None
    return Path(str(saver.last_path))


def run_as_entry(work: Callable[[], Any]) -> int:
    """The exit code of an entry that does this, and its line for a known error."""
    try:
        work()
    except UserError as error:
        print(f"dlrm: {error}", file=sys.stderr)
        return 2
    return 0


def read_checkpoint(argv: list[str]) -> int:
    def read() -> None:
        found = folder.read_description(Path(argv[0]))
        resume.check_state(found, True)
        own = resume.StoredRankState(Job(), Ranks(), found)
        state.restore_state(found, Small(), None, own.pieces)
        own.join()
        assert found.score is None or isinstance(found.score, float)

    return run_as_entry(read)


def read_store(argv: list[str]) -> int:
    def read() -> None:
        opened = make_row_file(Path(argv[0]))
        opened.read(np.arange(100))
        opened.close()

    return run_as_entry(read)


def read_cache(argv: list[str]) -> int:
    found = cache.load_prepared(Path(argv[0]), {})
    if found is not None:
        arrays, facts = found
        table = np.zeros(facts["items"] + 2) if facts["items"] < 1 << 20 else None
        if table is not None:
            table[arrays["items"]] = table[arrays["negatives"].ravel()[:1]]
        arrays["items"][arrays["starts"][1:] - 1]
    return 0


def read_metrics(argv: list[str]) -> int:
    def read() -> None:
        records = RunFolder(argv[0], True)
        records.resume_metrics(4, 10, 7)
        records.close()

    return run_as_entry(read)


def seal_description(values: dict[str, Any]) -> bytes:
    """A description whose checksum is right, whatever it says."""
    values = {key: value for key, value in values.items() if key != "crc32"}
    return json.dumps({**values, "crc32": zlib.crc32(json.dumps(values, sort_keys=True).encode())}).encode()


def change_one_value(value: Any, chance: random.Random) -> Any:
    """The same JSON with one value anywhere replaced by another."""
    strange = [
        None, True, -1, 0, 99999999999, 1 << 62, -(1 << 63), 10**19, 1e308, float("nan"), "", "x" * 3000,
        "../x",
        "rank00000.safetensors", [], {}, [[]], {"a": {}}, [1, 2, 3], [-1, 1 << 60], "F64", [[1 << 62, 5]],
    ]  # fmt: skip
    if isinstance(value, dict) and value and chance.random() < 0.93:
        key = chance.choice(sorted(value))
        if chance.random() < 0.05:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: change_one_value(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.93:
        at = chance.randrange(len(value))
        return [*value[:at], change_one_value(value[at], chance), *value[at + 1 :]]
    return chance.choice(strange)


def damage_bytes(name: str, data: bytes, chance: random.Random) -> bytes:
    if name.endswith(".json") and chance.random() < 0.7:
        made = change_one_value(json.loads(data), chance)
        if name == "checkpoint.json" and isinstance(made, dict):
            return seal_description(made)
        return json.dumps(made).encode()
    return chance.choice(EXTREMES) * 3 if chance.random() < 0.05 else mutate(data, chance)


def make_target(place: Path, which: str) -> tuple[Path, Callable[[list[str]], int]]:
    """A whole one of this kind, and what reads it."""
    if which == "checkpoint":
        return checkpoint(place), read_checkpoint
    if which == "store":
        opened = make_row_file(place / "store")
        opened.read(np.arange(100))
        opened.close()
        return place / "store", read_store
    if which == "cache":
        cache.save_prepared(place / "markov", ARRAYS, {"items": 3})
        return place / "markov", read_cache
    records = RunFolder(str(place / "run"), True)
    records.start_metrics()
    for step in range(1, 6):
        records.log_metrics(step=step, epoch=0, loss=1.0, lr=0.1, samples_per_second=1.0, step_time=1.0)
    records.close()
    return place / "run", read_metrics


WHICH = ["checkpoint", "store", "cache", "metrics"]


def read_damaged(argv: list[str]) -> None:
    """argv: one of WHICH, an empty folder, the first seed and the one after the last."""
    which, place, seeds = argv[0], Path(argv[1]), range(int(argv[2]), int(argv[3]))
    good, read = make_target(place, which)
    check(outcome(read, [good]))
    names = sorted(path.name for path in good.iterdir() if path.is_file())
    for seed in seeds:
        chance = random.Random(f"{which} {seed}")
        case = place / "case"
        shutil.copytree(good, case)
        # the description decides what is done with the rest
        name = chance.choice([*names, *(each for each in names if each.endswith(".json"))])
        (case / name).write_bytes(damage_bytes(name, (case / name).read_bytes(), chance))
        try:
            check(outcome(read, [case]))
        except AssertionError as error:
            raise AssertionError(f"{which}, seed {seed}, {name}: {error}") from None
        shutil.rmtree(case)


def damage_many(place: Path, which: str, seeds: range) -> None:
    done = CASES.run("read_damaged", which, place, seeds.start, seeds.stop, memory=None, seconds=3600)
    assert done.code == 0, done.err


@pytest.mark.parametrize("which", WHICH)
def test_damaged_bytes(tmp_path: Path, which: str) -> None:
    damage_many(tmp_path, which, range(80 if which == "checkpoint" else 30))


@pytest.mark.slow
@pytest.mark.parametrize("which", WHICH)
def test_many_damaged_bytes(tmp_path: Path, which: str) -> None:
    damage_many(tmp_path, which, range(1000, 3000 if which == "checkpoint" else 2100))


@pytest.fixture(scope="module")
def whole_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("key", ["world_size", "meter_steps", "step", "evaluate_seconds"])
@pytest.mark.parametrize("value", [99999999999999999, -1, "1", None, [], float("inf")])
def test_impossible_numbers_are_refused(whole_one: Path, tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / whole_one.name
    shutil.copytree(whole_one, path)
    values = json.loads((path / "checkpoint.json").read_text())
    values["state"][key] = value
    (path / "checkpoint.json").write_bytes(seal_description(values))
    check(CASES.run("read_checkpoint", path), refused=True)


def test_names_of_the_first_checkpoints_are_still_read(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    values = json.loads((path / "checkpoint.json").read_text())
    for found, names in (
        (values["state"], resume.OLD_STATE_KEYS),
        (values["state"]["progress"], resume.OLD_PROGRESS_KEYS),
    ):
        for old, new in names.items():
            found[old] = found.pop(new)
    (path / "checkpoint.json").write_bytes(seal_description(values))
    progress, old_keys = resume.check_state(folder.read_description(path), True)
    assert progress == loop.Progress(**STATE["progress"])
    assert old_keys == [*resume.OLD_STATE_KEYS, *resume.OLD_PROGRESS_KEYS]
