"""Options and parallel workers of a run.

In: the command line and MPI's ranks. Out: options, workers that share items.
"""
