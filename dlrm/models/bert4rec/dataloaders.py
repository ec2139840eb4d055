"""The training sequences, and the users for validation and test, prepared once and cached.

Rank 0 prepares them; the others wait and read its files. Random data without --cache_dir is made by each
rank, alike because of the seed.
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
from common.progress import StepProgress
from dlrm.data.batches import BatchLoader
from dlrm.data.prefetch import Prefetcher
from dlrm.models.bert4rec import cache, ratings
from dlrm.models.bert4rec.dataset_files import find_ratings_file
from dlrm.models.bert4rec.model import BertBatch, make_features
from dlrm.models.bert4rec.options import BertConfig, BertData
from dlrm.models.bert4rec.sequence_reader import EvaluationSequences, SequenceRows, TrainingSequences
from dlrm.models.bert4rec.sequences import (
    Histories,
    compute_window_step,
    count_candidates,
    draw_negatives,
    make_histories,
)
from dlrm.runtime import session
from dlrm.runtime.ranks import Ranks

CACHE = ".bert4rec"
REACHABLE = (1, 10)  # k of the best reachable Recall@k and NDCG@k


class PreparedData(NamedTuple):
    data: Histories
    negatives: np.ndarray  # int32 [users, candidates]


class BertCollator:
    """SequenceRows -> BertBatch."""

    def __init__(self, vocabulary: int, tied: bool, pin_memory: bool) -> None:
        """`vocabulary`: number of items, with the padding and the mask. `tied`: see `BERT4Rec`."""
        self.vocabulary, self.tied, self.pin_memory = vocabulary, tied, pin_memory

    def __call__(self, rows: SequenceRows, where: Callable[[int, str], str]) -> BertBatch:
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
    reachable: dict[str, float]  # best expected scores of the test, if the rule behind the data is known

    def bytes_read(self) -> dict[str, int]:
        return self.read

    def close(self) -> None:
        """Nothing is open."""


def open_datasets(cfg: BertConfig, here: Ranks) -> BertDatasets:
    """Prepare the ratings, or read prepared ones, and make this rank's batches of the three sets."""
    data, seed = cfg.data, cfg.run.seed or 0
    bytes_read: dict[str, int] = {}
    prepared = prepare_data(data, seed, here, bytes_read)
    refuse_large_sequences(data, prepared.data)
    pin = data.pin_memory and torch.cuda.is_available()
    to_batch: Any = BertCollator(prepared.data.vocabulary, cfg.model.output == "tied", pin)
    loaders = {}
    for stage in ("train", "val", "test"):
        source: Any = (
            TrainingSequences(
                prepared.data,
                data.max_len,
                data.mask_prob,
                data.dupe_factor,
                seed,
                window_share=data.window_share,
                mask_share=data.mask_share,
            )
            if stage == "train"
            else EvaluationSequences(prepared.data, prepared.negatives, data.max_len, stage)
        )
        batches = BatchLoader(
            source, getattr(data, f"{stage}_batch_size"), here.rank, here.world_size, to_batch=to_batch,
            shuffle_set=stage == "train", by_rank=False, seed=seed,
        )  # fmt: skip
        loaders[stage] = Prefetcher(batches, data.prefetch_batches, stage)
    found = compute_best_scores(prepared, REACHABLE) if data.dataset_name == "markov" else {}
    return BertDatasets(prepared.data, bytes_read, **loaders, reachable=found)


def refuse_large_sequences(data: BertData, histories: Histories) -> None:
    """UserError where the sequences of all users, or those of a batch, cannot fit into memory."""
    # a user's sequence is kept for both tests; while they are made, each position takes two 64-bit numbers
    refuse_too_large(
        24 * histories.users * data.max_len,
        f"--max_len {data.max_len} for {histories.users} users",
        "lower it",
    )
    step = compute_window_step(data.max_len, data.window_share)
    windows = data.dupe_factor * (histories.users + len(histories.items) // step)
    refuse_too_large(16 * windows, f"--dupe_factor {data.dupe_factor}", "lower it")
    for stage, rows in (("train", windows), ("val", histories.users), ("test", histories.users)):
        batch = getattr(data, f"{stage}_batch_size")
        refuse_too_large(
            100 * min(batch, rows) * data.max_len,
            f"--{stage}_batch_size {batch} of --max_len {data.max_len}", "lower them",
        )  # fmt: skip


def prepare_data(data: BertData, seed: int, here: Ranks, bytes_read: dict[str, int]) -> PreparedData:
    """From the cache, else made and put there. A collective."""
    options = ratings.RatingsOptions(data.random_user_count, data.random_item_count, data.random_size, seed)
    path = find_ratings_file(data.dataset_name, data.dataset_path)
    folder = cache_folder(data, seed, path)
    if folder is None:
        return make_data(data, options, path, seed, here.first)
    prepared = None
    # the other ranks continue once rank 0 has written it, or fail with its error
    with session.errors_on_all_ranks():
        if here.first:
            prepared = _load_cached(folder, bytes_read)
            if prepared is None:
                prepared = make_data(data, options, path, seed, True)
                found = prepared.data
                arrays = {"items": found.items, "starts": found.starts, "negatives": prepared.negatives}
                cache.save_prepared(folder, arrays, {"items": found.item_count})
    prepared = prepared or _load_cached(folder, bytes_read)
    if prepared is None:
        raise UserError(
            f"{printable(folder)} cannot be read on {here.host}: give a --cache_dir that all nodes share"
        )
    return prepared


def compute_best_scores(prepared: PreparedData, lengths: tuple[int, ...]) -> dict[str, float]:
    """The best Recall@k and NDCG@k that can be expected on `markov` data: those of a predictor which knows
    each item's follower, ranks the follower of a user's last item first, and all others in random order.
    """
    items, starts = prepared.data.items.astype(np.int64), prepared.data.starts
    pairs, often = np.unique(items[:-1] * prepared.data.vocabulary + items[1:], return_counts=True)
    follower = np.zeros(prepared.data.vocabulary, np.int64)
    last, after = np.divmod(pairs[np.argsort(often, kind="stable")], prepared.data.vocabulary)
    follower[last] = after  # the last of several assignments stays: the most frequent follower
    guess, right = follower[items[starts[1:] - 2]], items[starts[1:] - 1]
    # a wrong guess among the candidates is ranked above the right item
    offered = (prepared.negatives == guess[:, None]).any(axis=1)
    ranked = prepared.negatives.shape[1] + 1
    gains = {"Recall": np.ones(ranked), "NDCG": 1 / np.log2(np.arange(ranked) + 2)}  # by rank
    return {
        f"{name}@{k}": float(
            np.where(
                guess == right, 1, np.where(offered, gain[1:k].sum() / (ranked - 1), gain[:k].sum() / ranked)
            ).mean()
        )
        for name, gain in gains.items()
        for k in lengths
        if k <= ranked
    }


def cache_folder(data: BertData, seed: int, path: Path | None) -> Path | None:
    """Where histories prepared with these options belong; None: nowhere. `path`: the ratings' file, None for
    random ones.
    """
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
    data: BertData, options: ratings.RatingsOptions, path: Path | None, seed: int, show: bool
) -> PreparedData:
    """Read or draw ratings and prepare them. `path`: the ratings' file, None for random ones. `show`: print
    the progress.
    """
    progress = StepProgress(3, show)
    with progress.step("ratings"):
        raw = ratings.read_ratings(data.dataset_name, path, options)
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
