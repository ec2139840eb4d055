"""The same tables from traces larger than one machine: a Dask cluster reads the ranks, parts come back.

`local` starts two worker processes here; `pbs` and `slurm` ask the scheduler for them as the user's Dask
configuration describes (jobqueue.pbs or jobqueue.slurm in ~/.config/dask); host:port is a scheduler that
already runs. Workers need this package and the trace folder at the same paths.
"""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext, suppress
from typing import Any, TypeVar

from analysis.tables.cores import Map
from analysis.trace.launches import Launch
from common.errors import UserError, printable

T = TypeVar("T")
WORKERS = 2
MAX_JOBS = 16  # in a queue
SCHEDULERS = {"pbs": "PBSCluster", "slurm": "SLURMCluster"}  # the classes of dask_jobqueue


def map_on_cluster(where: str) -> Map:
    """What is called instead of a `Cores`."""
    if where not in ("local", *SCHEDULERS) and not re.fullmatch(r"(tcp://|tls://)?.+:\d+", where):
        raise UserError(f"--dask {where}: local, pbs, slurm, or the host:port of a scheduler that runs")
    try:
        import distributed  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"--dask {where}: pip install -r requirements/extra.txt ({error})") from error

    def run_on_cluster(function: Callable[[Launch], T], work: list[Launch], /) -> Iterator[T]:
        answers: list[str] = []
        with ExitStack() as stack:
            cluster = _start_cluster(where, stack, len(work), answers)
            try:
                client = stack.enter_context(distributed.Client(cluster, timeout=60))
            except (OSError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"--dask {where}: {reason}; does a scheduler listen there?") from error
            for future in _submit_all(client, function, work):
                _wait_for(future, where, answers)
                yield future.result()

    return run_on_cluster


def _start_cluster(where: str, stack: ExitStack, jobs: int, answers: list[str]) -> Any:
    """A local cluster, one of a scheduler's jobs, or the address of a scheduler that runs already.

    answers: gets the scheduler's words about each job that it did not take, and "" for those that it took.
    """
    import distributed  # pyright: ignore[reportMissingImports]

    if where == "local":
        return stack.enter_context(
            distributed.LocalCluster(
                n_workers=min(WORKERS, jobs),
                silence_logs=logging.ERROR,
                threads_per_worker=1,
                dashboard_address=":0",
                host="127.0.0.1",
            )
        )
    if where in SCHEDULERS:
        try:
            import dask_jobqueue  # pyright: ignore[reportMissingImports]

            kind = _note_answers(getattr(dask_jobqueue, SCHEDULERS[where]), answers)
            cluster = kind()
            stack.callback(_close, cluster, answers)
        except (ImportError, ValueError, TypeError) as error:  # no queue, cores or memory configured
            raise UserError(
                f"--dask {where}: {error}; see jobqueue.{where} in ~/.config/dask/jobqueue.yaml"
            ) from error
        cluster.adapt(minimum=1, maximum=min(MAX_JOBS, jobs))
        return cluster
    return where


def _note_answers(kind: Any, answers: list[str]) -> Any:
    """dask_jobqueue's class of clusters, which by itself would log an error and never end."""
    for name in ("asyncio", "distributed", "tornado.application"):
        logging.getLogger(name).setLevel(logging.CRITICAL)

    class Job(kind.job_cls):
        async def start(self) -> None:
            try:
                await super().start()
            except Exception as error:
                lines = str(error).strip().splitlines()
                answers.append(lines[-1] if lines else type(error).__name__)
                raise
            answers.append("")

    class Cluster(kind):
        job_cls = Job

    return Cluster


def _close(cluster: Any, answers: list[str]) -> None:
    with suppress(AssertionError) if any(answers) else nullcontext():  # it expects that its jobs have run
        cluster.close()


def _submit_all(client: Any, function: Callable[[Launch], T], work: list[Launch]) -> list[Any]:
    """Futures, in the order of the ranks. The largest first, so that no worker ends up alone with one."""
    large = sorted(work, key=lambda job: -sum(path.stat().st_size for path in job.files))
    futures = {(job.launch, job.rank): client.submit(function, job, pure=False) for job in large}
    return [futures[job.launch, job.rank] for job in work]


def _wait_for(future: Any, where: str, answers: list[str]) -> None:
    """UserError where nobody will work on it, because the scheduler has not taken a single job."""
    import distributed  # pyright: ignore[reportMissingImports]

    while not future.done():
        try:
            distributed.wait(future, timeout=1)
        except distributed.TimeoutError:
            if answers and all(answers):
                raise UserError(
                    f"--dask {where}: no job was taken: {printable(answers[0])}; see jobqueue.{where} in "
                    "~/.config/dask/jobqueue.yaml"
                ) from None
