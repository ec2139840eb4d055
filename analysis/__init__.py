"""Read a run folder: traces to Perfetto, tables and a report. Needs no torch."""

from common.numba_cache import use_private_cache

use_private_cache()
