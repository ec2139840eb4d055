"""Tables larger than memory: rows in files, with a cache of rows that fbgemm sees as its table.

In: a sharding plan, ids. Out: the numbers of a table in memory. `ssd_tables.py` has all hooks into torchrec.
The only entry is `placement.prepare_ssd_tables`, imported only if an option asks for such tables.
"""
