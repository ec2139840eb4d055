"""From a dataset folder to batches on this rank: readers, the order of rows, collating, prefetching.

In: NPY, npz or Parquet files (data/criteo.py says what a folder looks like). Out: torchrec batches.
"""
