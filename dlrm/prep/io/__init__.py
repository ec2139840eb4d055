"""Files of preprocessing: input text in blocks, spilled records, output arrays, folders, checksums.

In: paths. Out: blocks of rows, and files that get their names when they are complete.
"""
