"""This process's place in the job: rank, local rank and sizes, whatever launcher started it."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

# launcher.sh sets the first of each row; the others serve a bare mpiexec or srun.
NAMES = {
    "rank": ("RANK", "PMI_RANK", "PALS_RANKID", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"),
    "local_rank": (
        "LOCAL_RANK", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID", "MPI_LOCALRANKID",
        "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID",
    ),
    "world_size": ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS"),
    "local_world_size": (
        "LOCAL_WORLD_SIZE", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE", "MPI_LOCALNRANKS",
        "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Ranks:
    """This process's rank, and the size of the job. In the code a value of it is called `here`."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    host: str = ""

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes and prints for all."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        return max(1, self.world_size // max(1, self.local_world_size))


def find_ranks(environ: Mapping[str, str] = os.environ) -> Ranks:
    """From the environment, of which `NAMES` lists the variables; one rank where there are none."""
    mpi_size = max(int(environ.get(name) or 0) for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE"))
    # A WORLD_SIZE smaller than MPI's is left over from the user's shell: then RANK and the others are, too.
    left_over = int(environ.get("WORLD_SIZE") or 0) < mpi_size

    def read_value(meaning: str, default: int) -> int:
        names = NAMES[meaning][left_over:]
        return next((int(environ[name]) for name in names if environ.get(name)), default)

    world = read_value("world_size", 1)
    rank = read_value("rank", 0)
    return Ranks(
        rank=rank,
        local_rank=read_value("local_rank", 0 if world == 1 else rank),
        world_size=world,
        local_world_size=read_value("local_world_size", world),
        host=socket.gethostname(),
    )
