"""The batch job that this process is in: whether PBS's or Slurm's, its id, and whether it is interactive."""

from collections.abc import Mapping
from dataclasses import dataclass

PBS, SLURM = "pbs", "slurm"


@dataclass(frozen=True)
class BatchJob:
    scheduler: str  # PBS or SLURM
    id: str  # as the scheduler's commands take it
    # Its script starts again under the same id if the job is requeued. In `qsub -I`, `salloc` and
    # `srun --pty` many commands run under one id.
    unattended: bool


def find_batch_job(environ: Mapping[str, str]) -> BatchJob | None:
    if job := environ.get("PBS_JOBID"):
        return BatchJob(PBS, job, environ.get("PBS_ENVIRONMENT") == "PBS_BATCH")
    job = environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_TASK_ID" in environ:
        job = f"{environ.get('SLURM_ARRAY_JOB_ID', job)}_{environ['SLURM_ARRAY_TASK_ID']}"
    # sbatch's script is a task without a step; salloc's shell is no task, `srun --pty`'s is in a step
    unattended = "SLURM_TASK_PID" in environ and "SLURM_STEP_ID" not in environ
    return BatchJob(SLURM, job, unattended) if job else None
