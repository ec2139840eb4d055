"""What a run records of its environment: the values of variables on a list, only the names of all others.

In: the process's environment. Out: the text of RUN/env.txt, and `mask_secrets` for any text that is recorded.
Why a list of what is recorded, and not of what is hidden: run folders are shared, and no list can name all
secrets.
"""

import fnmatch
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import metadata

from common.errors import printable

HEADER = "# The environment of this run, written by dlrm-io. Values: see DLRM_ENV_KEEP in README.md."
NOT_RECORDED = "<not recorded>"
MASK = "***"

RECORDED = """
PATH LD_LIBRARY_PATH LD_PRELOAD LIBRARY_PATH VIRTUAL_ENV CONDA_PREFIX CONDA_DEFAULT_ENV PYTHON*
HOME HOSTNAME HOST USER LOGNAME SHELL PWD TMPDIR LANG LANGUAGE LC_* TZ TERM
LOADEDMODULES _LMFILES_ MODULEPATH PE_ENV CRAY_* CRAYPE_* GLIBC_TUNABLES MALLOC_*
http_proxy https_proxy no_proxy all_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY ALL_PROXY
PBS_* SLURM_* SLURMD_* PMI PMI_* PMI2_* PMIX_* PALS_* MPI_* MPIR_* MPICH_* I_MPI_* OMPI_* HYDRA_* HYDI_*
CUDA* NCCL_* NVIDIA_* FI_* UCX_* GLOO_* TP_* OMP_* MKL_* KMP_* OPENBLAS_* GOMP_* TBB_*
TORCH_* PYTORCH_* TORCHELASTIC_* TORCHINDUCTOR_* FBGEMM_* NUMBA_* NUMEXPR_* POLARS_* ARROW_*
THP_MEM_ALLOC_ENABLE RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT
DFTRACER_* DLRM_* MPIEXEC NPROC DRY_RUN MODEL DATASET_DIR OUTPUT_DIR WORKDIR RESULTS RESUME
BATCH_SIZE EMBEDDING_DIM EPOCHS LEARNING_RATE ARGS TRACE NODE_COUNTERS
""".split()  # noqa: SIM905

# Never recorded: variables of schedulers and MPIs that contain other variables with their values.
NOT_RECORDED_NAMES = """
SLURM_EXPORT_ENV SLURM_SPANK_* SLURM_COMMENT OMPI_*_ENV_LIST OMPI_*ENV_LIST* *_EXPORT *_EXPORT_ENV
HYDRA_ENV* PMIX_*ENV_LIST* PRTE_*ENV_LIST*
""".split()  # noqa: SIM905

# Names that no pattern of RECORDED includes; DLRM_ENV_KEEP may still name one of them in full.
_SECRET_NAME = re.compile(
    r"TOKEN|SECRET|PASSW|PASSPHRASE|PASSCODE|CREDENTIAL|COOKIE|AUTH|JWT|BEARER|WEBHOOK|SIGNATURE|PRIVATE|APIKEY"
    r"|(?:^|_)(?:KEY|KEYS|PASS|PWD|PW|PAT|SAS|SIG|CREDS?|API|CERT|SESSION|DSN|PIN|OTP|SALT)(?:_|\d*$)",
    re.IGNORECASE,
)
_WORD = (
    r"(?:pass(?:w|code|phrase)?|pwd|secret|token|credential|creds?\b|auth|jwt|bearer|cookie|sig\b|signature|"
    r"key|sas\b|session|webhook|dsn|pin\b|otp)"
)
# Group 1 stays, what follows is masked to the end of the value: where a secret ends cannot be known.
_MASKS = [
    re.compile(pattern, re.IGNORECASE | re.DOTALL)
    for pattern in (
        r"()-----BEGIN.*",
        r"(hooks\.slack\.com/|/webhooks?/).*",
        r"(\b(?:bearer|basic|digest|negotiate)\s+)\S.*",
        rf"({_WORD}[\w.%-]{{0,64}}[\"']?\s*(?:=|%3D|:=)).*",
        rf"((?:^|(?<=[\s\"'{{,;]))[\w.-]{{0,64}}{_WORD}[\w.-]{{0,64}}[\"']?\s*:).*",
        rf"((?:^|(?<=\s))--?[\w-]{{0,64}}{_WORD}[\w-]{{0,64}}\s+)\S.*",
        r"()\b(?:gh[pousr]_|github_pat_|glpat-|hf_|sk-|xox[a-z]-|eyJ|pypi-|npm_|dop_v1_)[\w.-]{8,}",
        r"()\b(?:AKIA|ASIA|AIza)[\w-]{12,}",
    )
]
# user:password or a token before the last @, with or without scheme://; a password may contain / and @.
_USER = re.compile(r"://|(?:^|(?<=[\s\"'=,;]))(?=[^\s/:\"'=,;]+:(?!//))")
_ASSIGNMENT = re.compile(r"\b([A-Za-z_]\w*)=")


PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "numpy", "mpi4py", "pydftracer", "dftracer")


def describe_command() -> list[str]:
    """The words of this process's command line; secrets in them are masked."""
    words = [os.path.basename(sys.orig_argv[0]), *sys.orig_argv[1:]]
    return [mask_secrets(printable(word)) for word in words]


def list_versions() -> dict[str, str]:
    """The versions of Python and of the packages that a run's numbers depend on, as far as installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def is_recorded(name: str, more: str = "") -> bool:
    """Whether the value of this variable is recorded. `more`: DLRM_ENV_KEEP (names, patterns)."""
    if name in more.split():
        return True
    if name in RECORDED:
        return True
    if _SECRET_NAME.search(name) or _matches_any(name.upper(), NOT_RECORDED_NAMES):
        return False
    return _matches_any(name, [*RECORDED, *more.split()])


def _matches_any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def mask_secrets(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text with *** for whatever looks like a secret, and for the value of every variable of
    `environment` (default: this process's) whose name says that it is one. In doubt it masks too much.
    """
    environment = os.environ if environment is None else environment
    for name, value in environment.items():
        if len(value) >= 6 and value in text and name not in RECORDED and _SECRET_NAME.search(name):
            text = text.replace(value, MASK)
    spans = [(found.end(1), found.end()) for pattern in _MASKS for found in pattern.finditer(text)]
    at = text.rfind("@")
    if at > 0 and (found := _USER.search(text, 0, at)):
        spans.append((found.end(), at))
    done, parts = 0, []
    for start, end in sorted(spans):
        if start >= done:
            parts += [text[done:start], MASK]
        done = max(done, end)
    return "".join(parts) + text[done:]


def _mask_assignments(text: str, more: str, environment: Mapping[str, str]) -> str:
    """Mask variables inside a value, `-v NAME=value` or `--env NAME=value`, that are not on the list."""
    for found in _ASSIGNMENT.finditer(text):
        name = found[1]
        if (name.isupper() or name in environment) and not is_recorded(name, more):
            return text[: found.end()] + MASK
    return text


def describe_environment(environment: Mapping[str, str]) -> str:
    """The text of env.txt: one NAME='value' per line, as a shell reads it; NOT_RECORDED for other values."""
    more = environment.get("DLRM_ENV_KEEP", "")
    lines = [HEADER]
    for name in sorted(environment):
        value = environment[name]
        if not is_recorded(name, more) or "\n" in value or "\r" in value:
            lines.append(f"{printable(name)}={NOT_RECORDED}")
            continue
        value = mask_secrets(_mask_assignments(value, more, environment), environment)
        lines.append(f"{printable(name)}={_quote_for_shell(printable(value))}")
    return "\n".join(lines) + "\n"


def _quote_for_shell(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
