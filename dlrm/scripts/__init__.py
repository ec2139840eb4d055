"""NVIDIA's and OneFlow's DLRM by their own command lines: `python -m dlrm.scripts.main FLAG...`, as in
NVIDIA's README, and what scripts/dlrm_train_eval.py starts.

In: the flags of those programs, with their defaults. Out: the options of python -m dlrm.train, and its run.
"""
