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

from dlrm.data.batches import Batches
from dlrm.data.prefetch import Prefetcher
from dlrm.models.bert4rec import cache, ratings
from dlrm.models.bert4rec.model import Batch, features_of
from dlrm.models.bert4rec.options import BertConfig, BertData
from dlrm.models.bert4rec.sequence_reader import Judging, Sequences, Training
from dlrm.models.bert4rec.sequences import Histories, candidates, histories, negatives
from dlrm.prep.job.progress import Progress
from dlrm.runtime import session
from dlrm.runtime.ranks import Ranks

CACHE = ".bert4rec"
REACHABLE = (1, 10)  # of Recall@k


class Prepared(NamedTuple):
    data: Histories
    negatives: np.ndarray  # int32 [users, candidates]


class ToBatch:
    """Rows -> what the model takes."""

    def __init__(self, vocabulary: int, tied: bool, pin_memory: bool) -> None:
        self.vocabulary, self.tied, self.pin_memory = vocabulary, tied, pin_memory

    def __call__(self, rows: Sequences, where: Callable[[int, str], str]) -> Batch:
        tokens = torch.from_numpy(rows.tokens)
        batch = Batch(
            features_of(tokens, self.vocabulary, self.tied),
            tokens,
            torch.from_numpy(rows.labels).long(),
            None if rows.candidates is None else torch.from_numpy(rows.candidates),
        )
        return batch.pin_memory() if self.pin_memory else batch


@dataclass
class BertSets:
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


def open_sets(cfg: BertConfig, here: Ranks) -> BertSets:
    data, seed = cfg.data, cfg.run.seed or 0
    bytes_read: dict[str, int] = {}
    known = prepare(data, seed, here, bytes_read)
    pin = data.pin_memory and torch.cuda.is_available()
    to_batch: Any = ToBatch(known.data.vocabulary, cfg.model.output == "tied", pin)
    loaders = {}
    for stage in ("train", "val", "test"):
        source: Any = (
            Training(known.data, data.max_len, data.mask_prob, data.dupe_factor, seed)
            if stage == "train"
            else Judging(known.data, known.negatives, data.max_len, stage)
        )
        batches = Batches(
            source, getattr(data, f"{stage}_batch_size"), here.rank, here.world_size, to_batch=to_batch,
            shuffle_set=stage == "train", by_rank=False, seed=seed,
        )  # fmt: skip
        loaders[stage] = Prefetcher(batches, data.prefetch_batches)
    found = reachable(known, REACHABLE) if data.dataset_name == "markov" else {}
    return BertSets(known.data, bytes_read, **loaders, reachable=found)


def prepare(data: BertData, seed: int, here: Ranks, bytes_read: dict[str, int]) -> Prepared:
    """From the cache, or made and put there. A collective, inside `dist.together`."""
    wanted = ratings.Wanted(data.random_user_count, data.random_item_count, data.random_size, seed)
    path = ratings.file_of(data.dataset_name, data.dataset_path)
    folder = cache_folder(data, seed, path)
    if folder is None:
        return make(data, wanted, path, seed, here.first)
    mine = None
    with session.together():  # once the first has written it, or has said why not
        if here.first:
            mine = _load(folder, bytes_read)
            if mine is None:
                mine = make(data, wanted, path, seed, True)
                arrays = {"items": mine.data.items, "starts": mine.data.starts, "negatives": mine.negatives}
                cache.save(folder, arrays, {"items": mine.data.item_count})
    mine = mine or _load(folder, bytes_read)
    if mine is None:
        raise OSError(f"{folder} cannot be read on {here.host}: give a --cache_dir that all nodes share")
    return mine


def reachable(known: Prepared, lengths: tuple[int, ...]) -> dict[str, float]:
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
    return Path(root) / f"{data.dataset_name}-{cache.key_of(parameters, path)}"


def make(data: BertData, wanted: ratings.Wanted, path: Path | None, seed: int, show: bool) -> Prepared:
    progress = Progress(3, show)
    with progress.step("ratings"):
        raw = ratings.read(data.dataset_name, path, wanted)
        progress.add(rows=len(raw.user))
    with progress.step("histories"):
        found = histories(raw, data.min_rating, data.min_user_count, data.min_item_count)
        progress.add(rows=len(found.items))
    with progress.step("negatives"):
        count = candidates(found, data.negatives, data.default_negatives)
        drawn = negatives(found, count, data.by_popularity, seed)
        progress.add(rows=len(drawn))
    return Prepared(found, drawn)


def _load(folder: Path, bytes_read: dict[str, int]) -> Prepared | None:
    found = cache.load(folder, bytes_read)
    if found is None:
        return None
    arrays, facts = found
    return Prepared(Histories(arrays["items"], arrays["starts"], facts["items"]), arrays["negatives"])
