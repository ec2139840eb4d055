"""Running the job scripts from tests, in an environment without what a job or a user has set."""

import os

# beginnings of names; pytest itself may run inside a job, or beside a user's settings
OF_JOBS_AND_USERS = (
    "ANALYSIS",
    "ARGS",
    "CUDA",
    "DATASET_DIR",
    "DFTRACER_",
    "DLRM_",
    "LOCAL_",
    "MASTER",
    "NPROC",
    "PBS",
    "PMI",
    "RESULTS",
    "RESUME",
    "RUN",
    "SBATCH",
    "SLURM",
    "WORKDIR",
)


def clean_environment(**more: object) -> dict[str, str]:
    """This process's variables without those, and with these."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OF_JOBS_AND_USERS)}
    return kept | {name: str(value) for name, value in more.items()}
