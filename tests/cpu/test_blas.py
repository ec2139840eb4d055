"""The choice of BLAS changes the speed, not the numbers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dlrm.cpu import blas

ROOT = Path(__file__).parents[2]


def rounded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.bfloat16() @ b.bfloat16()).float()


def test_the_trial_tells_float32_from_bfloat16() -> None:
    assert blas.is_float32(torch.mm)
    assert blas.is_float32(torch.bmm, batch=3)
    assert not blas.is_float32(rounded)
    assert not blas.is_float32(rounded, batch=3)
    assert not blas.is_float32(lambda a, b: a @ b * float("nan"))


@pytest.mark.filterwarnings("error")
def test_products_by_numpy_are_torchs() -> None:
    assert blas.is_float32(blas.multiply_by_numpy)
    for shape in ((5, 7, 3), (5, 1, 3), (5, 7, 1), (0, 7, 3)):
        left, right = torch.randn(shape[:2]), torch.randn(shape[1:], requires_grad=True)
        for one, other in ((left, right), (right.t(), left.t())):
            torch.testing.assert_close(blas.multiply_by_numpy(one, other), torch.mm(one, other).detach())
    huge = torch.full((2, 2), 1e30)
    huge[1, 1] = float("nan")
    found = blas.multiply_by_numpy(huge, huge)
    assert found[0, 0] == float("inf") and found[1, 1].isnan()


def test_after_tuning_products_are_float32_still() -> None:
    code = (
        "import torch; from dlrm.cpu import blas; done = blas.tune_processor();"
        "a, b = torch.randn(2048, 415), torch.randn(415, 512); exact = a.double() @ b.double();"
        "error = ((a @ b).double() - exact).norm() / exact.norm(); assert error < 5e-6, error;"
        "switched = torch.backends.mkldnn.matmul.fp32_precision == 'bf16';"
        "assert switched == ('float32 products by oneDNN' in done), done"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_freed_memory_is_used_again() -> None:
    """Once the heap has settled no page comes anew; 20 MB are 4,882 pages."""
    code = (
        "import resource, torch; from dlrm.cpu import blas; done = blas.keep_freed_memory();"
        "fresh = lambda: torch.zeros(5_000_000).sum(); [fresh() for _ in range(30)];"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt; [fresh() for _ in range(10)];"
        "print(done, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "THP_MEM_ALLOC_ENABLE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    kept, faults = done.stdout.split()
    assert kept == "True" and int(faults) < 500, done.stderr
