"""--engine by name: the function that makes the dataset. All engines write the same bytes."""

import json
import signal
import sys
import traceback
from collections.abc import Callable

from common.errors import printable
from common.owned import OutputFolder
from dlrm.prep.job.options import PrepOptions
from dlrm.runtime import errors, ranks, trace
from dlrm.runtime.device_io import list_folders


def run_numba(options: PrepOptions) -> None:
    """Compiled kernels on threads and MPI ranks. With --trace_dir it also writes a trace, and
    results.json: the bytes that each rank read and wrote per file, which `analysis check` compares with it.
    """
    from dlrm.prep.engines.pipeline import run
    from dlrm.prep.io.files import bytes_read, bytes_written, os_errors_as_user_errors
    from dlrm.prep.job.workers import Workers

    here = ranks.find_ranks()
    if options.trace_dir:
        with os_errors_as_user_errors(options.trace_dir):
            trace.start_tracing(options.trace_dir, here, role="prep", folders=list_folders(options))
    workers = Workers(here, options.workers)
    try:
        run(options, workers)
        counters = workers.all_gather((dict(bytes_read), dict(bytes_written)))
        if options.trace_dir and workers.first:
            results = {
                "bytes_read": {str(rank): read for rank, (read, _) in enumerate(counters)},
                "bytes_written": {str(rank): written for rank, (_, written) in enumerate(counters)},
                "world_size": workers.size,
            }
            text = json.dumps(results, indent=1) + "\n"
            OutputFolder(options.trace_dir).write("results.json", text, mode=0o666)
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
    finally:
        trace.stop_tracing()


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
