"""Settings of matrix products and memory that are faster on this processor; results change by rounding."""

import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # [m, k] x [k, n] -> [m, n]
mm: Product = torch.mm  # of the dense layers; `tune_processor` may set a faster one
FLOAT32 = 5e-6  # largest relative error of float32 products; that of bfloat16 is a thousand times larger
AMD = "AuthenticAMD"
# mallopt's parameters in glibc's malloc.h, and their values
M_TRIM_THRESHOLD, KEPT = -1, 1 << 30  # freed bytes that stay with the process
M_MMAP_THRESHOLD, LARGE = -3, 32 << 20  # glibc's maximum: larger blocks always go back to the kernel


def is_plain_float32(*tensors: torch.Tensor) -> bool:
    """Whether all are float32 on the CPU, outside of autocast and torch.compile."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)


def tune_processor() -> list[str]:
    """Switch on what helps on this processor; returns the names of what was switched on."""
    done = {
        "float32 products by oneDNN": use_onednn,
        "dense layers' products by OpenBLAS": use_openblas,
        "freed memory kept for the next step": keep_freed_memory,
    }
    return [name for name, switch_on in done.items() if switch_on()]


def use_onednn() -> bool:
    """On processors that are not Intel's MKL uses no AVX-512, and batched products take twice as long.

    oneDNN, which is also part of torch, uses it. But torch calls oneDNN for float32 products only where
    bfloat16 is allowed. Without AMX oneDNN still computes in float32, with AMX it does not: hence the trial.
    """
    if not torch.backends.mkldnn.is_available() or read_cpu_vendor() != AMD or not has_avx512():
        return False
    matmul = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    if is_float32(torch.mm) and is_float32(torch.bmm, batch=4):
        return True
    matmul.fp32_precision = before
    return False


def use_openblas() -> bool:
    """Without AVX-512, on AMD's processors, MKL is slower than the OpenBLAS that numpy has.

    OpenBLAS has its own threads, so only for ranks with one thread.
    """
    global mm
    one_thread = os.environ.get("OMP_NUM_THREADS") == "1" and torch.get_num_threads() == 1
    if read_cpu_vendor() != AMD or has_avx512() or not one_thread or not is_float32(multiply_by_numpy):
        return False
    mm = multiply_by_numpy
    return True


def multiply_by_numpy(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """float32 [m, k] x [k, n] -> [m, n]."""
    if left.size(1) == 1:  # OpenBLAS takes seven times as long
        return torch.mm(left, right)
    out = torch.empty(left.size(0), right.size(1))
    with np.errstate(all="ignore"):  # an overflow shows in the loss, as with torch's product
        np.matmul(left.detach().numpy(), right.detach().numpy(), out=out.numpy())
    return out


def has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def keep_freed_memory() -> bool:
    """Each step allocates and frees the same blocks; the kernel would return them as new, cleared pages."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGE) and mallopt(M_TRIM_THRESHOLD, KEPT))


def read_cpu_vendor() -> str:
    """The processor's vendor_id in /proc/cpuinfo, or "". Settings follow it and not timings, so that runs on
    one machine have equal results."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("vendor_id"):
                return line.split(":")[1].strip()
    return ""


def is_float32(product: Product, batch: int = 0) -> bool:
    """Whether products, also of transposed matrices, are as exact as float32. batch: of a batched product."""
    random = torch.Generator().manual_seed(0)
    lead = (batch,) if batch else ()
    left = torch.randn(*lead, 64, 512, generator=random)
    right = torch.randn(*lead, 512, 64, generator=random)
    for a, b in ((left, right), (right.mT, left.mT), (left.mT, left), (left, left.mT)):
        exact = a.double() @ b.double()
        error = (product(a, b).double() - exact).norm() / exact.norm()
        if not error < FLOAT32:
            return False
    return True
