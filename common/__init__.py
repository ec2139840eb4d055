"""What dlrm/ and analysis/ both stand on: reading foreign files, writing and removing own ones, locks.

In: paths that a user named. Out: checked bytes, files written whole, folders removed only where they are
provably ours. Imports nothing but the standard library, and nothing of dlrm/ or analysis/.
"""
