"""A training without its computing: the data path, checkpoints and evaluation of a run; a step is a wait.

In: the folder of a traced run. Out: a run folder like that of a training. Needs numpy and mpi4py, no torch:
`workload` measures the run's trace (with analysis/workload), `emulator` is what trainer.py is to a training.
"""
