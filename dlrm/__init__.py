"""Make Criteo data, train a recommender on it, write a run folder.

In: text or datasets and a command line. Out: dataset folders, run folders, checkpoints, traces.
"""

from common.numba_cache import use_private_cache

use_private_cache()
