"""The other side of bert4rec.py, run under torchrun: torchrec's example, or a loop like it, on our rows.

With --reference_path the model, the dataset, the loader and the training loop are the example's own; the
rows, their order and the first weights are ours, so that the losses can be compared. Without it: the same
work, rebuilt with torch alone (every logit of every position, a loader that collates row by row, DDP).
"""

import argparse
import contextlib
import io
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from dlrm.config.parser import parse_options
from dlrm.embeddings.tables import initialize_tables
from dlrm.models.bert4rec import build
from dlrm.models.bert4rec.dataloaders import open_datasets
from dlrm.models.bert4rec.options import BertConfig
from dlrm.runtime.ranks import find_ranks

Row = tuple[torch.Tensor, torch.Tensor]


class Rebuilt(nn.Module):
    """The example's model in torch's own parts."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, layers: int) -> None:
        """vocabulary: items, with padding and mask. length: tokens of a sequence. width: of an embedding."""
        super().__init__()
        self.items = nn.Embedding(vocabulary, width)
        nn.init.uniform_(self.items.weight, -1, 1)
        self.places = nn.Parameter(torch.randn(length, width))
        self.norm = nn.LayerNorm([length, width])
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, 0.0, "relu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.out = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.items(tokens) + self.places)
        for block in self.blocks:
            x = block(x, src_key_padding_mask=tokens == 0)
        return self.out(x)


def take_rows(cfg: BertConfig, steps: int) -> tuple[list[Row], int]:
    """What our loader gives this rank in so many steps, row by row."""
    sets = open_datasets(cfg, find_ranks())
    rows: list[Row] = []
    batches = iter(sets.train.batches)
    for _ in range(steps):
        batch = next(batches)
        rows += zip(batch.tokens.long(), batch.labels, strict=True)  # type: ignore[attr-defined]
    return rows, sets.data.vocabulary


def train_rebuilt(cfg: BertConfig, rows: list[Row], vocabulary: int) -> tuple[float, float]:
    """Seconds and mean loss, as `time_epoch` says. rows: (tokens, labels), a label 0 where nothing is
    hidden.
    """
    model = cfg.model
    module = Rebuilt(vocabulary, cfg.data.max_len, model.emb_dim, model.nhead, model.num_layers)
    trained = DistributedDataParallel(module)
    optimizer = torch.optim.Adam(trained.parameters(), lr=cfg.optim.lr)

    def train_epoch(part: list[Row]) -> float:
        losses = []
        for tokens, labels in DataLoader(part, batch_size=cfg.data.train_batch_size):  # type: ignore[arg-type]
            optimizer.zero_grad()
            logits = trained(tokens)
            loss = F.cross_entropy(logits.view(-1, vocabulary), labels.view(-1), ignore_index=0)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return sum(losses) / len(losses)

    return time_epoch(train_epoch, rows, cfg.data.train_batch_size)


def train_example(cfg: BertConfig, rows: list[Row], vocabulary: int, folder: str) -> tuple[float, float]:
    """torchrec's own, driven from outside; nothing of it is changed."""
    sys.path.insert(0, folder)
    import bert4rec_main as theirs  # pyright: ignore[reportMissingImports]
    import pandas
    from dataloader.bert4rec_movielens_dataloader import (  # pyright: ignore[reportMissingImports]
        Bert4RecTrainDataset,
    )

    model = cfg.model
    module = theirs.BERT4Rec(
        vocabulary, cfg.data.max_len, emb_dim=model.emb_dim, nhead=model.nhead, num_layers=model.num_layers,
        dropout=model.dropout,
    )  # fmt: skip
    ours = build.build_bert4rec(cfg, vocabulary, torch.device("cpu")).model
    weights = {name: weight for name, weight in ours.state_dict().items() if not weight.is_meta}
    missing, unexpected = module.load_state_dict(weights, strict=False)
    assert len(missing) == 1 and not unexpected, (missing, unexpected)
    initialize_tables(module, cfg.run.seed or 0, build.choose_first_weights(cfg))
    trained = DistributedDataParallel(module)
    optimizer = torch.optim.Adam(trained.parameters(), lr=cfg.optim.lr)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=25, gamma=1.0)

    def train_epoch(part: list[Row]) -> float:
        lists = [{"seqs": tokens.tolist(), "labels": labels.tolist()} for tokens, labels in part]
        frame = pandas.DataFrame(lists)
        loader = DataLoader(Bert4RecTrainDataset(frame), batch_size=cfg.data.train_batch_size)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            begun[0] = time.perf_counter()
            theirs._train_one_epoch(trained, loader, torch.device("cpu"), optimizer, schedule, 0)
        found = re.search(r"average loss ([\d.]+)", printed.getvalue())
        return float(found[1]) if found else float("nan")  # only rank 0 prints it

    begun = [0.0]
    return time_epoch(train_epoch, rows, cfg.data.train_batch_size, begun)


def time_epoch(
    train_epoch: Any, rows: list[Row], batch: int, begun: list[float] | None = None
) -> tuple[float, float]:
    """(seconds of all steps but the first, mean loss of those)."""
    train_epoch(rows[:batch])
    dist.barrier()
    started = begun or [0.0]
    started[0] = time.perf_counter()
    loss = train_epoch(rows[batch:])
    dist.barrier()
    return time.perf_counter() - started[0], loss


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference_path")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args, words = parser.parse_known_args()
    cfg = parse_options(BertConfig, words, "bert4rec_reference", "")
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    rows, vocabulary = take_rows(cfg, args.steps)
    seconds, loss = (
        train_example(cfg, rows, vocabulary, args.reference_path)
        if args.reference_path
        else train_rebuilt(cfg, rows, vocabulary)
    )
    if dist.get_rank() == 0:
        count = (args.steps - 1) * cfg.data.train_batch_size * dist.get_world_size()
        args.out.write_text(json.dumps({"samples_per_second": count / seconds, "loss": loss}))
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
