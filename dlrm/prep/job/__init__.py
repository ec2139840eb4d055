"""What was asked for, who does the work, and how far it is.

In: the command line and MPI's ranks. Out: options, workers that share items, a progress line.
"""
