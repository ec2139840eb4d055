"""The one trainer: loop, evaluation, checkpoints, optimizers, schedules, mixed precision, run folder.

In: a ModelSpec, its options, this rank. Out: a run folder. It knows no model. Start reading at
`trainer.train`.
"""
