"""Criteo TSV to training-ready NPY or Parquet, in constant memory, on threads, processes and MPI ranks.

In: day_0, day_1, ... Out: a dataset folder with meta.json. Entry: python -m dlrm.prep.
"""
