"""The sequences to train on and the users to validate and test with, prepared once and kept.

Rank 0 prepares; the others wait and read what it has written. Made data without --cache_dir is made by
each rank for itself: the seed makes them the same.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from common.errors import UserError, printable
from common.memory import refuse_too_large
from dlrm.data.batches import BatchLoader
from dlrm.data.prefetch import Prefetcher
from dlrm.models.bert4rec import cache, ratings
from dlrm.models.bert4rec.model import BertBatch, make_features
from dlrm.models.bert4rec.options import BertConfig, BertData
from dlrm.models.bert4rec.sequence_reader import EvaluationSequences, SequenceSource, TrainingSequences
from dlrm.models.bert4rec.sequences import Histories, count_candidates, draw_negatives, make_histories
from dlrm.prep.job.progress import PrepProgress
from dlrm.runtime import session
from dlrm.runtime.ranks import Ranks

CACHE = ".bert4rec"
REACHABLE = (1, 10)  # of Recall@k


class PreparedData(NamedTuple):
    data: Histories
    negatives: np.ndarray  # int32 [users, candidates]


class BertCollator:
    """Rows -> what the model takes."""

    def __init__(self, vocabulary: int, tied: bool, pin_memory: bool) -> None:
        self.vocabulary, self.tied, self.pin_memory = vocabulary, tied, pin_memory

    def __call__(self, rows: SequenceSource, where: Callable[[int, str], str]) -> BertBatch:
        tokens = torch.from_numpy(rows.tokens)
        batch = BertBatch(
            make_features(tokens, self.vocabulary, self.tied),
            tokens,
            torch.from_numpy(rows.labels).long(),
            None if rows.candidates is None else torch.from_numpy(rows.candidates),
        )
        return batch.pin_memory() if self.pin_memory else batch


@dataclass
class BertDatasets:
    """The three sets as this rank's batches."""

    data: Histories
    read: dict[str, int]  # bytes, by file
    train: Prefetcher
    val: Prefetcher
    test: Prefetcher
    reachable: dict[str, float]  # of the test, where the data's rule is known: Recall@k of who knows it

    def bytes_read(self) -> dict[str, int]:
        return self.read

    def close(self) -> None:
        """Nothing is open."""


def open_datasets(cfg: BertConfig, here: Ranks) -> BertDatasets:
    data, seed = cfg.data, cfg.run.seed or 0
    bytes_read: dict[str, int] = {}
    known = prepare_data(data, seed, here, bytes_read)
    refuse_large_sequences(data, known.data)
    pin = data.pin_memory and torch.cuda.is_available()
    to_batch: Any = BertCollator(known.data.vocabulary, cfg.model.output == "tied", pin)
    loaders = {}
    for stage in ("train", "val", "test"):
        source: Any = (
            TrainingSequences(known.data, data.max_len, data.mask_prob, data.dupe_factor, seed)
            if stage == "train"
            else EvaluationSequences(known.data, known.negatives, data.max_len, stage)
        )
        batches = BatchLoader(
            source, getattr(data, f"{stage}_batch_size"), here.rank, here.world_size, to_batch=to_batch,
            shuffle_set=stage == "train", by_rank=False, seed=seed,
        )  # fmt: skip
        loaders[stage] = Prefetcher(batches, data.prefetch_batches)
    found = best_reachable_scores(known, REACHABLE) if data.dataset_name == "markov" else {}
    return BertDatasets(known.data, bytes_read, **loaders, reachable=found)


def refuse_large_sequences(data: BertData, known: Histories) -> None:
    """UserError where the sequences of all users, or those of a batch, cannot fit into memory."""
    # a user's sequence is kept for both tests; while they are made, each position takes two 64-bit numbers
    refuse_too_large(
        24 * known.users * data.max_len, f"--max_len {data.max_len} for {known.users} users", "lower it"
    )
    windows = data.dupe_factor * (known.users + len(known.items) // max(1, data.max_len // 10))
    refuse_too_large(16 * windows, f"--dupe_factor {data.dupe_factor}", "lower it")
    for stage, rows in (("train", windows), ("val", known.users), ("test", known.users)):
        batch = getattr(data, f"{stage}_batch_size")
        refuse_too_large(
            100 * min(batch, rows) * data.max_len,
            f"--{stage}_batch_size {batch} of --max_len {data.max_len}", "lower them",
        )  # fmt: skip


def prepare_data(data: BertData, seed: int, here: Ranks, bytes_read: dict[str, int]) -> PreparedData:
    """From the cache, or made and put there. A collective, inside `dist.together`."""
    wanted = ratings.RatingsOptions(data.random_user_count, data.random_item_count, data.random_size, seed)
    path = ratings.find_ratings_file(data.dataset_name, data.dataset_path)
    folder = cache_folder(data, seed, path)
    if folder is None:
        return make_data(data, wanted, path, seed, here.first)
    mine = None
    with session.errors_on_all_ranks():  # once the first has written it, or has said why not
        if here.first:
            mine = _load_cached(folder, bytes_read)
            if mine is None:
                mine = make_data(data, wanted, path, seed, True)
                arrays = {"items": mine.data.items, "starts": mine.data.starts, "negatives": mine.negatives}
                cache.save_prepared(folder, arrays, {"items": mine.data.item_count})
    mine = mine or _load_cached(folder, bytes_read)
    if mine is None:
        raise UserError(
            f"{printable(folder)} cannot be read on {here.host}: give a --cache_dir that all nodes share"
        )
    return mine


def best_reachable_scores(known: PreparedData, lengths: tuple[int, ...]) -> dict[str, float]:
    """The best Recall@k that can be expected on walks (`markov`): of one who knows each item's follower.

    Such a one puts the follower of a user's last item first, the others in any order.
    """
    items, starts = known.data.items.astype(np.int64), known.data.starts
    pairs, often = np.unique(items[:-1] * known.data.vocabulary + items[1:], return_counts=True)
    follower = np.zeros(known.data.vocabulary, np.int64)
    last, after = np.divmod(pairs[np.argsort(often, kind="stable")], known.data.vocabulary)
    follower[last] = after  # of several the last stays: the most frequent
    guess, right = follower[items[starts[1:] - 2]], items[starts[1:] - 1]
    offered = (known.negatives == guess[:, None]).any(axis=1)  # a wrong guess is ranked above the right item
    ranked = known.negatives.shape[1] + 1
    return {
        f"Recall@{k}": float(
            np.where(guess == right, 1, np.where(offered, (k - 1) / (ranked - 1), k / ranked)).mean()
        )
        for k in lengths
        if k <= ranked
    }


def cache_folder(data: BertData, seed: int, path: Path | None) -> Path | None:
    root = data.cache_dir or (os.path.join(path.parent, CACHE) if path else None)
    if root is None:
        return None
    parameters: dict[str, Any] = {
        name: getattr(data, name)
        for name in ("dataset_name", "min_rating", "min_user_count", "min_item_count", "negatives",
                     "default_negatives", "by_popularity")
    }  # fmt: skip
    parameters["seed"] = seed
    if path is None:
        parameters["made"] = [data.random_user_count, data.random_item_count, data.random_size]
    return Path(root) / f"{data.dataset_name}-{cache.cache_key(parameters, path)}"


def make_data(
    data: BertData, wanted: ratings.RatingsOptions, path: Path | None, seed: int, show: bool
) -> PreparedData:
    progress = PrepProgress(3, show)
    with progress.step("ratings"):
        raw = ratings.read_ratings(data.dataset_name, path, wanted)
        progress.add(rows=len(raw.user))
    with progress.step("histories"):
        found = make_histories(raw, data.min_rating, data.min_user_count, data.min_item_count)
        progress.add(rows=len(found.items))
    with progress.step("negatives"):
        count = count_candidates(found, data.negatives, data.default_negatives)
        drawn = draw_negatives(found, count, data.by_popularity, seed)
        progress.add(rows=len(drawn))
    return PreparedData(found, drawn)


def _load_cached(folder: Path, bytes_read: dict[str, int]) -> PreparedData | None:
    found = cache.load_prepared(folder, bytes_read)
    if found is None:
        return None
    arrays, facts = found
    return PreparedData(Histories(arrays["items"], arrays["starts"], facts["items"]), arrays["negatives"])
