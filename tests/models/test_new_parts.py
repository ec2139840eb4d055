"""CONTRIBUTING.md's how-to: an interaction and a data source are a file and a line each."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from support.ranks import ROOT

INTERACTION = '''
"""Dense features and the sum of all embeddings."""

import torch

from dlrm.models.dlrm.interactions import Interaction, InteractionConfig


class SumArch(Interaction):
    @classmethod
    def count_outputs(cls, shape: InteractionConfig) -> int:
        return shape.dense + shape.dims[0]

    def forward(self, dense_features, sparse_features):
        total = torch.stack(list(sparse_features.to_dict().values())).sum(0)
        return torch.cat([dense_features, total], dim=1)
'''
SOURCE = '''
"""Rows that are all alike, as many as the file `rows` of the folder says."""

from pathlib import Path

import numpy as np

from common.errors import UserError
from dlrm.data.criteo import CRITEO
from dlrm.data.rows import Rows, SourceKind


class ConstantLayout:
    columns, table_sizes = CRITEO, None

    def __init__(self, folder):
        self.folder, self.bytes_read = str(folder), {}
        if not (Path(folder) / "rows").exists():
            raise UserError("the folder has no file rows")


class ConstantSource:
    random_access = True
    in_memory = contiguous = False
    row_bytes, batch = 160, 0

    def __init__(self, rows: int) -> None:
        self.rows, self.bytes_read = rows, {}

    def read(self, start, stop, ahead=0):
        return self.take(np.arange(start, stop))

    def take(self, rows):
        n = len(rows)
        return Rows(np.ones((n, 13), np.float32), np.ones((n, 26), np.int32), np.ones(n, np.int32))

    def load(self, runs, scattered=False):
        pass

    def locate_row(self, row, part):
        return f"row {row}"

    def close(self):
        pass


CONSTANT = SourceKind(
    ConstantLayout,
    lambda layout, options: ConstantSource(int((Path(layout.folder) / "rows").read_text())),
)
'''


def add_line(path: Path, after: str, line: str) -> None:
    text = path.read_text()
    assert text.count(after) == 1
    path.write_text(text.replace(after, after + line))


def test_a_new_interaction_and_a_new_source(tmp_path: Path) -> None:
    copy, data, run = tmp_path / "project", tmp_path / "data", tmp_path / "run"
    for package in ("common", "dlrm"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "dlrm/models/dlrm/sum_interaction.py").write_text(INTERACTION)
    add_line(
        copy / "dlrm/models/dlrm/options.py", "INTERACTIONS = {\n",
        '    "sum": "dlrm.models.dlrm.sum_interaction:SumArch",\n',
    )  # fmt: skip
    (copy / "dlrm/data/constant.py").write_text(SOURCE)
    add_line(
        copy / "dlrm/data/registry.py", "SOURCES = {\n", '    "constant": "dlrm.data.constant:CONSTANT",\n'
    )
    data.mkdir()
    words = ["--interaction_type", "sum", "--source", "constant", "--in_memory_binary_criteo_path", data,
             "--num_embeddings", 10, "--embedding_dim", 8, "--dense_arch_layer_sizes", "16,8",
             "--over_arch_layer_sizes", "8,1", "--batch_size", 32, "--learning_rate", 0.1,
             "--output_dir", run]  # fmt: skip

    def train(*more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "dlrm.train", *map(str, words), *more],
            cwd=copy, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    checked = train("--validate_only")
    assert checked.returncode == 2 and "the folder has no file rows" in checked.stderr
    (data / "rows").write_text("640")
    done = train()
    assert done.returncode == 0, done.stderr
    results = json.loads((run / "results.json").read_text())
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert results["steps"] == 20 and losses[-1] < 0.4  # the label is always 1
