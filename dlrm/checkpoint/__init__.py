"""The checkpoints' format on disk, for any sharding and number of ranks, and its writing in the background.

In: named tensors and values of a training. Out: folders NNNNN-step-N, published whole; and the way back.
"""
