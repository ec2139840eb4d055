"""The ways to preprocess, by name; all give the same bytes: compiled (numba), reference (plain), Spark.

In: options. Out: a published dataset folder.
"""
