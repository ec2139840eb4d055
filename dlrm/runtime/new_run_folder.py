"""The run folder that 3_train.sh trains into: its name, env.txt and gpu.txt, and its removal after a mistake.

usage: python -m dlrm.runtime.new_run_folder COMMAND

    name [--resume RUN] RESULTS     print the path that a run would get; makes nothing
    make [--resume RUN] RESULTS     make it; print its path and its identity
    discard RUN IDENTITY            remove what `make` made, unless other files were added

Each printed value ends with a NUL byte, so that a shell can read any path. A mistake: one line and
exit code 2.
"""

import argparse
import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from common.errors import UserError, os_errors_as_user_errors, printable
from common.inputs import read_bytes, read_json_object
from common.owned import identify_folder, remove_made_folder, write_file
from dlrm.runtime.batch_job import find_batch_job
from dlrm.runtime.environment import HEADER, describe_environment
from dlrm.runtime.script_answer import answer_script

LABEL = re.compile(r"[A-Za-z0-9._-]{1,60}")
GPU_HEADER = "# The GPUs of the first node, written by dlrm-io."
JOB_START = "DLRM_JOB_START"  # from scripts/job.sh: another one each time that the job starts
# What a run that ended before its first step leaves in its folder.
FILES = re.compile(
    r"(env|gpu|log)\.txt|(config|plan|dataset|results|progress)\.json|metrics\.jsonl|startup\.csv|"
    r"trace/|trace/[^/]*\.pfw(\.gz)?|\.dlrm-io\.(lock|json)|"
    r"node_counters/|node_counters/[^/]*/|node_counters/[^/]*/(node\.json|service[^/]*|dftracer_server_[^/]*)"
)


def propose_names(environment: Mapping[str, str]) -> Iterator[str]:
    """Names for the run folder, to be tried in this order; each ends in -NAME where the user gave one.

    A batch job's first run is named by the job id alone, its second by the id and 2, so that a requeued job
    finds its folders again and resumes in them. In an interactive job (`qsub -I`, `salloc`) many runs have
    one id: there the time tells them apart.
    """
    job = find_batch_job(environment)
    name = job.id.replace("/", "_") if job else ""
    if not job or not job.unattended:
        name = f"{name}-" * bool(name) + time.strftime("%Y%m%d-%H%M%S")
    name += read_label(environment)
    yield name
    for number in range(2, 10_000):
        yield f"{name}-{number}"


def read_label(environment: Mapping[str, str]) -> str:
    """The end of the folder's name: -NAME, or nothing."""
    name = environment.get("NAME", "")
    if name and not LABEL.fullmatch(name):
        raise UserError(
            f"NAME={printable(name)}: give at most 60 letters, digits, dots, hyphens or underscores"
        )
    return f"-{name}" if name else ""


def is_run_folder(folder: Path) -> bool:
    """Whether this project trained in it: it has this project's env.txt or config.json."""
    if _starts_with(folder / "env.txt", HEADER):
        return True
    try:
        config = read_json_object(folder / "config.json")
    except UserError:
        return False
    return isinstance(config.get("launch"), dict) and isinstance(config.get("run"), dict)


def refuse_other_model(folder: Path, model: str) -> None:
    """UserError where the folder has a run of another model, or an emulation is going to be where a training
    was: its results would be replaced.
    """
    try:
        launch = read_json_object(folder / "config.json", paths=True).get("launch")
    except UserError:  # there is none, or it is not ours, which `refuse_foreign` says
        return
    earlier = launch.get("model") if isinstance(launch, dict) else None
    if model and isinstance(earlier, str) and earlier != model:
        raise UserError(
            f"{printable(folder)}: has a run of {printable(earlier)[:100]}, whose results one of {model} "
            "would replace; name another --output_dir"
        )


def check_run_folder(folder: Path, variable: str) -> None:
    """UserError for a folder that is not a run of this project, or where another program's files would be
    overwritten. `variable` (e.g. RESUME) is named in the message.
    """
    with os_errors_as_user_errors(folder):
        empty = not os.listdir(folder)
    if not empty and not is_run_folder(folder):
        raise UserError(f"{variable}={printable(folder)}: is not a run folder of this project; name another")
    for name, header in (("env.txt", HEADER), ("gpu.txt", GPU_HEADER)):
        path = folder / name
        if os.path.lexists(path) and not _starts_with(path, header):
            raise UserError(f"{printable(path)}: was not made by this program; move it away")
    log = folder / "log.txt"
    if os.path.lexists(log) and not stat.S_ISREG(os.lstat(log).st_mode):
        raise UserError(f"{printable(log)}: is not a plain file; move it away")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{variable}={printable(folder)}: cannot be written by this user; name another")


def name_run(results: Path, resume: Path | None) -> Path:
    """The path that `make_run` would return now."""
    if resume:
        check_run_folder(resume, "RESUME")
        return resume
    check_results(results)
    for name in propose_names(os.environ):
        if not os.path.lexists(results / name) or _is_of_this_job(results / name):
            return results / name
    raise UserError(f"RESULTS={printable(results)}: has too many runs of this second; name another folder")


def _is_of_this_job(run: Path) -> bool:
    """Whether the job made this folder before it was requeued. One of the same start of the job is of an
    earlier command of its script. UserError if it is not a run folder.
    """
    job = find_batch_job(os.environ)
    if not job or not job.unattended:
        return False
    check_run_folder(run, "the job's folder, RESULTS")
    start = f"\n{JOB_START}={os.environ.get(JOB_START, '')!r}\n".encode()
    return not os.path.lexists(run / "env.txt") or start not in read_bytes(run / "env.txt", 16 << 20)


def check_results(results: Path) -> None:
    """UserError unless folders can be made in it."""
    above = results
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir():
        raise UserError(f"RESULTS={printable(results)}: {printable(above)} is not a folder; name another")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(
            f"{printable(above)}: cannot be written by this user; name a folder for the runs: RESULTS=FOLDER"
        )


def make_run(results: Path, resume: Path | None) -> tuple[Path, str]:
    """(run folder with env.txt and gpu.txt in it, identity). The identity is "" for a folder that was there
    before: only a new one may be removed again.
    """
    if resume:
        run, identity = name_run(results, resume), ""
    else:
        check_results(results)
        with os_errors_as_user_errors(results):
            results.mkdir(parents=True, exist_ok=True)
        run, identity = _make_folder(results)
    write_environment(run)
    with write_file(run / "gpu.txt", lambda path: _starts_with(path, GPU_HEADER)) as partial:
        partial.write_text(f"{GPU_HEADER}\n{_describe_gpus()}")
    return run, identity


def write_environment(run: Path) -> None:
    with write_file(run / "env.txt", lambda path: _starts_with(path, HEADER), mode=0o600) as partial:
        partial.write_text(describe_environment(os.environ), encoding="utf-8", errors="backslashreplace")


def update_environment(run: Path) -> None:
    """Replace the env.txt that 3_train.sh has made by this process's environment: that of a rank, with what
    launcher.sh and the tracer have set.
    """
    if _starts_with(run / "env.txt", HEADER):
        write_environment(run)


def _make_folder(results: Path) -> tuple[Path, str]:
    """Runs that start in the same second get a folder each: only one of them succeeds with mkdir."""
    for name in propose_names(os.environ):
        run = results / name
        try:
            with os_errors_as_user_errors(run):
                os.mkdir(run)
        except UserError:
            if not os.path.lexists(run):
                raise
            if _is_of_this_job(run):
                return run, ""
            continue
        return run, identify_folder(os.lstat(run))
    raise UserError(f"RESULTS={printable(results)}: has too many runs of this second; name another folder")


def _describe_gpus() -> str:
    """The text of gpu.txt: what nvidia-smi prints on this host."""
    text = ""
    for command in (["nvidia-smi", "-L"], ["nvidia-smi"]):
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
            )
        except (OSError, subprocess.TimeoutExpired):
            done = None
        if done is None or done.returncode:
            return f"no NVIDIA GPU on {os.uname().nodename}\n"
        text += done.stdout
    return text


def _starts_with(path: Path, header: str) -> bool:
    try:
        return not path.is_symlink() and read_bytes(path, 16 << 20).startswith(header.encode())
    except UserError:
        return False


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(usage=(__doc__ or "").split("usage: ")[1])
    parser.add_argument("command", choices=("name", "make", "discard"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("identity", nargs="?", default="")
    parser.add_argument("--resume", type=Path)
    options = parser.parse_args(argv)

    def run_command() -> list[str]:
        if options.command == "discard":
            remove_made_folder(options.folder, options.identity, FILES)
            return []
        if options.command == "name":
            return [str(name_run(options.folder, options.resume))]
        return [str(each) for each in make_run(options.folder, options.resume)]

    return answer_script(run_command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
