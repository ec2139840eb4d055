"""What pays on CPU ranks only: collectives through shared memory, a faster BLAS, large pages. A shed of its own.

In: a process group's store, sharded modules. Out: the same results sooner; CUDA ranks use nothing of it.
"""
