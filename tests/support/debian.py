"""Programs from Debian's packages in a folder of their own, without installing them.

An installed srun or mpiexec would change what the setup chooses; only a test that names these sees them.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dlrm-io-tests" / "debian"


def unpack_packages(names: tuple[str, ...]) -> Path:
    """The folder into which these packages (and no dependencies) are unpacked. Fetched once, then cached. The
    test is skipped where that cannot be.
    """
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons and hosts of their own need root")
    for tool in ("apt-get", "dpkg-deb", "unshare"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} here: this needs Debian's packages")
    folder = CACHE / names[0]
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "files").mkdir(parents=True)
        try:
            _run(folder / "files", "apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", *names)
            for file in sorted((folder / "files").glob("*.deb")):
                _run(folder, "dpkg-deb", "-x", str(file), str(folder / "root"))
        except subprocess.SubprocessError as error:
            shutil.rmtree(folder)
            pytest.skip(f"Debian's packages cannot be fetched here: {getattr(error, 'stderr', '') or error}")
        shutil.rmtree(folder / "files")
        (folder / "complete").touch()
    return folder / "root"


def libraries_of(root: Path) -> Path:
    [folder] = (root / "usr" / "lib").glob("*-linux-gnu")
    return folder


def _run(folder: Path, *command: str) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=120)
