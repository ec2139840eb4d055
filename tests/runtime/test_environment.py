"""env.txt: values of variables on the list only, and of those nothing that looks like a secret."""

import os
import random
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dlrm.runtime.environment import HEADER, describe_environment, is_recorded, mask_secrets

ROOT = Path(__file__).parents[2]


def record_environment(**environment: str) -> dict[str, str]:
    header, *lines = describe_environment(environment).splitlines()
    assert header == HEADER
    return dict(line.split("=", 1) for line in lines)


@pytest.mark.parametrize(
    "name",
    [
        *("MY_PAT", "GH_PAT", "MYSQL_PWD", "DB_PWD", "JWT", "SLURM_JWT", "SAS", "AZURE_SAS", "HF_TOKEN"),
        *("PBS_JOBCOOKIE", "DLRM_TOKEN", "DLRM_API_KEY", "NVIDIA_API_KEY"),
        *("NGC_KEY", "CUDA_PASSWORD", "DLRM_PAT"),
        *("NCCL_SECRET", "FI_AUTH", "PYTHON_KEYRING_PASS"),
        *("SLURM_EXPORT_ENV", "SLURM_SPANK_X", "PMIX_CREDENTIAL"),
        *("OMPI_MCA_mca_base_env_list", "SBATCH_EXPORT", "x"),
        *("LS_COLORS", "BASH_FUNC_module%%", "AWS_PROFILE"),
    ],
)  # fmt: skip
def test_names_that_are_not_on_the_list(name: str) -> None:
    assert record_environment(**{name: "hunter2"}) == {name: "<not recorded>"}


@pytest.mark.parametrize(
    "name",
    [
        *("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "HOSTNAME", "HOME"),
        *("PWD", "LOADEDMODULES", "LC_ALL", "TMPDIR"),
        *("PBS_JOBID", "PBS_O_WORKDIR", "SLURM_JOB_ID", "PMI_RANK", "PALS_RANKID", "OMPI_COMM_WORLD_RANK"),
        *("CUDA_VISIBLE_DEVICES", "NCCL_NET", "FI_PROVIDER"),
        *("OMP_NUM_THREADS", "KMP_AFFINITY", "HYDRA_LAUNCHER"),
        *("DFTRACER_ENABLE", "DLRM_THREADS", "DLRM_ENV_KEEP", "DATASET_DIR"),
        *("RESULTS", "ARGS", "NPROC", "MPIEXEC"),
    ],
)  # fmt: skip
def test_names_on_the_list(name: str) -> None:
    assert record_environment(**{name: "a 'b'"}) == {name: "'a '\\''b'\\'''"}


SECRET = "s3cr/et@1&2"


@pytest.mark.parametrize(
    "value",
    [
        *(f"https://bob:{SECRET}@host/path", f"bob:{SECRET}@host"),
        *(f"http://{SECRET}@host", f"a=1 bob:{SECRET}@h"),
        *(f"DefaultEndpoints=x;AccountKey={SECRET};EndpointSuffix=y", f"Authorization: Bearer {SECRET}"),
        *(f"bearer {SECRET}", f"https://h/x?password={SECRET}"),
        *(f"https://h/?a=b&X-Amz-Signature={SECRET}&c=d",),
        *(f"https://hooks.slack.com/services/{SECRET}", f"https://h/api/webhooks/1/{SECRET}"),
        *(f"-----BEGIN RSA PRIVATE KEY----- {SECRET}", f"user=a\npassword={SECRET}\n", f"a\rb{SECRET}"),
        *(f"--x 1 --password {SECRET} --y 2", f"--api-key={SECRET}", f'{{"db_password": "{SECRET}"}}'),
        *(f"-A me -v MY_VAR={SECRET},X=1", f"mpiexec --env GH_PAT={SECRET} -n 2", f"x my_own_name={SECRET}"),
        *(f"password:{SECRET}", f"sig={SECRET}", f"?sv=1&sig={SECRET}", f"ssh://git:{SECRET}@h:22/x"),
        *("ghp_0123456789abcdefghij", "https://h/x/AKIAIOSFODNN7EXAMPLE", "eyJhbGciOi.eyJzdWIi.c2ln"),
    ],
)  # fmt: skip
def test_values_on_the_list_are_masked(value: str) -> None:
    found = describe_environment({"DLRM_QSUB": value, "my_own_name": "x"})
    for part in (SECRET, *SECRET.split("@"), "2ln", "abcdefghij", "AKIA"):
        assert part not in found.replace(HEADER, ""), found


@pytest.mark.parametrize(
    "value",
    [
        *("/opt/keys:/home/me/auth/bin:/usr/bin",),
        *("-A PROJECT -q debug -l select=2:system=polaris -l walltime=1:00",),
        *("mpiexec -n {N} --ppn {PPN} --depth {DEPTH} --cpu-bind depth", "AWS Libfabric"),
        *("gcc/12.2:conda/2025",),
        *("--limit_train_batches 4 --keep_checkpoints 2 --dense_arch_layer_sizes 512,256,64",),
        *("http://proxy:3128",),
        *("-n 2 --env NCCL_NET=x --env OMP_NUM_THREADS=4", "/eagle/p@q/data", "4(x2)", ""),
    ],
)  # fmt: skip
def test_values_that_are_no_secrets_stay(value: str) -> None:
    assert record_environment(DLRM_QSUB=value)["DLRM_QSUB"] == f"'{value}'"


def test_a_secret_that_another_variable_repeats() -> None:
    assert record_environment(ARGS="--x hunter22", DB_PWD="hunter22") == {
        "ARGS": "'--x ***'",
        "DB_PWD": "<not recorded>",
    }


def test_what_the_user_adds() -> None:
    keep = "MY_SETTING OTHER_* MY_KEY"
    found = record_environment(
        DLRM_ENV_KEEP=keep, MY_SETTING="1", OTHER_A="2", OTHER_TOKEN="3", MY_KEY="4", MORE="5"
    )
    assert found == {
        "DLRM_ENV_KEEP": f"'{keep}'", "MY_SETTING": "'1'", "OTHER_A": "'2'", "OTHER_TOKEN": "<not recorded>",
        "MY_KEY": "'4'", "MORE": "<not recorded>",
    }  # fmt: skip
    assert is_recorded("MY_KEY", keep) and not is_recorded("MY_KEYS", keep)


def test_random_names_and_values() -> None:
    chance = random.Random(5)
    letters = string.ascii_letters + string.digits + "/@:=&;,. '\"\\\udc80\n"
    for _ in range(1000):
        secret = "".join(chance.choices(letters, k=chance.randrange(8, 40)))
        name = "".join(chance.choices(string.ascii_letters + "_", k=chance.randrange(4, 16)))
        if not is_recorded(name):
            text = describe_environment({name: secret, "PATH": "/bin"})
            assert text == f"{HEADER}\n" + "".join(sorted([f"{name}=<not recorded>\n", "PATH='/bin'\n"]))


@pytest.mark.parametrize(
    "piece", ["a:", "key", "password ", "-", "x=", "://", "@", "PATH=", "a:b@ ", '"', "-v A="]
)
def test_long_values_take_no_time(piece: str) -> None:
    begun = time.monotonic()
    mask_secrets(piece * (100_000 // len(piece)), {})
    describe_environment({"ARGS": piece * (100_000 // len(piece))})
    assert time.monotonic() - begun < 10


def test_bytes_that_are_not_text() -> None:
    code = (
        "import os; from dlrm.runtime.environment import describe_environment as d; "
        "os.write(1, d(os.environ).encode())"
    )
    command = [sys.executable, "-c", code]
    environment = {b"NCCL_X": b"\xff\x01'", b"\xfe": b"x", b"PATH": os.environb[b"PATH"]}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, timeout=180)
    assert b"NCCL_X='\\xff\\x01'\\'''\n" in done.stdout and b"\\xfe=<not recorded>\n" in done.stdout, done
