"""What dlrm/ and analysis/ share: reading files of others, writing and removing own ones, locks, progress.

In: paths that a user gave. Out: checked bytes, files written as a whole, folders removed only where they are
provably this program's. Imports the standard library (and tqdm, where a bar is shown) alone.
"""
