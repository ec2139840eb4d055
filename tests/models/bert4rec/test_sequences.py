"""Histories, windows, masks, candidates and the cache: against plain loops and the shares they promise."""

import os
from pathlib import Path

import numpy as np
import pytest

from dlrm.config.parser import parse_options
from dlrm.data.batches import BatchLoader
from dlrm.models.bert4rec import ratings
from dlrm.models.bert4rec.cache import load_prepared, save_prepared
from dlrm.models.bert4rec.dataloaders import prepare_data
from dlrm.models.bert4rec.dataset_files import find_ratings_file
from dlrm.models.bert4rec.options import BertConfig, BertData
from dlrm.models.bert4rec.ratings import Ratings, RatingsOptions
from dlrm.models.bert4rec.sequence_reader import SequenceRows, TrainingSequences
from dlrm.models.bert4rec.sequences import (
    Histories,
    count_candidates,
    cut_windows,
    draw_negatives,
    make_evaluation_sequence,
    make_histories,
    mask_items,
    pad_left,
)
from dlrm.runtime import session
from dlrm.runtime.errors import UserError
from dlrm.runtime.ranks import Ranks

GOOD = {
    "ml-1m": ("ratings.dat", "7::30::5::100\n7::10::4::300\n9::30::3::50\n7::20::1::200\n"),
    "ml-20m": ("ratings.csv", "userId,movieId,rating,timestamp\n"
               "7,30,5.0,100\n7,10,3.5,300\n9,30,3,50\n7,20,1.0,200\n"),
    "text": ("any.txt", "7 30 100\n7 10 300\n9 30 50\n7 20 200\n"),
}  # fmt: skip


def made(lengths: list[int], items: int = 50, seed: int = 0) -> Histories:
    draw = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Histories(draw.integers(1, items + 1, starts[-1]).astype(np.int32), starts, items)


def test_files_are_read_as_they_are(tmp_path: Path) -> None:
    for name, (file, content) in GOOD.items():
        (tmp_path / file).write_text(content)
        given = tmp_path / file if name == "text" else tmp_path
        found = ratings.read_ratings(name, find_ratings_file(name, str(given)), RatingsOptions())
        assert found.user.tolist() == [7, 7, 9, 7] and found.item.tolist() == [30, 10, 30, 20], name
        assert found.time.tolist() == [100, 300, 50, 200]
        assert found.rating.dtype == np.float32
    (tmp_path / "two").write_text("1\t5\n1\t4\n2,5\n")  # without times the order of the file counts
    assert ratings.read_ratings("text", tmp_path / "two", RatingsOptions()).time.tolist() == [0, 1, 2]
    assert ratings.read_ratings("ml-20m", tmp_path / "ratings.csv", RatingsOptions()).rating.tolist() == [
        5,
        3.5,
        3,
        1,
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ml-1m", "1::2\n", "2 columns"),
        ("ml-1m", "a::b::c::d\n", "line 1: a in column 1 is not a number"),
        ("text", "1 2 3\n4 x 6\n", "line 2: x in column 2 is not a number"),
        ("text", "", "empty"),
        ("ml-20m", "userId,movieId,rating,timestamp\n", "at least"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / "ratings"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        ratings.read_ratings(name, path, RatingsOptions())
    assert str(path) in str(error.value)


def test_missing_paths_are_named(tmp_path: Path) -> None:
    for name, path, message in (
        ("ml-1m", None, "ml-1m/ratings.dat is missing: --dataset_name ml-1m needs --dataset_path"),
        ("text", None, "needs --dataset_path"),
        ("ml-1m", str(tmp_path), "ratings.dat is missing"),
        ("text", str(tmp_path), "is a folder with no such files"),
    ):
        with pytest.raises(UserError, match=message):
            find_ratings_file(name, path)
    assert find_ratings_file("random", None) is None


def test_data_sets_are_found_and_recognized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, files in (
        ("ml-1m", ["ratings.dat", "users.dat"]), ("ml-20m", ["ratings.csv", "README.txt"]),
        ("one", ["steam", ".hidden"]), ("two", ["beauty.txt", "readme"]),
        ("both", ["ratings.dat", "ratings.csv"]),
        ("many", ["a.txt", "b.txt", "c"]),
    ):  # fmt: skip
        (tmp_path / folder).mkdir()
        for file in files:
            (tmp_path / folder / file).write_text("1 2 3\n")
    monkeypatch.chdir(tmp_path)
    for path, name, file in (
        (None, "ml-1m", "ml-1m/ratings.dat"), ("ml-20m", "ml-20m", "ml-20m/ratings.csv"),
        ("ml-1m/ratings.dat", "ml-1m", "ml-1m/ratings.dat"), ("one", "text", "one/steam"),
        ("two", "text", "two/beauty.txt"), ("one/steam", "text", "one/steam"),
    ):  # fmt: skip
        data = BertData(dataset_path=path)
        assert data.dataset_name == name
        assert find_ratings_file(name, path) == Path(file)
    assert find_ratings_file("ml-20m", None) == Path("ml-20m/ratings.csv")
    monkeypatch.chdir("one")  # --relative_to names the folder of the call, which need not be the current one
    for given, file in (([], "ml-1m/ratings.dat"), (["--dataset_name", "ml-20m"], "ml-20m/ratings.csv")):
        config = parse_options(BertConfig, [*given, "--relative_to", str(tmp_path)], "bert4rec", "")
        config.check_inputs()
        assert config.data.dataset_path == str(tmp_path / file)
        assert config.data.dataset_name == file.partition("/")[0]
    made = parse_options(BertConfig, ["--dataset_name", "random", "--relative_to", "."], "bert4rec", "")
    assert made.data.dataset_path is None
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="both has ratings.dat and ratings.csv: give --dataset_name"):
        BertData(dataset_path="both")
    with pytest.raises(UserError, match="a folder with 2 such files: give the file"):
        find_ratings_file("text", "many")
    with pytest.raises(UserError, match="ratings.dat is missing, but ratings.csv .*--dataset_name ml-20m"):
        find_ratings_file("ml-1m", "ml-20m")


def test_histories_are_those_of_a_plain_loop() -> None:
    draw = np.random.default_rng(3)
    raw = Ratings(
        draw.integers(100, 160, 2000) * 1_000_003, draw.integers(0, 90, 2000),
        draw.integers(1, 6, 2000).astype(np.float32), draw.integers(0, 40, 2000),
    )  # fmt: skip
    found = make_histories(raw, min_rating=2, min_user_count=22, min_item_count=15)
    kept = [row for row in zip(*(column.tolist() for column in raw), strict=True) if row[2] >= 2]
    for column, least in ((1, 15), (0, 22)):
        values = [row[column] for row in kept]
        often = {value for value in values if values.count(value) >= least}
        kept = [row for row in kept if row[column] in often]
    numbers = {item: 1 + n for n, item in enumerate(sorted({row[1] for row in kept}))}
    users = sorted({row[0] for row in kept})
    assert 5 < len(users) < 60 and len(numbers) < 90  # the filters do something
    expected = [
        [numbers[row[1]] for row in sorted((r for r in kept if r[0] == user), key=lambda r: r[3])]
        for user in users
    ]
    assert found.users == len(users) and found.item_count == len(numbers)
    for user, items in enumerate(expected):
        assert found.items[found.starts[user] : found.starts[user + 1]].tolist() == items
    with pytest.raises(UserError, match="no rating is left"):
        make_histories(raw, min_rating=6)


@pytest.mark.parametrize("max_len", [1, 3, 10, 24])
def test_windows_are_the_examples(max_len: int) -> None:
    at_half = max(1, max_len // 2)
    data = made([3, 5, 12, 13, 26, 27, 60, 100])
    expected = []
    for user in range(data.users):
        items = data.items[data.starts[user] : data.starts[user + 1]].tolist()[:-2]
        begins = [*range(len(items) - max_len, 0, -max(1, max_len // 10)), 0]
        for begin in reversed(begins):
            window = items[begin : begin + max_len]
            expected.append([0] * (max_len - len(window)) + window)
    assert pad_left(data, cut_windows(data, max_len), max_len).tolist() == expected
    steps = np.diff(cut_windows(data, max_len, 0.5)[-2:, 0])
    assert steps[0] == at_half


def test_masks_have_their_shares_and_depend_on_nothing_but_row_and_epoch() -> None:
    data = made([40] * 400, items=1000)
    spans = cut_windows(data, 20)
    rows = np.arange(len(spans))
    plain = pad_left(data, spans, 20)
    first = mask_items(data, spans, rows, 20, 0.15, 1, 0)
    hidden = first.labels > 0
    assert np.array_equal(first.labels[hidden], plain[hidden]) and not hidden[plain == 0].any()
    assert np.array_equal(first.tokens[~hidden], plain[~hidden])
    count, there = int(hidden.sum()), int((plain > 0).sum())
    assert abs(count / there - 0.15) < 4 * np.sqrt(0.15 * 0.85 / there)
    is_mask = first.tokens[hidden] == data.mask
    assert abs(is_mask.mean() - 0.8) < 4 * np.sqrt(0.16 / count)
    others = first.tokens[hidden][~is_mask]
    assert others.min() >= 1 and others.max() <= data.item_count and len(np.unique(others)) > 0.8 * 1000
    by_place = hidden.mean(axis=0)
    assert by_place.max() - by_place.min() < 0.06
    again = mask_items(data, spans[50:60], rows[50:60], 20, 0.15, 1, 0)
    assert np.array_equal(again.tokens, first.tokens[50:60])
    for seed, epoch, moved in ((1, 1, 0), (2, 0, 0), (1, 0, len(spans))):
        other = mask_items(data, spans, rows + moved, 20, 0.15, seed, epoch).labels > 0
        both = (other & hidden).sum() / there
        assert abs(both - 0.15**2) < 0.004  # independent draws


def test_the_last_two_items_are_held_out() -> None:
    data = made([3, 8, 30])
    for split, back in (("val", 2), ("test", 1)):
        tokens, right = make_evaluation_sequence(data, 10, split)
        for user in range(data.users):
            items = data.items[data.starts[user] : data.starts[user + 1]].tolist()
            assert right[user] == items[-back]
            seen = [*items[:-back], data.mask][-10:]
            assert tokens[user].tolist() == [0] * (10 - len(seen)) + seen


def test_negatives_are_new_distinct_and_drawn_as_asked() -> None:
    draw = np.random.default_rng(0)
    popular = (draw.zipf(1.3, 60_000) % 300 + 1).astype(np.int32)
    data = Histories(popular, np.arange(0, 60_001, 30), 300)
    counts = np.bincount(popular, minlength=302)[1:-1]
    for by_popularity in (True, False):
        found = draw_negatives(data, 20, by_popularity, seed=5)
        assert np.array_equal(found, draw_negatives(data, 20, by_popularity, seed=5))
        assert found.min() >= 1 and found.max() <= 300
        for user in range(data.users):
            mine = set(found[user].tolist())
            assert len(mine) == 20 and not mine & set(popular[30 * user : 30 * user + 30].tolist())
        drawn = np.bincount(found.reshape(-1), minlength=302)[1:-1]
        rare = counts < np.median(counts)
        share = drawn[rare].sum() / drawn.sum()
        assert (share < 0.35) if by_popularity else (0.4 < share < 0.65)
    assert count_candidates(data, None, 100) == 100
    with pytest.raises(UserError, match="--negatives 299"):
        count_candidates(data, 299, 100)
    few = Histories(np.array([1, 2, 3, 3, 3, 3, 4, 5, 6, 7], np.int32), np.array([0, 6, 10]), 9)
    assert count_candidates(few, None, 100) == 5  # the second user has met four of nine


def test_rare_items_are_drawn_too() -> None:
    """Where nearly all ratings are one item's, drawing until all others have come would not end."""
    items = np.concatenate([np.full(3_000_000, 1), np.arange(2, 41), [1, 2, 3]]).astype(np.int32)
    data = Histories(items, np.array([0, 3_000_000, 3_000_039, 3_000_042]), 40)
    found = draw_negatives(data, 37, True, 0)
    assert sorted(found[2].tolist()) == list(range(4, 41))
    assert len(set(found[0].tolist())) == 37 and 1 not in found[0]
    # for a user who has not rated the popular item, there is only that one
    few = draw_negatives(data, 5, True, 0)
    assert all(len(set(row)) == 5 for row in few[[0, 2]].tolist())


def test_a_markov_walk_has_its_known_best_guess() -> None:
    raw = ratings.make_markov(Path(), RatingsOptions(users=500, items=40, size=20_000, seed=2))
    data = make_histories(raw)
    pairs = np.stack([data.items[:-1], data.items[1:]], axis=1)
    within = np.ones(len(pairs), bool)
    within[data.starts[1:-1] - 1] = False
    table = np.zeros((41, 41), int)
    np.add.at(table, (pairs[within][:, 0], pairs[within][:, 1]), 1)
    best = table.max(axis=1)[1:].sum() / within.sum()
    assert abs(best - (ratings.MARKOV_SURE + (1 - ratings.MARKOV_SURE) / 40)) < 0.02


def test_every_row_comes_once_an_epoch_in_the_same_batches_for_any_ranks() -> None:
    data = made([20] * 30)

    def tokens(rank: int, world: int, size: int, epoch: int) -> list[np.ndarray]:
        def keep(rows: SequenceRows, _: object) -> np.ndarray:
            return rows.tokens

        batches = BatchLoader(
            TrainingSequences(data, 8, 0.3, 2, seed=4), size, rank, world, to_batch=keep,  # type: ignore[arg-type]
            shuffle_set=True, by_rank=False, seed=4,
        )  # fmt: skip
        batches.set_epoch(epoch)
        return list(batches)  # type: ignore[arg-type]

    for epoch in (0, 1):
        whole = tokens(0, 1, 12, epoch)
        parts = [tokens(rank, 3, 4, epoch) for rank in range(3)]
        joined = [np.concatenate(step) for step in zip(*parts, strict=True)]
        assert all(np.array_equal(a, b) for a, b in zip(whole[:-1], joined[:-1], strict=True))
        assert sum(map(len, whole)) == sum(map(len, joined)) == 2 * len(cut_windows(data, 8))
    assert not np.array_equal(tokens(0, 1, 12, 0)[0], tokens(0, 1, 12, 1)[0])


def test_prepared_data_is_kept_until_the_source_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(0)
    path = tmp_path / "ratings.txt"
    path.write_text("".join(f"{u} {i}\n" for u, i in draw.integers(0, 40, (900, 2))))
    data = BertData(dataset_name="text", dataset_path=str(path), negatives=5)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with session.open_session(Ranks(), 60):
        check_cache(path, data)


def check_cache(path: Path, data: BertData) -> None:
    read: dict[str, int] = {}
    first = prepare_data(data, 0, Ranks(), {})
    second = prepare_data(data, 0, Ranks(), read)
    assert np.array_equal(first.data.items, second.data.items)
    assert np.array_equal(first.negatives, second.negatives)
    arrays = (second.data.items, second.data.starts, second.negatives)
    assert sum(read.values()) == sum(array.nbytes for array in arrays)
    assert all(Path(name).is_absolute() for name in read)
    folders = list((path.parent / ".bert4rec").iterdir())
    assert len(folders) == 1
    (folders[0] / "items").write_bytes(b"short")  # damaged: made again
    assert np.array_equal(prepare_data(data, 0, Ranks(), {}).data.items, first.data.items)
    path.write_text(path.read_text() + "1 1\n")
    os.utime(path, ns=(1, 1))
    third = prepare_data(data, 0, Ranks(), {})
    assert len(third.data.items) == len(first.data.items) + 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--cache_dir"):
        save_prepared(tmp_path / "file" / "inside", {"a": np.zeros(3)}, {})
    assert load_prepared(tmp_path / "nothing", {}) is None
