"""The warning before ranks of several threads start on cores that are taken."""

import pytest
from support.ranks import python

from dlrm.runtime.busy_cores import describe_busy_cores
from dlrm.runtime.ranks import Ranks

TWO = {"OMP_NUM_THREADS": "2"}


def here(ranks: int) -> Ranks:
    return Ranks(world_size=ranks, local_world_size=ranks, host="n1")


def test_a_busy_host_is_named_with_the_remedy() -> None:
    text = describe_busy_cores(here(1), 5.0, 2, TWO)
    assert text and text.startswith("n1: the load is 5.0 on 2 cores, which 1 rank of 2 threads ")
    assert "DLRM_THREADS=1" in text and "OMP_WAIT_POLICY=passive" in text


@pytest.mark.parametrize(
    ("ranks", "load", "cores", "environ"),
    [
        (1, 0.3, 2, TWO),  # idle
        (1, 5.0, 2, {"OMP_NUM_THREADS": "1"}),  # one thread does not wait for another
        (1, 5.0, 2, TWO | {"OMP_WAIT_POLICY": "PASSIVE"}),
        (4, 20.0, 64, {"OMP_NUM_THREADS": "16"}),
    ],
)
def test_otherwise_nothing_is_said(ranks: int, load: float, cores: int, environ: dict[str, str]) -> None:
    assert describe_busy_cores(here(ranks), load, cores, environ) is None


def test_a_number_of_threads_that_is_none() -> None:
    text = describe_busy_cores(here(1), 5.0, 2, {"OMP_NUM_THREADS": "²"})
    assert text and "1 rank of 2 threads" in text


def test_the_remedy_works_without_launcher_sh() -> None:
    lines = [
        "from dlrm.runtime import entry",
        "def main(here):",
        " import torch",
        " print(torch.get_num_threads())",
    ]
    done = python("-c", "\n".join([*lines, "entry.run_entry(main)"]), DLRM_THREADS="1", OMP_NUM_THREADS="2")
    assert done.stdout == "1\n", done.stderr
