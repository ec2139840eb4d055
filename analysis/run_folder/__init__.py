"""A run folder's own files as analysis reads and writes them: JSON through checked doors, outputs published whole.

In: RUN. Out: checked values with notes; files that replace only our own.
"""
