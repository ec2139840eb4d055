"""Tables larger than memory: rows in files, a cache of them in torchrec's tables. A shed of its own.

In: table configs and a budget of memory. Out: tables of cache slots, filled and written back as batches come.
placement.py is its only door; a training with --store_type device_mem imports nothing of it.
"""
