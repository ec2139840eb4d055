"""The models that can be trained: one folder each, which ends in one ModelSpec (its spec.py).

In: options and a dataset. Out: what the trainer calls to open the data, build, shard and score the model.
"""
