"""The ways to do the same thing, by name; all give the same bytes."""

import json
import signal
import sys
import traceback
from collections.abc import Callable

from common.errors import printable
from common.owned import OutputFolder
from dlrm.prep.job.options import PrepOptions
from dlrm.runtime import errors, ranks, trace


def run_numba(options: PrepOptions) -> None:
    """Compiled kernels, threads, MPI ranks; with --trace_dir also a trace and what it must account for."""
    from dlrm.prep.engines.pipeline import run
    from dlrm.prep.io.files import bytes_read, bytes_written, explained
    from dlrm.prep.job.workers import Workers

    here = ranks.find_ranks()
    if options.trace_dir:
        with explained(options.trace_dir):
            trace.start_tracing(options.trace_dir, here, role="prep")
    team = Workers(here, options.workers)
    try:
        run(options, team)
        everywhere = team.gather((dict(bytes_read), dict(bytes_written)))
        if options.trace_dir and team.first:
            results = {
                "bytes_read": {str(rank): read for rank, (read, _) in enumerate(everywhere)},
                "bytes_written": {str(rank): written for rank, (_, written) in enumerate(everywhere)},
                "world_size": team.size,
            }
            text = json.dumps(results, indent=1) + "\n"
            OutputFolder(options.trace_dir).write("results.json", text, mode=0o666)
    except errors.UserError as error:
        if not team.agreed and not team.first:
            print(f"dlrm.prep: {printable(error)}", file=sys.stderr)
        team.abort(errors.USAGE)
        raise
    except KeyboardInterrupt:
        team.abort(128 + signal.SIGINT)
        raise
    except BaseException:
        if team.size > 1:
            traceback.print_exc()
        team.abort(1)
        raise
    finally:
        trace.stop_tracing()


def run_plain(options: PrepOptions) -> None:
    """The reference: numpy, a line at a time; what the others are compared with."""
    from dlrm.prep.engines.reference import run

    run(options)


def run_spark(options: PrepOptions) -> None:
    from dlrm.prep.engines.spark import run

    run(options)


ENGINES: dict[str, Callable[[PrepOptions], None]] = {
    "numba": run_numba,
    "plain": run_plain,
    "spark": run_spark,
}
