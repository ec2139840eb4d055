"""The format of checkpoints on disk, for any sharding and number of ranks, and writing them in the
background.

In: named tensors and values of a training. Out: folders NNNNN-step-N, each published as a whole; and the same
tensors read back into a model that may be sharded over other ranks.
"""
