"""What pays on this machine's processor and changes results by rounding at most; nothing on CUDA."""

import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
mm: Product = torch.mm  # of the towers; `tune_processor` may put a faster one here
FLOAT32 = 5e-6  # relative error that products in float32 stay under; bfloat16's is a thousand times that
AMD = "AuthenticAMD"
# mallopt's names in glibc's malloc.h, and what they are set to
M_TRIM_THRESHOLD, KEPT = -1, 1 << 30  # bytes that stay with the process when they are freed
M_MMAP_THRESHOLD, LARGE = -3, 32 << 20  # glibc's limit: blocks from this size on always go back


def is_plain_float32(*tensors: torch.Tensor) -> bool:
    """float32 on the CPU, to be computed with as it stands."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)


def tune_processor() -> list[str]:
    """Switch on what helps on this processor; returns the names of what was switched on."""
    done = {
        "float32 products by oneDNN": use_onednn,
        "towers' products by OpenBLAS": use_openblas,
        "freed memory kept for the next step": keep_freed_memory,
    }
    return [name for name, switch_on in done.items() if switch_on()]


def use_onednn() -> bool:
    """MKL holds back on processors that are not Intel's: no AVX-512, batched products at half speed.

    oneDNN, which torch brings too, does not, but torch asks it for float32 products only where bfloat16 is
    allowed, and with AVX-512. Without AMX it computes in float32 all the same, with AMX not: hence the trial.
    """
    if not torch.backends.mkldnn.is_available() or read_cpu_vendor() != AMD or not has_avx512():
        return False
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    if is_float32(torch.mm) and is_float32(torch.bmm, batch=4):
        return True
    matmul.fp32_precision = before
    return False


def use_openblas() -> bool:
    """Without AVX-512 MKL is slower than OpenBLAS on AMD's processors, which numpy brings.

    It has threads of its own, so only for ranks of one thread.
    """
    global mm
    alone = os.environ.get("OMP_NUM_THREADS") == "1" and torch.get_num_threads() == 1
    if read_cpu_vendor() != AMD or has_avx512() or not alone or not is_float32(multiply_by_numpy):
        return False
    mm = multiply_by_numpy
    return True


def multiply_by_numpy(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if left.size(1) == 1:  # OpenBLAS takes seven times as long
        return torch.mm(left, right)
    out = torch.empty(left.size(0), right.size(1))
    with np.errstate(all="ignore"):  # a loss that overflows is told in other words
        np.matmul(left.detach().numpy(), right.detach().numpy(), out=out.numpy())
    return out


def has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def keep_freed_memory() -> bool:
    """Every step allocates and frees the same blocks: given back, they come again as new, zeroed pages."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGE) and mallopt(M_TRIM_THRESHOLD, KEPT))


def read_cpu_vendor() -> str:
    """The processor's maker as /proc/cpuinfo has it, or nothing. Not a timing: runs must come out alike."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("vendor_id"):
                return line.split(":")[1].strip()
    return ""


def is_float32(product: Product, batch: int = 0) -> bool:
    """Whether products, forward and of both transposes, are as exact as float32 allows."""
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
