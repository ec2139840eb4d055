"""How often each id was looked up in training: --collect_multi_hot_freqs_stats.

In: batches. Out: .npz files, one for each rank.
"""

import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, os_errors_as_user_errors, printable
from common.inputs import open_regular_file
from common.memory import refuse_too_large
from common.owned import write_file
from dlrm.data.prefetch import Prefetcher

FREQUENCIES_COMMENT = b"dlrm-io: how often each id was looked up"  # of the .npz files, which are zip files


class IdFrequencies:
    """How often this rank looked up each id in training: before and after one id became several (multi-hot).

    before, after  a list of arrays int64 [rows of the table], one per feature: the count of each id
    folder, name   where `save` puts them: stats_pre_hash_NAME.npz and stats_post_hash_NAME.npz. UserError at
                   once where one of them is there and is not such a file: not after hours of training
    """

    def __init__(self, sizes: list[int], folder: str, name: str) -> None:
        refuse_too_large(
            16 * sum(sizes), "--collect_multi_hot_freqs_stats", "leave it out, or use smaller tables"
        )
        self.before = [np.zeros(size, np.int64) for size in sizes]
        self.after = [np.zeros(size, np.int64) for size in sizes]
        self.folder, self.name = Path(folder), name
        for when in ("pre", "post"):
            path = self._make_path(when)
            if os.path.lexists(path) and not is_frequencies_file(path):
                raise UserError(
                    f"{printable(path)}: is there and was not made by this program; move it away or name "
                    "another --output_dir"
                )

    def count_batch(self, batch: Any) -> None:
        """Add the ids of a batch in which `MultiHotMaker` has made several of each."""
        features = batch.sparse_features
        ids = np.split(features.values().numpy(), features.offset_per_key()[1:-1])
        rows = features.stride()
        for feature, values in enumerate(ids):
            size = len(self.after[feature])
            self.after[feature] += np.bincount(values, minlength=size)
            # the first of the ids made from one is that one
            self.before[feature] += np.bincount(values.reshape(rows, -1)[:, 0], minlength=size)

    def save(self) -> None:
        """One .npz per rank: for each feature, by its number, an array of counts by id."""
        with os_errors_as_user_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        for when, counts in (("pre", self.before), ("post", self.after)):
            arrays: dict[str, Any] = {str(feature): each for feature, each in enumerate(counts)}
            path = self._make_path(when)
            with write_file(path, is_frequencies_file) as partial, os_errors_as_user_errors(path):
                with open(partial, "wb") as file:
                    np.savez(file, **arrays)
                with zipfile.ZipFile(partial, "a") as archive:
                    archive.comment = FREQUENCIES_COMMENT

    def _make_path(self, when: str) -> Path:
        return self.folder / f"stats_{when}_hash_{self.name}.npz"


def is_frequencies_file(path: Path) -> bool:
    """Whether `IdFrequencies` has made this file: a zip file's comment is its last bytes."""
    try:
        with open(
            path, "rb", opener=lambda name, flags: open_regular_file(name, flags | os.O_NOFOLLOW)
        ) as file:
            file.seek(-len(FREQUENCIES_COMMENT), os.SEEK_END)
            return file.read() == FREQUENCIES_COMMENT
    except OSError:
        return False


class ObservedLoader:
    """A loader that calls `observe` with every batch; otherwise like the loader that it wraps."""

    def __init__(self, loader: Prefetcher, observe: Callable[[Any], None]) -> None:
        self._loader, self._observe = loader, observe

    def __getattr__(self, name: str):
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            self._observe(batch)
            yield batch
