"""Criteo TSV to training-ready NPY or Parquet."""
