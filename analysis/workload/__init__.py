"""What a run asked for, measured from its trace: the input of what-if, of the emulator and of the exports.

In: the events of each rank as the report's tables read them. Out: polars frames of steps, batches, pauses and
reads, and predictions from them. Imports analysis/tables and below.
"""
