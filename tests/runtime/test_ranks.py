"""A rank finds its number, whatever started it."""

import pytest

from dlrm.runtime.ranks import find_ranks

MPI = {"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "2"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 0, 1, 1)),
        (MPI, (1, 1, 2, 2)),
        (TORCHRUN, (3, 3, 8, 4)),
        (TORCHRUN | MPI, (3, 3, 8, 4)),  # mpiexec starts one torchrun a node
        (ALONE | MPI, (1, 1, 2, 2)),  # two ranks that each train alone would call themselves the first
        (SLURM, (5, 1, 6, 2)),
    ],
)  # fmt: skip
def test_the_launchers_names(environment: dict[str, str], expected: tuple[int, ...]) -> None:
    rank = find_ranks(environment)
    assert (rank.rank, rank.local_rank, rank.world_size, rank.local_world_size) == expected
