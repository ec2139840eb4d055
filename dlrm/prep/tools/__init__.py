"""Commands beside the pipeline: toy data, check, multi-hot ids, torchrec's three scripts.

In: their own command lines. Out: files, or lines that say what is wrong.
"""
