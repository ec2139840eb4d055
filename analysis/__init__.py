"""Read a run folder: traces to Perfetto, tables, a report. Needs no torch, and nothing of dlrm/.

In: RUN. Out: .pftrace, report.html, summary.json, tables/*.csv, exit codes.
"""

from common.numba_cache import use_private_cache

use_private_cache()
