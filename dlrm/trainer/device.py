"""Where a program turns its device's fast path on."""

import torch

from dlrm.runtime import accelerate


def enable_fast_path(device: torch.device, cpu_fast_path: bool) -> list[str]:
    """On a CPU rank, unless --no-cpu_fast_path: switch dlrm.cpu on; returns what was tuned, for config.json.

    Call it before the process group is made. On CUDA nothing of dlrm.cpu is imported.
    """
    if not accelerate.is_cpu_fast_path_usable(device, cpu_fast_path):
        accelerate.use_hooks(accelerate.PLAIN)
        return []
    from dlrm.cpu import fast_path  # the only import of dlrm.cpu from outside it

    return fast_path.enable_fast_path()
