"""Many runs: what lies in a folder of results, and one run while it goes.

In: run folders, without their traces. Out: a row for each run; a table, CSV or JSON.
"""
