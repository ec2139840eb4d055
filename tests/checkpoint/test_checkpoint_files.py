"""The files of a checkpoint: exact, readable by others, resharded, and never trusted when damaged."""

import json
import os
import random
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import traced
from support.file_calls import count_traced_calls, read_events
from torch.distributed import HashStore

from common.owned import MARK
from dlrm.checkpoint import blocks, folder, shards, state
from dlrm.checkpoint.blocks import CorruptCheckpoint
from dlrm.checkpoint.shards import TensorPiece
from dlrm.runtime.ranks import Ranks


def make_whole_piece(name: str, tensor: torch.Tensor) -> TensorPiece:
    return TensorPiece(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor)


def cut_piece(name: str, tensor: torch.Tensor, low: tuple[int, ...], high: tuple[int, ...]) -> TensorPiece:
    part = tensor[tuple(slice(a, b) for a, b in zip(low, high, strict=True))].clone()
    return TensorPiece(name, tuple(tensor.shape), low, part)


def save(
    root: Path, pieces: list[TensorPiece], step: int = 1, keep: int | None = None, **values: Any
) -> Path:
    saver = state.open_writer(root, Ranks(), HashStore(), keep, timeout=10)
    saver.save(pieces, values, step)
    assert saver.wait_for_save() is None
    return Path(str(saver.last_path))


def load(path: Path, piece: TensorPiece) -> torch.Tensor:
    found = folder.read_description(path)
    stored = [each for each in found.tensors if each.name == piece.name]
    count = sum(shards.read_into(path, found.files, each, [piece], found.reader)[0] for each in stored)
    found.reader.close()
    assert count == piece.tensor.numel()
    return piece.tensor


TENSORS = {
    "f32": torch.randn(1000, 16), "bf16": torch.randn(33, 7).bfloat16(), "f16": torch.randn(5).half(),
    "f64": torch.randn(2, 3, 4, dtype=torch.float64), "i64": torch.arange(99), "u8": torch.arange(250).byte(),
    "bool": torch.tensor([True, False]), "scalar": torch.tensor(3.5), "empty": torch.empty(0, 16),
}  # fmt: skip


def test_what_is_written_is_read_to_the_bit(tmp_path: Path) -> None:
    path = save(tmp_path, [make_whole_piece(name, tensor) for name, tensor in TENSORS.items()])
    for name, tensor in TENSORS.items():
        read = load(path, make_whole_piece(name, torch.zeros_like(tensor)))
        assert torch.equal(read, tensor), name


def test_others_can_open_the_files(tmp_path: Path) -> None:
    """They are safetensors: the format's own library reads them."""
    load_file = pytest.importorskip("safetensors.torch").load_file
    path = save(tmp_path, [make_whole_piece(name, tensor) for name, tensor in TENSORS.items()])
    theirs = load_file(path / "rank00000.safetensors")
    assert {name.split(":", 1)[1] for name in theirs} == set(TENSORS)
    assert all(torch.equal(tensor, TENSORS[name.split(":", 1)[1]]) for name, tensor in theirs.items())


@pytest.mark.parametrize("seed", range(10))
def test_any_cut_is_read_under_any_other(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rectangles of rows and columns in, other rectangles out; blocks smaller than a tensor."""
    rng = random.Random(seed)
    tensor = torch.randn(rng.randint(1, 300), rng.randint(1, 60))

    def cuts() -> list[TensorPiece]:
        marks = [sorted({0, n, *(rng.randint(0, n) for _ in range(rng.randint(0, 3)))}) for n in tensor.shape]
        return [
            cut_piece("t", tensor, (a, c), (b, d))
            for a, b in zip(marks[0], marks[0][1:], strict=False)
            for c, d in zip(marks[1], marks[1][1:], strict=False)
        ]

    monkeypatch.setattr(blocks, "BLOCK", 1 << rng.randint(3, 12))
    path = save(tmp_path, cuts())
    for piece in cuts():
        target = TensorPiece("t", piece.shape, piece.offset, torch.zeros_like(piece.tensor))
        assert torch.equal(load(path, target), piece.tensor)


def test_a_hole_is_noticed(tmp_path: Path) -> None:
    tensor = torch.randn(10, 4)
    path = save(tmp_path, [cut_piece("t", tensor, (0, 0), (6, 4))])
    with pytest.raises(AssertionError):
        load(path, make_whole_piece("t", torch.zeros(10, 4)))


@pytest.mark.parametrize("seed", range(30))
def test_damage_is_noticed(tmp_path: Path, seed: int) -> None:
    """One byte anywhere: read whole and equal, or refused; never something else, never a crash."""
    rng = random.Random(seed)
    tensor = torch.randn(200, 16)
    path = save(tmp_path, [make_whole_piece("t", tensor)], score=0.5)
    victim = path / rng.choice(["checkpoint.json", "rank00000.safetensors"])
    data = bytearray(victim.read_bytes())
    act = rng.choice(["flip", "cut", "grow", "zero", "remove"])
    if act == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif act == "cut":
        del data[rng.randrange(len(data)) :]
    elif act == "grow":
        data += b"\0" * 17
    elif act == "zero":
        start = rng.randrange(len(data))
        data[start : start + 100] = bytes(len(data[start : start + 100]))
    victim.write_bytes(data)
    if act == "remove":
        victim.unlink()
    try:
        found = folder.read_description(path)
        target = make_whole_piece("t", torch.zeros(200, 16))
        stored = [each for each in found.tensors if each.name == "t"]
        count = sum(shards.read_into(path, found.files, each, [target], found.reader)[0] for each in stored)
    except CorruptCheckpoint as error:
        assert str(path) in str(error)
        return
    assert count == 200 * 16 and torch.equal(target.tensor, tensor) and found.state == {"score": 0.5}


def test_an_untrusted_description_cannot_reach_outside(tmp_path: Path) -> None:
    path = save(tmp_path, [make_whole_piece("t", torch.randn(4, 4))])
    values = json.loads((path / "checkpoint.json").read_text())
    outside = tmp_path / "secret"
    outside.write_bytes(bytes(1000))
    for name in ("../secret", str(outside)):
        values["tensors"][0]["file"] = name
        values["files"] = {name: {"bytes": 1000, "block": 1000, "crc32": [0]}}
        values.pop("crc32", None)
        values["crc32"] = zlib.crc32(json.dumps(values, sort_keys=True).encode())
        (path / "checkpoint.json").write_text(json.dumps(values))
        with pytest.raises(CorruptCheckpoint, match="position"):
            folder.read_description(path)


def test_nothing_is_unpickled() -> None:
    """Neither the word nor its friends, in what reads checkpoints."""
    here = Path(folder.__file__).parent
    resume = here.parent / "trainer" / "resume.py"
    text = "".join(path.read_text() for path in [*here.glob("*.py"), resume])
    assert not any(word in text for word in ("import pickle", "torch.load", "eval(", "np.load"))


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    scores = [0.1, 0.9, 0.3, 0.4, 0.5]
    for step, score in enumerate(scores):
        save(tmp_path, [make_whole_piece("t", torch.ones(3))], step, keep=2, score=score)
    kept = [path.name for path in folder.list_checkpoints(tmp_path)]
    assert kept == ["00005-step-4", "00004-step-3", "00002-step-1"]
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


def test_half_written_ones_are_never_seen_and_cleared_away(tmp_path: Path) -> None:
    save(tmp_path, [make_whole_piece("t", torch.ones(3))], 1)
    partial, _ = folder.begin_checkpoint(tmp_path, 2)  # killed before the rename
    (partial / "rank00000.safetensors").write_bytes(b"half")
    assert [path.name for path in folder.list_checkpoints(tmp_path)] == ["00001-step-1"]
    save(tmp_path, [make_whole_piece("t", torch.ones(3))], 3)
    assert sorted(os.listdir(tmp_path)) == ["00001-step-1", "00002-step-3"]


def test_several_ranks_publish_one_checkpoint_or_none(tmp_path: Path) -> None:
    """Threads play the ranks: they share only the store."""
    store, tensor = HashStore(), torch.randn(9, 4)
    full: list[str] = []  # files that cannot be written

    def write(into: Path, file: str, pieces: Any) -> Any:
        if file in full:
            raise OSError(28, "No space left on device", str(into / file))
        if full:
            time.sleep(0.3)  # still writing when the other rank has failed
        return shards.write_pieces(into, file, pieces)

    savers = [
        state.open_writer(tmp_path, Ranks(rank=r, world_size=3), store, None, 10, write_pieces=write)
        for r in range(3)
    ]
    for rank, saver in enumerate(savers):
        saver.save([cut_piece("t", tensor, (3 * rank, 0), (3 * rank + 3, 4))], {"from": rank}, 5)
    assert [saver.wait_for_save() for saver in savers] == [None] * 3
    path = folder.list_checkpoints(tmp_path)[0]
    assert {saver.last_path for saver in savers} == {str(path)}
    assert (
        folder.read_description(path).state == {"from": 0} and len(folder.read_description(path).files) == 3
    )
    assert torch.equal(load(path, make_whole_piece("t", torch.zeros(9, 4))), tensor)
    # rank 1 cannot write: nothing is published, all are told why, the one before stays
    full.append("rank00001.safetensors")
    for rank, saver in enumerate(savers):
        saver.save([cut_piece("t", tensor, (3 * rank, 0), (3 * rank + 3, 4))], {}, 6)
    message = [saver.wait_for_save() for saver in savers]
    assert len(set(message)) == 1 and "No space left" in str(message[0]) and "rank 1" in str(message[0])
    assert os.listdir(tmp_path) == ["00001-step-5"]


def test_training_waits_for_the_copy_alone(tmp_path: Path) -> None:
    """What is trained after `save` returned is not in the checkpoint."""
    tensor, gate = torch.zeros(1000, 1000), threading.Event()

    def write_late(*arguments: Any) -> Any:
        gate.wait(10)
        return shards.write_pieces(*arguments)

    saver = state.open_writer(tmp_path, Ranks(), HashStore(), None, timeout=10, write_pieces=write_late)
    saver.save([make_whole_piece("t", tensor)], {}, 1)
    tensor += 1
    gate.set()
    assert saver.wait_for_save() is None
    assert not load(Path(str(saver.last_path)), make_whole_piece("t", torch.ones(1000, 1000))).any()


def test_files_are_the_users_own(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = save(tmp_path, [make_whole_piece("t", torch.ones(3))])
    finally:
        os.umask(before)
    modes = {each.name: each.stat().st_mode & 0o777 for each in [path, *path.iterdir()]}
    files = dict.fromkeys(["checkpoint.json", "rank00000.safetensors", MARK], 0o640)
    assert modes == {"00001-step-1": 0o750} | files
    assert np.all([not mode & 0o002 for mode in modes.values()])


# 40 tensors in two files, wanted in another order than the files have them; one by two column shards
RESUME = """
import torch
from pathlib import Path
from dlrm.checkpoint import blocks, folder, shards, state
from dlrm.checkpoint.shards import TensorPiece
made, files = [], {}
tensors = {f"model/w{i:02}": torch.randn(300 + 40 * i, 130) for i in range(40)}
partial, final = folder.begin_checkpoint(Path(run), 1)
for rank in range(2):
    pieces = [TensorPiece(name, tuple(t.shape), (0, 0), t) for name, t in list(tensors.items())[rank::2]]
    written = shards.write_pieces(partial, f"rank{rank:05}.safetensors", pieces)
    made += written["tensors"]; files |= written["file"]
folder.publish_checkpoint(partial, final, {"state": {}, "tensors": made, "files": files})
found = folder.read_description(final)
model = torch.nn.Module()
for name in sorted(tensors, key=lambda name: int(name[-2:]) * 7 % 40):
    empty = torch.nn.Parameter(torch.zeros(tensors[name].shape))
    model.register_parameter(name.removeprefix("model/"), empty)
columns = [torch.zeros(300, 65) for _ in range(2)]
shares = [TensorPiece("model/w00", (300, 130), (0, 65 * n), part) for n, part in enumerate(columns)]
trace.start_tracing(run, here, "train")
filled = state.restore_state(found, model, None, shares)
trace.stop_tracing()
assert filled == sum(t.nbytes for t in tensors.values()) + tensors["model/w00"].nbytes
assert all(torch.equal(value, tensors[f"model/{name}"]) for name, value in model.state_dict().items())
assert torch.equal(torch.cat(columns, 1), tensors["model/w00"])
"""


def test_each_block_is_read_once(tmp_path: Path) -> None:
    """Whatever the order and cut of the tensors, the trace shows one open of each file, its bytes once."""
    run = traced.run(tmp_path / "run", RESUME)
    seen = count_traced_calls(read_events(run)).below(run / "00001-step-1")
    files = sorted((run / "00001-step-1").glob("*.safetensors"))
    assert len(files) == 2
    for path in files:
        size = path.stat().st_size
        assert size > 2 * blocks.BLOCK
        assert seen[path.name, "open"][0] == 1
        assert 0.95 * size < seen[path.name, "read"][1] <= 1.05 * size
