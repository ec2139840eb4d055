"""Damaged config.json and dataset.json of the run that is to be emulated: one line, code 2, nothing else."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from support.made_traces import training

from analysis.tables.read import read_rank
from analysis.workload.steps import measure_steps
from common.errors import UserError
from dlrm.config.parser import parse_options
from dlrm.emulate import dataset
from dlrm.emulate.options import EmulateConfig, count_ranks
from dlrm.emulate.table_steps import list_table_steps
from dlrm.models.dlrm.options import Config

VALUES: list[Any] = [
    None, True, -1, 0, 10**30, 1e300, float("nan"), "", "x", "../../etc", "\ud800", [], [1], ["a"], [[]], {},
    {"a": 1}, 0.5, [10**30] * 26, [-1] * 26,
]  # fmt: skip


ARRAYS = (("dense", 13, "float32"), ("sparse", 26, "int32"), ("labels", 1, "int32"))


def make_config() -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(Config()), "launch": {"model": "DLRM", "world_size": 2, "directory": "/somewhere"}}


def list_places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    return [at, *(place for key, each in children for place in list_places(each, (*at, key)))]


def damage(values: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    found = copy.deepcopy(values)
    for _ in range(draw.randint(1, 3)):
        place = draw.choice(list_places(found)[1:])
        inside: Any = found
        for key in place[:-1]:
            inside = inside[key]
        inside[place[-1]] = copy.deepcopy(draw.choice(VALUES))
    return found


@pytest.mark.parametrize("seed", range(300))
def test_config(seed: int, tmp_path: Path) -> None:
    config = json.loads(json.dumps(make_config()))
    text = json.dumps(damage(config, random.Random(seed)))
    if seed % 10 == 0:
        text = text[: seed * 7 % len(text)]
    (tmp_path / "config.json").write_text(text)
    try:
        options = parse_options(EmulateConfig, ["--from", str(tmp_path)], "emulate", "")
        assert 1 <= count_ranks(options) <= 1 << 16
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("seed", range(200))
def test_dataset(seed: int, tmp_path: Path) -> None:
    values = {
        "files": {
            f"day_{day}_{part}.npy": [30, width, dtype]
            for day in range(2)
            for part, width, dtype in (
                ("dense", 13, "float32"),
                ("sparse", 26, "int32"),
                ("labels", 1, "int32"),
            )
        },
        "rows": [30, 30],
        "table_sizes": [10] * 26,
        "meta_bytes": 2000,
    }
    text = json.dumps(damage(values, random.Random(seed)))
    (tmp_path / "dataset.json").write_text(text)
    folder = tmp_path / "data"
    before = sorted(path.name for path in tmp_path.parent.iterdir())
    try:
        dataset.make_files(tmp_path, folder, "real", 1.0)
    except UserError as error:
        assert "\n" not in str(error)
    assert sorted(path.name for path in tmp_path.parent.iterdir()) == before
    size = sum(path.stat().st_size for path in folder.iterdir()) if folder.exists() else 0
    assert size < 1 << 20


def test_a_hint_of_more_bytes_than_there_can_be(tmp_path: Path) -> None:
    made = training(0, 1, steps=3)
    made.span("ssd", "fetch", 10_010, 10)
    for at, size in ((10_011, 10**30), (10_015, 4096)):
        made.posix("posix_fadvise64", at, 1, "/s/t_cat_0.rows", offset=0, len=size)
    made.write(tmp_path)
    steps = measure_steps(tmp_path).steps
    events = read_rank(0, [*(tmp_path / "trace").iterdir()], details=True)
    parts = json.dumps(list_table_steps(events, steps))
    assert "t_cat_0" in parts and "4096" in parts
