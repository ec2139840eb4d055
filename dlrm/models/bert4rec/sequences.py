"""Ratings -> BERT4Rec's sequences: each user's items in order, masked; and candidates to rank.

Items are numbered 1..n in the order of their own ids; 0 pads on the left, n + 1 is the mask. Of each user
the last item is for the test, the one before it for validation, the rest for training. Everything is
vectorised, and masks depend on (seed, epoch, row, position) alone, not on the number of ranks.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dlrm.models.bert4rec.ratings import Ratings
from dlrm.runtime.errors import UserError
from dlrm.runtime.trace import span

MASKED = 0.8  # share of the chosen positions that get the mask; the others get a random item
STEP = 0.1  # from one training sequence of a long history to the next, as a share of max_len


@dataclass(frozen=True)
class Histories:
    """All users' items, one after the other, oldest first."""

    items: np.ndarray  # int32
    starts: np.ndarray  # int64, one more than there are users
    item_count: int

    @property
    def users(self) -> int:
        return len(self.starts) - 1

    @property
    def mask(self) -> int:
        return self.item_count + 1

    @property
    def vocabulary(self) -> int:
        """Rows of the item table: padding and mask included."""
        return self.item_count + 2


class Examples(NamedTuple):
    tokens: np.ndarray  # int32 [rows, max_len]
    labels: np.ndarray  # int32 [rows, max_len]: the items to predict, else 0


def make_histories(
    ratings: Ratings, min_rating: float = 0, min_user_count: int = 5, min_item_count: int = 0
) -> Histories:
    """Filter (ratings, then items, then users), number items densely, sort by user and time."""
    if min_user_count < 3:
        raise UserError(f"--min_user_count {min_user_count}: 3 at least, to train, validate and test with")
    with span("prep", "histories"):
        keep = ratings.rating >= min_rating
        if min_item_count:
            keep[keep] = _are_frequent(ratings.item[keep], min_item_count)
        keep[keep] = _are_frequent(ratings.user[keep], min_user_count)
        if not keep.any():
            raise UserError("no rating is left: lower --min_rating, --min_user_count or --min_item_count")
        users, user = _number_densely(ratings.user[keep])
        items, item = _number_densely(ratings.item[keep])
        order = np.argsort(ratings.time[keep], kind="stable")
        order = order[np.argsort(user[order], kind="stable")]
        starts = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=users))])
        return Histories((item[order] + 1).astype(np.int32), starts, items)


def _number_densely(ids: np.ndarray) -> tuple[int, np.ndarray]:
    """(number of different ids, int64 [n]: each id's position among the different ids, sorted)."""
    if not len(ids):
        return 0, ids
    low, high = int(ids.min()), int(ids.max())
    if high - low > 8 * len(ids) + (1 << 20):  # too sparse for a table of all ids between
        known, numbers = np.unique(ids, return_inverse=True)
        return len(known), numbers
    present = np.zeros(high - low + 1, bool)
    present[ids - low] = True
    numbers = np.cumsum(present, dtype=np.int64) - 1
    return int(numbers[-1]) + 1, numbers[ids - low]


def _are_frequent(values: np.ndarray, least: int) -> np.ndarray:
    """bool [n]: whether a value occurs at least `least` times."""
    _, numbers = _number_densely(values)
    return np.bincount(numbers)[numbers] >= least


def compute_window_step(max_len: int, share: float) -> int:
    """Items from one training sequence of a long history to the next."""
    return max(1, int(share * max_len))


def cut_windows(data: Histories, max_len: int, share: float = STEP) -> np.ndarray:
    """int64 [rows, 2]: first item, and item after the last, of each training sequence in `data.items`.

    A history longer than `max_len` gives several sequences, each a `share` of `max_len` before the next.
    """
    begin, end = data.starts[:-1], data.starts[1:] - 2
    step = compute_window_step(max_len, share)
    more = np.maximum(0, -(-(end - begin - max_len) // step))  # besides the one at the beginning
    user = np.repeat(np.arange(data.users), more + 1)
    number = np.arange(len(user)) - np.repeat(np.cumsum(more + 1) - (more + 1), more + 1)
    first = np.where(number == 0, begin[user], end[user] - max_len - (more[user] - number) * step)
    return np.stack([first, np.minimum(first + max_len, end[user])], axis=1)


def pad_left(data: Histories, spans: np.ndarray, max_len: int) -> np.ndarray:
    """int32 [spans, max_len]: the items of each span, with zeros before them."""
    position = spans[:, 1:] - max_len + np.arange(max_len)
    return np.where(position >= spans[:, :1], data.items[np.maximum(position, 0)], 0).astype(np.int32)


def mask_items(
    data: Histories,
    spans: np.ndarray,
    rows: np.ndarray,
    max_len: int,
    mask_prob: float,
    seed: int,
    epoch: int,
    mask_share: float = MASKED,
) -> Examples:
    """Training examples of these spans (int64 [n, 2]), with some items masked or replaced.

    rows: numbers of the training sequences, int64 [n], which seed the masks. mask_share: of the chosen items.
    """
    tokens = pad_left(data, spans, max_len)
    chance, kind, other = _draw_random_shares(rows, max_len, seed, epoch)
    chosen = (chance < mask_prob) & (tokens > 0)
    labels = np.where(chosen, tokens, 0).astype(np.int32)
    random_item = 1 + (other * data.item_count).astype(np.int32)
    hidden = np.where(kind < mask_share, data.mask, random_item)
    return Examples(np.where(chosen, hidden, tokens).astype(np.int32), labels)


def _draw_random_shares(
    rows: np.ndarray, width: int, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three numbers in [0, 1) for each position of each row, by hashing (splitmix64)."""
    with np.errstate(over="ignore"):
        key = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(epoch)
        base = _mix_bits(rows.astype(np.uint64)[:, None] + _mix_bits(key)) + np.arange(width, dtype=np.uint64)
        drawn = [_mix_bits(base + np.uint64(salt) * np.uint64(0xBF58476D1CE4E5B9)) for salt in (1, 2, 3)]
    low, kind, other = ((each >> np.uint64(11)) / np.float64(1 << 53) for each in drawn)
    return low, kind, other


def _mix_bits(value: np.ndarray | np.uint64) -> np.ndarray:
    with np.errstate(over="ignore"):
        mixed = np.asarray(value, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def make_evaluation_sequence(data: Histories, max_len: int, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [users, max_len] that end in the mask, the right items int32 [users])."""
    back = {"val": 2, "test": 1}[split]
    target = data.starts[1:] - back
    spans = np.stack([np.maximum(data.starts[:-1], target - (max_len - 1)), target], axis=1)
    tokens = np.concatenate(
        [pad_left(data, spans, max_len - 1), np.full((data.users, 1), data.mask, np.int32)], axis=1
    )
    return tokens, data.items[target]


MOST_ROUNDS = 200  # of drawing for all users together


def draw_negatives(data: Histories, count: int, by_popularity: bool, seed: int) -> np.ndarray:
    """int32 [users, count]: different items that the user has not rated, drawn uniformly or by popularity."""
    seen = _list_seen_items(data)
    weights = np.bincount(data.items, minlength=data.vocabulary)[1:-1].astype(float)
    bounds = np.cumsum(weights if by_popularity else np.ones(data.item_count))
    generator = np.random.default_rng([seed, 1])
    found = np.zeros((data.users, count), np.int32)
    unfilled = np.arange(data.users)
    with span("prep", "negatives"):
        for _ in range(MOST_ROUNDS):
            if not len(unfilled):
                break
            chance = generator.random((len(unfilled), 2 * count)) * bounds[-1]
            pool = np.concatenate([found[unfilled], 1 + np.searchsorted(bounds, chance, "right")], axis=1)
            rated = _find_members(seen, unfilled[:, None] * np.int64(data.vocabulary) + pool)
            chosen = _first_of_row(pool) & ~rated & (pool > 0)
            place = np.cumsum(chosen, axis=1) - 1
            chosen &= place < count
            row, column = np.nonzero(chosen)
            found[unfilled[row], place[row, column]] = pool[row, column]
            unfilled = unfilled[chosen.sum(axis=1) < count]
        for user in unfilled.tolist():
            _fill_with_rare_items(data, found[user], weights if by_popularity else None, user, generator)
    return found


def _fill_with_rare_items(
    data: Histories, found: np.ndarray, weights: np.ndarray | None, user: int, generator: np.random.Generator
) -> None:
    """Draw the rest of one user's negatives, int32 [count] with zeros at the end, all at once: where a few
    items have nearly all ratings, drawing until another one comes would take forever. The distribution is
    the same: the smallest of exponential times with the weights as rates (Efraimidis and Spirakis).
    """
    times = generator.standard_exponential(data.item_count)
    if weights is not None:
        with np.errstate(divide="ignore"):  # an item without a rating is never drawn
            times /= weights
    times[data.items[data.starts[user] : data.starts[user + 1]] - 1] = np.inf
    kept = int(np.count_nonzero(found))
    times[found[:kept] - 1] = np.inf
    found[kept:] = 1 + np.argsort(times, kind="stable")[: len(found) - kept]


def _list_seen_items(data: Histories) -> np.ndarray:
    """user x vocabulary + item of every rating, sorted."""
    user = np.repeat(np.arange(data.users), np.diff(data.starts))
    return np.sort(user * np.int64(data.vocabulary) + data.items)


def count_candidates(data: Histories, asked: int | None, default: int) -> int:
    """Number of items to rank with the right one: `asked`, else `default` or fewer, unrated by all users."""
    most = int(np.diff(data.starts).max())
    if data.item_count - most < (asked or default):  # else repeated ratings of an item need not be counted
        seen = _list_seen_items(data)
        new = np.ones(len(seen), bool)
        new[1:] = seen[1:] != seen[:-1]
        most = int(np.bincount(seen[new] // data.vocabulary).max())
    left = data.item_count - most
    if left < (asked or 1):
        raise UserError(
            f"--negatives {asked or default}: one user has rated {most} of {data.item_count} items: "
            "give a smaller number, or use more items"
        )
    return min(asked or default, left)


def _first_of_row(values: np.ndarray) -> np.ndarray:
    """bool [n, k]: whether a value occurs for the first time in its row."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    new = np.ones(values.shape, bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = np.empty(values.shape, bool)
    np.put_along_axis(first, order, new, axis=1)
    return first


def _find_members(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    place = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return ordered[place] == values
