"""NVIDIA's DLRM by its own command line: `python -m dlrm.scripts.main FLAG...`, where NVIDIA's README has it.

In: the flags of NVIDIA's program, with its defaults. Out: the options of python -m dlrm.train, and its run.
"""
