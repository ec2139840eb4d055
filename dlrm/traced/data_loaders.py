"""torch's DataLoader: how long the loop waits for a batch, and what fetching one takes, in workers too."""

import functools
import weakref
from types import ModuleType
from typing import Any

from dlrm.runtime import trace
from dlrm.traced.hooks import as_span, replace
from dlrm.traced.steps import steps

_epochs: Any = weakref.WeakKeyDictionary()  # loader -> how often training has begun to go through it
_begun: Any = weakref.WeakKeyDictionary()  # iterator -> its epoch


def hook(torch: ModuleType) -> None:
    loader = torch.utils.data.dataloader
    replace(loader.DataLoader, "__iter__", _wrap_iter, torch)
    replace(loader._BaseDataLoaderIter, "__next__", lambda original: _wrap_next(torch, original), torch)
    fetch = torch.utils.data._utils.fetch
    for name in ("_MapDatasetFetcher", "_IterableDatasetFetcher"):
        if hasattr(fetch, name):
            replace(getattr(fetch, name), "fetch", as_span("data", "preprocess"), torch)
    replace(torch.utils.data._utils.worker, "_worker_loop", _wrap_worker, torch)


def _wrap_iter(original: Any) -> Any:
    @functools.wraps(original)
    def begin(loader: Any) -> Any:
        iterator = original(loader)
        _begun[iterator] = None  # with persistent workers it is the same iterator again
        _loaders[iterator] = weakref.ref(loader)
        return iterator

    return begin


_loaders: Any = weakref.WeakKeyDictionary()


def _find_epoch(iterator: Any, training: bool) -> int:
    """The epoch of an iterator, counted from 0 by the iterators of its loader that were trained from."""
    epoch = _begun.get(iterator)
    if epoch is None and training:
        loader = _loaders[iterator]() if iterator in _loaders else None
        epoch = 0
        if loader is not None:
            epoch = _epochs.get(loader, -1) + 1
            _epochs[loader] = epoch
        _begun[iterator] = epoch
    return epoch or 0


def _wrap_next(torch: Any, original: Any) -> Any:
    @functools.wraps(original)
    def take_batch(iterator: Any) -> Any:
        if not trace.is_tracing():
            return original(iterator)
        training = torch.is_grad_enabled()
        steps.before_batch(training, _find_epoch(iterator, training), iterator)
        try:
            with trace.span("dataloader", "fetch.iter"):
                batch = original(iterator)
        except StopIteration:
            steps.after_last_batch(training, iterator)
            raise
        steps.after_batch(training)
        return batch

    return take_batch


def _wrap_worker(original: Any) -> Any:
    @functools.wraps(original)
    def work(*args: Any, **kwargs: Any) -> Any:
        trace.name_thread("DataLoader worker")
        return original(*args, **kwargs)

    return work
