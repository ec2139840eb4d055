"""Plays the file calls of a traced run again, closed-loop: `plan.py`, `order.py`, `files.py`, `player.py`.

In: the traces of any program. Out: the same calls on files below a root, and a run folder with their trace.
Needs no torch. It reads traces with `analysis`, which knows nothing of it.
"""
