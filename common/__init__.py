"""What dlrm/ and analysis/ share: reading files that others wrote, writing and removing own ones, locks.

In: paths that a user gave. Out: checked bytes, files written as a whole, folders removed only where they are
provably this program's. Imports only the standard library, and nothing of dlrm/ or analysis/.
"""
