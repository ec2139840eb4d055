"""Events to tables: time, calls, steps, progress; and the check of bytes against the trace.

In: one rank's events after the other. Out: joined tables as polars frames.
"""
