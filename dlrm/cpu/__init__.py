"""For CPU ranks only: collectives through shared memory, a faster BLAS, large pages.

In: a process group's store, sharded modules. Out: the same results sooner. CUDA ranks use none of it.
"""
