"""Events to Perfetto files, and a server that shows them.

In: blocks of events. Out: .pftrace or Chrome JSON.
"""
