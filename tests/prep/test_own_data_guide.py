"""docs/own_data.md: its program makes text files that preprocessing takes as they are."""

import csv
import json
import re
from pathlib import Path

import numpy as np
from support.ranks import ROOT, python


def test_the_program_of_the_guide(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "own_data.md").read_text()
    program = tmp_path / "convert.py"
    program.write_text(re.findall(r"```python\n(.*?)```", guide, flags=re.S)[0])
    rows = 800
    with open(tmp_path / "clicks.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["clicked", "price", "age", "city", "brand"])
        for i in range(rows):
            table.writerow([i % 2, i / 7, "" if i % 10 == 0 else i % 80, f"city, {i % 5}", f"brand {i % 50}"])
    assert python(program, tmp_path / "clicks.csv", tmp_path / "text").returncode == 0
    out = tmp_path / "npy"
    made = python("-m", "dlrm.prep", "run", "--input_dir", tmp_path / "text", "--output_dir", out)
    assert made.returncode == 0, made.stderr
    meta = json.loads((out / "meta.json").read_text())
    # two ids are there in every table, the empty field's and the one for rare ids
    assert meta["table_sizes"][:3] == [5 + 2, 50 + 2, 3]
    labels = np.concatenate([np.load(out / f"day_{day}_labels.npy") for day in range(8)])
    assert len(labels) == rows and int(labels.sum()) == rows // 2
    assert python("-m", "dlrm.prep", "check", out).returncode == 0
