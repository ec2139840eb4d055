"""Published settings, as functions that give the options their defaults: `--preset NAME`.

beauty, steam, ml-1m and ml-20m are the runs of the paper (arxiv.org/abs/1904.06690) with 64 numbers an item:
the configurations and scripts that its authors published. Their batch of 256 is of one GPU; here it is per
rank.
"""

from collections.abc import Callable, Mapping
from typing import Any

# the demo: takes a minute on a laptop and comes close to the best possible score
TOY = {
    "dataset_name": "markov", "random_user_count": 1500, "random_item_count": 150, "random_size": 30_000,
    "max_len": 20, "dupe_factor": 1, "mask_prob": 0.2, "emb_dim": 32, "dropout": 0.0, "lr": 0.005,
    "train_batch_size": 16, "num_epochs": 12, "seed": 1,
}  # fmt: skip

PAPER = {
    "output": "tied", "emb_dim": 64, "nhead": 2, "num_layers": 2, "optimizer": "adamw", "lr": 1e-4,
    "eps": 1e-6, "weight_decay": 0.01, "grad_clip": 5.0, "lr_warmup_steps": 100, "train_batch_size": 256,
    "dupe_factor": 10, "mask_share": 1.0, "negatives": 100, "negative_sampling": "popularity",
    "num_epochs": 1_000_000,  # max_steps ends it
}  # fmt: skip


def make_paper_run(
    dataset_name: str,
    max_len: int,
    mask_prob: float,
    dropout: float,
    attention_dropout: float,
    window_share: float,
    steps: int = 400_000,
    **filters: int,
) -> dict[str, Any]:
    """What the paper's runs differ in; filters: options that leave out users and items."""
    return {
        **PAPER, "dataset_name": dataset_name, "max_len": max_len, "mask_prob": mask_prob, "dropout": dropout,
        "attention_dropout": attention_dropout, "window_share": window_share, "max_steps": steps,
        "lr_decay_steps": steps, **filters,
    }  # fmt: skip


# the files of Beauty and Steam that the authors published are filtered already
PRESETS: dict[str, Callable[[], Mapping[str, Any]]] = {
    "toy": lambda: TOY,
    "beauty": lambda: make_paper_run("text", 50, 0.6, 0.5, 0.2, 0.1, min_user_count=3),
    "steam": lambda: make_paper_run("text", 50, 0.4, 0.1, 0.1, 0.5, steps=800_000, min_user_count=3),
    "ml-1m": lambda: make_paper_run("ml-1m", 200, 0.2, 0.2, 0.2, 0.5, min_item_count=5),
    "ml-20m": lambda: make_paper_run("ml-20m", 200, 0.2, 0.1, 0.1, 0.5),
}
