"""What events mean, and how latencies are binned."""

import numpy as np
import pytest

from analysis.tables import calls
from analysis.trace.classify import find_kind, find_operation, find_part, is_understood


def test_latency_buckets_are_close() -> None:
    us = np.unique(np.concatenate([np.arange(5000), 2 ** np.arange(1, 40), 3 ** np.arange(1, 25)]))
    bucket = calls.find_latency_bucket(us)
    assert (np.diff(bucket) >= 0).all()
    middle = calls.find_bucket_middle(bucket)
    assert (middle[us < 256] == us[us < 256]).all()
    assert (np.abs(middle - us) <= us / 100).all()


@pytest.mark.parametrize(
    ("cat", "name", "kind"),
    [
        ("torchrec", "[output_dist_wait]_[model.sparse_arch.ebc]_[row_wise]", "communication"),
        ("torchrec", "[lookup]_[model.sparse_arch.ebc]_[row_wise]", "compute"),
        ("torchrec", "all2all_data:kjt splits", "communication"),
        ("torchrec", "copy_batch_to_gpu", "copy"),
        ("torchrec", "next_batch", None),
        ("data", "wait", "wait"),  # until November 2026
        ("ssd", "wait", "wait"),  # for rows of tables in files, inside of
        ("ssd", "fetch", None),
        ("checkpoint", "save", None),
        ("comm", "all_reduce", "communication"),
        ("dataloader", "fetch.iter", "wait"),
        ("dataloader", "fetch.block", None),  # the body of the loop over batches, which is not waiting
        ("data", "item", None),
        ("data", "preprocess", "compute"),
        ("data", "data.io.read", "io"),
        ("checkpoint", "checkpoint.io.write", "io"),
        ("checkpoint", "capture", None),
        ("compute", "step", "compute"),
        ("pipeline", "epoch.block", None),
        ("ai_framework", "TorchFramework.compute", "compute"),
        ("ai_framework", "TorchFramework.trace_object", None),
        ("data_loader", "TorchDataset.__getitem__", None),
        ("reader", "NPZReader.open", "io"),
        ("dlio_benchmark", "loop.iter", "wait"),
        ("nobody", "knows", None),
    ],
)
def test_kinds(cat: str, name: str, kind: str | None) -> None:
    assert find_kind(cat, name) == kind


@pytest.mark.parametrize(
    ("name", "op"),
    [("pread64", "read"), ("fread", "read"), ("writev", "write"), ("openat", "open"), ("fopen64", "open"),
     ("__xstat64", "stat"), ("fstatat", "stat"), ("lseek64", "seek"), ("fsync", "sync"), ("mkdir", "other")],
)  # fmt: skip
def test_operations(name: str, op: str) -> None:
    assert find_operation(name) == op


@pytest.mark.parametrize(
    ("cat", "name", "part"),
    [("train", "step", "step"), ("train", "epoch", "epoch"), ("eval", "evaluate", "evaluation"),
     ("train", "report", None), ("dataloader", "fetch.block", "step"), ("dataloader", "fetch.iter", None),
     ("pipeline", "epoch.block", "epoch"), ("pipeline", "train", "training"),
     ("pipeline", "test", "evaluation"), ("pipeline", "evaluate", "evaluation"),
     ("compute", "step", None), ("dlio_benchmark", "DLIOBenchmark._train", "epoch"),
     ("dlio_benchmark", "DLIOBenchmark._eval", "evaluation"), ("POSIX", "step", None)],
)  # fmt: skip
def test_parts(cat: str, name: str, part: str | None) -> None:
    assert find_part(cat, name) == part


def test_what_is_understood() -> None:
    """A span that only groups others is known all the same."""
    assert is_understood("pipeline", "epoch.block") and is_understood("POSIX", "read")
    assert is_understood("checkpoint", "capture") and not is_understood("strange", "thing")
