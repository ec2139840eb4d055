"""What a run asked of the storage, for other tools: a module for each format; `registry.py` lists them.

In: RUN. Out: files that fio and others read.
"""
