"""Embedding tables: their configs and first weights, the sharding plan, and sharding itself.

In: table sizes, options, ranks. Out: torchrec's plan and a DistributedModelParallel.
"""
