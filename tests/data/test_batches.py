"""Batches against torchrec's own pipe, every row once at any number of ranks, and resuming at another."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.data_folder import PARTS, numbered_days, write_days
from torchrec.datasets.criteo import InMemoryBinaryCriteoIterDataPipe
from torchrec.datasets.utils import Batch

from dlrm.data.batches import BatchLoader
from dlrm.data.readers import open_source
from dlrm.data.sampler import RowSampler
from dlrm.runtime.errors import UserError

SIZES = [3 + 7 * k for k in range(26)]
KINDS = ["stream", "memory", "mmap"]


def are_equal(mine: Batch, theirs: Batch) -> bool:
    ids, ids2 = mine.sparse_features, theirs.sparse_features
    return (
        torch.equal(mine.dense_features, theirs.dense_features)
        and torch.equal(mine.labels, theirs.labels)
        and mine.labels.dtype == theirs.labels.dtype
        and ids.keys() == ids2.keys()
        and torch.equal(ids.values(), ids2.values().int())
        and torch.equal(ids.lengths(), ids2.lengths())
        and torch.equal(ids.offsets(), ids2.offsets())
        and ids.offset_per_key() == ids2.offset_per_key()
        and ids.stride() == ids2.stride()
    )


def torchrec_batches(folder: Path, stage: str, days: list[int], *shape: int, **more: object) -> list[Batch]:
    batch_size, rank, world = shape
    paths = [[str(folder / f"day_{day}_{part}.npy") for day in days] for part in PARTS]
    pipe = InMemoryBinaryCriteoIterDataPipe(
        stage, *paths, batch_size=batch_size, rank=rank, world_size=world, hashes=SIZES, **more
    )
    return list(pipe)


def row_numbers(batches: Iterable[Batch]) -> list[int]:
    """The first feature of `numbered_days` tells the row."""
    return [int(n) for batch in batches for n in batch.sparse_features["cat_0"].values()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_equal_to_torchrec(tmp_path: Path, kind: str, world: int) -> None:
    folder = write_days(tmp_path, [151, 100, 83])
    for stage, days in (("train", [0, 1]), ("val", [2]), ("test", [2])):
        for size in (7, 10, 25, 300):
            for drop in (False, True):
                for rank in range(world):
                    theirs = torchrec_batches(folder, stage, days, size, rank, world, drop_last=drop)
                    source = open_source(kind, folder, stage, read_chunk_mb=0.005)
                    batches = BatchLoader(source, size, rank, world, SIZES, drop_last=drop)
                    mine = list(batches)
                    assert len(batches) == len(mine) == len(theirs)
                    assert all(are_equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("kind", ["memory", "mmap"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_shuffled_set_equal_to_torchrec(tmp_path: Path, kind: str, world: int) -> None:
    folder = write_days(tmp_path, [151, 100, 9])
    for rank in range(world):
        theirs = torchrec_batches(
            folder, "train", [0, 1], 10, rank, world,
            shuffle_training_set=True, shuffle_training_set_random_seed=5,
        )  # fmt: skip
        source = open_source(kind, folder, "train", read_chunk_mb=0.005)
        mine = list(BatchLoader(source, 10, rank, world, SIZES, shuffle_set=True, seed=5))
        # the tail differs: torchrec's ranks may have unequal numbers of batches
        full = len(theirs) - 2
        assert full > 5
        assert all(are_equal(a, b) for a, b in zip(mine[:full], theirs[:full], strict=True))


def test_two_ranks_see_what_one_sees_with_twice_the_batch(tmp_path: Path) -> None:
    folder = numbered_days(tmp_path, [203, 9])
    one = list(BatchLoader(open_source("stream", folder, "train"), 20))
    two = [list(BatchLoader(open_source("stream", folder, "train"), 10, rank, 2)) for rank in range(2)]
    assert len(one) == len(two[0]) == len(two[1])
    for step, batch in enumerate(one):
        assert row_numbers([two[0][step], two[1][step]]) == row_numbers([batch])


@pytest.mark.parametrize("by_rank", [False, True])
def test_dealing_gives_every_row_once_and_no_empty_batch(by_rank: bool) -> None:
    for rows in [*range(1, 40), 331]:
        for world in (1, 2, 3, 5):
            for size in (1, 2, 7, 16):
                if rows < world:
                    with pytest.raises(UserError, match="too few for"):
                        RowSampler(rows, size, world, by_rank)
                    continue
                sampler = RowSampler(rows, size, world, by_rank)
                cuts = [
                    sampler.find_batch_rows(step, rank)
                    for step in range(sampler.steps)
                    for rank in range(world)
                ]
                sizes = [stop - start for start, stop in cuts]
                assert min(sizes) >= 1
                assert max(sizes) <= size + 1
                assert sorted(n for cut in cuts for n in range(*cut)) == list(range(rows))
                for step in range(sampler.steps):
                    left = sorted(n for cut in sampler.find_remaining(step) for n in range(*cut))
                    assert left == sorted(n for cut in cuts[step * world :] for n in range(*cut))
                dropped = RowSampler(rows, size, world, by_rank, drop_last=True)
                assert dropped.steps == rows // (size * world)
                for step in range(dropped.steps):
                    for rank in range(world):
                        start, stop = dropped.find_batch_rows(step, rank)
                        assert stop - start == size


SETUPS = [
    ("stream", {}),
    ("stream", {"by_rank": True}),
    ("memory", {}),
    ("memory", {"shuffle_set": True}),
    ("mmap", {"shuffle_set": True}),
    ("stream", {"shuffle_set": True, "window_mb": 0.008}),
    ("stream", {"shuffle_batches": True}),
    ("stream", {"shuffle_order": True}),
    ("memory", {"shuffle_order": True}),
]


@pytest.mark.parametrize(("kind", "how"), SETUPS)
def test_resume_at_other_ranks_and_batches(tmp_path: Path, kind: str, how: dict[str, object]) -> None:
    """Three parts of one epoch, each with other ranks: every row once; the same ranks continue unchanged."""
    folder = numbered_days(tmp_path, [301, 200, 9])

    def ranks(world: int, size: int, state: object = None, epoch: int = 1) -> list[BatchLoader]:
        made = []
        for rank in range(world):
            source = open_source(kind, folder, "train", read_chunk_mb=0.005)
            batches = BatchLoader(source, size, rank, world, seed=3, **how)  # type: ignore[arg-type]
            batches.set_epoch(epoch)
            if state is not None:
                batches.load_state_dict(state)  # type: ignore[arg-type]
                batches.set_epoch(epoch)
            made.append(batches)
        return made

    first = ranks(3, 10)
    straight = [row_numbers(batches) for batches in first]
    assert sorted(sum(straight, [])) == list(range(501))
    for steps in (0, 4, len(first[0]) - 1, len(first[0])):
        again = ranks(3, 10)
        seen = [[batch for _, batch in zip(range(steps), batches, strict=False)] for batches in again]
        states = [batches.state_dict() for batches in again] if steps else [ranks(3, 10)[0].state_dict()] * 3
        assert states[0] == states[1] == states[2]
        resumed = ranks(3, 10, states[0])
        assert [row_numbers(a) + row_numbers(b) for a, b in zip(seen, resumed, strict=True)] == straight
        done = row_numbers(batch for rank in seen for batch in rank)
        part = ranks(2, 7, states[1])
        more = row_numbers(batch for batches in part for _, batch in zip(range(3), batches, strict=False))
        rest = row_numbers(batch for batches in ranks(1, 16, part[0].state_dict()) for batch in batches)
        assert sorted(done + more + rest) == list(range(501)), steps


@pytest.mark.parametrize(("kind", "how"), SETUPS[3:])
def test_shuffles_differ_by_epoch_and_seed_only(tmp_path: Path, kind: str, how: dict[str, object]) -> None:
    folder = numbered_days(tmp_path, [301, 200, 9])

    def order(seed: int, epoch: int) -> list[int]:
        source = open_source(kind, folder, "train", read_chunk_mb=0.005)
        batches = BatchLoader(source, 50, seed=seed, **how)  # type: ignore[arg-type]
        batches.set_epoch(epoch)
        return row_numbers(batches)

    assert order(1, 0) == order(1, 0)
    for other in (order(1, 1), order(2, 0)):
        assert other != order(1, 0)
        assert sorted(other) == list(range(501))
    assert order(1, 0) != list(range(501))


def test_window_shuffle_mixes_and_reads_each_byte_once(tmp_path: Path) -> None:
    folder = numbered_days(tmp_path, [4000, 9])
    source = open_source("stream", folder, "train", read_chunk_mb=0.01)
    batches = BatchLoader(source, 100, shuffle_set=True, window_mb=0.1)
    numbers = np.array(row_numbers(batches))
    assert sorted(numbers) == list(range(4000))
    distances = np.abs(np.diff(numbers))
    assert np.median(distances) > 500  # neighbours come from all over the set
    assert source.bytes_read[str(folder / "day_0_dense.npy")] == 128 + 4000 * 52


def test_limit_and_lengths(tmp_path: Path) -> None:
    folder = numbered_days(tmp_path, [100, 9])
    source = open_source("stream", folder, "train")
    batches = BatchLoader(source, 10, limit=4)
    assert len(batches) == len(list(batches)) == 4
    assert source.bytes_read[str(folder / "day_0_dense.npy")] == 128 + 40 * 52  # and not a row more
    assert batches.state_dict()["segments"] == []
    state = None
    for step, _ in enumerate(batches):
        if step == 1:
            state = batches.state_dict()
            break
    assert state is not None
    batches.load_state_dict(state)
    assert len(batches) == len(list(batches)) == 2
    batches.set_epoch(1)
    assert len(batches) == len(list(batches)) == 4


def test_shuffled_batches_hold_the_same_rows(tmp_path: Path) -> None:
    folder = numbered_days(tmp_path, [100, 9])
    plain = [row_numbers([b]) for b in BatchLoader(open_source("stream", folder, "train"), 30)]
    mixed = [
        row_numbers([b])
        for b in BatchLoader(open_source("stream", folder, "train"), 30, shuffle_batches=True)
    ]
    assert plain != mixed
    assert plain == [sorted(rows) for rows in mixed]


@pytest.mark.parametrize("kind", KINDS)
def test_shuffled_order_moves_whole_steps(tmp_path: Path, kind: str) -> None:
    """Each step has the rows that some step has without it; the last one, which is not full, stays last."""
    folder = numbered_days(tmp_path, [100, 9])

    def steps(shuffled: bool) -> list[list[int]]:
        """The rows of each step, of both ranks."""
        ranks = [
            BatchLoader(open_source(kind, folder, "train"), 7, rank, 2, shuffle_order=shuffled)
            for rank in range(2)
        ]
        return [row_numbers(batches) for batches in zip(*ranks, strict=True)]

    assert steps(True) != steps(False)
    assert steps(True)[-1] == steps(False)[-1] == [98, 99]
    assert sorted(steps(True)) == steps(False)


@pytest.mark.parametrize("how", [{}, {"shuffle_set": True}, {"shuffle_order": True}])
def test_a_part_of_the_rows(tmp_path: Path, how: dict[str, bool]) -> None:
    folder = numbered_days(tmp_path, [100, 9])
    source = open_source("stream", folder, "train")
    batches = BatchLoader(source, 10, rows=37, **how)  # type: ignore[arg-type]
    assert len(batches) == 4 and sorted(row_numbers(batches)) == list(range(37))
    assert source.bytes_read[str(folder / "day_0_dense.npy")] == 128 + 37 * 52


def test_states_that_do_not_fit(tmp_path: Path) -> None:
    write_days(tmp_path / "a", [100, 9])
    write_days(tmp_path / "b", [101, 9])
    state = BatchLoader(open_source("stream", tmp_path / "a", "train"), 10).state_dict()
    with pytest.raises(UserError, match="made with 100 rows, this dataset has 101"):
        BatchLoader(open_source("stream", tmp_path / "b", "train"), 10).load_state_dict(state)
    with pytest.raises(UserError, match="--shuffle_training_set"):
        BatchLoader(open_source("stream", tmp_path / "a", "train"), 10, shuffle_set=True).load_state_dict(
            state
        )
    ordered = BatchLoader(open_source("stream", tmp_path / "a", "train"), 10, shuffle_order=True)
    with pytest.raises(UserError, match="--shuffle_batch_order"):
        ordered.load_state_dict(state)


def test_memory_holds_only_this_rank(tmp_path: Path) -> None:
    folder = numbered_days(tmp_path, [400, 9])
    for how in ({}, {"shuffle_set": True}):
        source = open_source("memory", folder, "train")
        batches = BatchLoader(source, 10, 1, 4, **how)  # type: ignore[arg-type]
        batches.load_first_rows()
        assert len(source.arrays.labels) == 100  # type: ignore[attr-defined]
        first = dict(source.bytes_read)
        runs = source.runs  # type: ignore[attr-defined]
        rows = runs[-1, 1] - runs[0, 0] if how else 100  # scattered rows: what lies between is read too
        assert first[str(folder / "day_0_dense.npy")] == 128 + rows * 52
        list(batches)
        list(batches)
        assert source.bytes_read == first  # later passes read nothing
