"""--engine by name: the function that makes the dataset. All engines write the same bytes."""

import signal
import sys
import traceback
from collections.abc import Callable

from common.errors import printable
from dlrm.prep.job.options import PrepOptions
from dlrm.runtime import errors, ranks
from dlrm.runtime.device_io import list_folders


def run_numba(options: PrepOptions) -> None:
    """Compiled kernels on threads and MPI ranks. With --trace_dir it also writes a trace, and
    results.json: the bytes that each rank read and wrote per file, which `analysis check` compares with it.
    """
    from dlrm.prep.engines.pipeline import run
    from dlrm.prep.io.tracing import save_byte_counts, trace_command
    from dlrm.prep.job.workers import Workers

    here = ranks.find_ranks()
    with trace_command(options.trace_dir, list_folders(options), here):
        workers = Workers(here, options.workers)
        try:
            run(options, workers)
            save_byte_counts(options.trace_dir, workers)
        except errors.UserError as error:
            if not workers.error_is_shared and not workers.first:  # `main` prints the first rank's errors
                print(f"dlrm.prep: {printable(error)}", file=sys.stderr)
            workers.abort_ranks(errors.USAGE)
            raise
        except KeyboardInterrupt:
            workers.abort_ranks(128 + signal.SIGINT)
            raise
        except BaseException:
            if workers.size > 1:
                traceback.print_exc()
            workers.abort_ranks(1)
            raise


def run_plain(options: PrepOptions) -> None:
    """The reference that the other engines are tested against: numpy, one line at a time, all in memory."""
    from dlrm.prep.engines.reference import run

    run(options)


def run_spark(options: PrepOptions) -> None:
    """PySpark: local, or on the cluster that its environment variables name."""
    from dlrm.prep.engines.spark import run

    run(options)


ENGINES: dict[str, Callable[[PrepOptions], None]] = {
    "numba": run_numba,
    "plain": run_plain,
    "spark": run_spark,
}
