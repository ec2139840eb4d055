"""Any PyTorch training under this project's tracing: nothing of the script changes, and it needs no import.

In: a script, as `python` takes it. Out: a run folder with its trace. `script` runs it as Python would,
`hooks` lists what is wrapped when a library is imported, and each other file wraps one kind of thing.
"""
