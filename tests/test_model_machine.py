"""Machine code: it does what was written as LLVM's instructions, and lies on disk for the next process."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlrm.model import machine
from dlrm.model.machine import FLOAT, FLOATS, INT, LANES, ZERO, Code

pytestmark = pytest.mark.skipif(machine.host() is None, reason="needs AVX2")
FUNCTIONS = {"row_sums": [INT, FLOATS, FLOATS]}  # four rows of so many vectors -> their sums


def write(codes: dict[str, Code]) -> None:
    code = codes["row_sums"]
    count, rows, out = code.arguments

    def add(number: Any, *sums: Any) -> list[Any]:
        one = code.everywhere(FLOAT(1))
        places = [code.times(code.plus(code.times(count, row), number), LANES) for row in range(4)]
        vectors = [code.vector(rows, at) for at in places]
        return [code.multiply_add(each, one, total) for each, total in zip(vectors, sums, strict=True)]

    code.put(code.sums(code.loop(0, count, 1, add, [ZERO] * 4)), out)


def run(here: Path, monkeypatch: pytest.MonkeyPatch, how: Any = write) -> np.ndarray:
    monkeypatch.setattr(machine, "FOLDER", here)
    rows, out = np.arange(4 * 3 * LANES, dtype=np.float32), np.zeros(4, np.float32)
    machine.compiled("sums", FUNCTIONS, how)["row_sums"](3, rows.ctypes.data, out.ctypes.data)
    assert out.tolist() == rows.reshape(4, -1).sum(1).tolist()
    return out


def never(codes: dict[str, Code]) -> None:
    raise AssertionError("what is on disk is not written again")


def test_code_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "new", monkeypatch)
    run(tmp_path / "new", monkeypatch, never)
    (kept,) = (tmp_path / "new").iterdir()
    with pytest.raises(AssertionError):
        machine.compiled("others", FUNCTIONS, never)
    kept.write_bytes(kept.read_bytes()[:100])  # damaged: made anew
    run(tmp_path / "new", monkeypatch)
    run(tmp_path / "new", monkeypatch, never)


def test_nothing_is_kept_in_a_read_only_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    run(tmp_path / "file", monkeypatch)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_code_follows_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "FOLDER", tmp_path / "kept")
    out = np.zeros(1, np.float32)
    for value in (3, 5):
        source = tmp_path / "writer.py"
        text = f"def write(codes):\n    code = codes['set']\n    code.put(kind({value}), code.arguments[0])\n"
        source.write_text(text)
        names: dict[str, Any] = {"kind": FLOAT}
        exec(compile(text, source, "exec"), names)
        machine.compiled("set", {"set": [FLOATS]}, names["write"])["set"](out.ctypes.data)
        assert out.tolist() == [value]
