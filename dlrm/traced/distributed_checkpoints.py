"""torch.distributed.checkpoint: saving and loading as spans. Python writes its files, call by call."""

from types import ModuleType

from dlrm.traced.checkpoints import as_checkpoint
from dlrm.traced.hooks import replace

DIRECTIONS = {
    "save": "save", "save_state_dict": "save", "async_save": "save",
    "load": "load", "load_state_dict": "load",
}  # fmt: skip


def hook(checkpoint: ModuleType) -> None:
    for name, direction in DIRECTIONS.items():
        if hasattr(checkpoint, name):
            replace(checkpoint, name, lambda original, to=direction: as_checkpoint(original, to), checkpoint)
