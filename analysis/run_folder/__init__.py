"""The files of a run folder other than its traces: checked JSON and metrics in, reports out.

In: RUN. Out: checked values with notes; files that replace only our own.
"""
