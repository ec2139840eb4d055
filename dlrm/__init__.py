"""Make Criteo data, train a recommender on it, write a run folder."""

from common.numba_cache import use_private_cache

use_private_cache()
