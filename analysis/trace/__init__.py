"""DFTracer's files to columns: gzip and lines, one compiled scanner, strings, clocks, kinds of events.

In: RUN/trace/*.pfw.gz in any state. Out: blocks of events as arrays, and what could not be read.
"""
