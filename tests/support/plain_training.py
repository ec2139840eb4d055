"""A PyTorch training as people write it, which knows nothing of this project: DDP over gloo, two workers.

usage: plain_training.py DATA OUT        DATA: made by `make_data`; OUT: for losses and checkpoints
"""

import os
import sys
from pathlib import Path

import numpy as np

ROWS, BATCH, EPOCHS = 64, 8, 2


def make_data(folder: Path) -> Path:
    draw = np.random.default_rng(1)
    (folder / "rows").mkdir(parents=True)
    for row in range(ROWS):
        np.save(folder / "rows" / f"{row}.npy", draw.normal(size=(40, 16)))
    np.save(folder / "labels.npy", draw.integers(0, 2, ROWS))
    draw.normal(size=16).astype(np.float32).tofile(folder / "scale.bin")
    np.ones(5000, np.float32).tofile(folder / "weights.bin")
    return folder


def train(data: str, out: str) -> None:
    import torch
    import torch.distributed as dist
    from torch.utils.data import DataLoader, Dataset, DistributedSampler

    class Rows(Dataset):
        def __init__(self) -> None:
            self.labels = np.load(f"{data}/labels.npy")
            self.scale = np.fromfile(f"{data}/scale.bin", np.float32)
            self.weights = np.memmap(f"{data}/weights.bin", np.float32, "r")

        def __len__(self) -> int:
            return len(self.labels)

        def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
            with open(f"{data}/rows/{row}.npy", "rb") as file:
                found = np.load(file)[0].astype(np.float32) * self.scale * self.weights[row]
            return torch.from_numpy(found), torch.tensor(float(self.labels[row]))

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    rank, rows = dist.get_rank(), Rows()
    net = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    model = torch.nn.parallel.DistributedDataParallel(net)
    # two optimizers, and gradients of two batches: an iteration is one step all the same
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (net[0], net[2])]
    sampler = DistributedSampler(rows)
    loader = DataLoader(rows, BATCH, sampler=sampler, num_workers=2)
    losses = []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for number, (inputs, labels) in enumerate(loader):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(model(inputs)[:, 0], labels)
            loss.backward()
            if number % 2:
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            losses.append(loss.item())
        with torch.no_grad():
            for inputs, _ in DataLoader(rows, ROWS):
                total = model(inputs).sum()
        dist.all_reduce(total)
        torch.save(net.state_dict(), f"{out}/rank{rank}-{epoch}.pt")
        np.save(f"{out}/rank{rank}-{epoch}.npy", np.array(losses))
    Path(f"{out}/losses{rank}.txt").write_text(
        repr((losses, total.item(), sys.argv[1:], os.getcwd(), sys.path[0]))
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    train(*sys.argv[1:3])
