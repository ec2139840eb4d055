"""Files of preprocessing: input text in blocks, spilled records, output arrays, folders, checksums, publishing.

In: paths. Out: blocks of rows; files that get their names whole.
"""
