"""`python -m dlrm.replay` on made or real traces, and what it leaves. A fork where that is all."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.analysis_command import run_command
from support.file_calls import read_events

ROOT = Path(__file__).parents[2]


@dataclass
class Replayed:
    """An ended replay. `output`: its run folder; `root`: where the files of the trace are."""

    code: int
    out: str
    err: str
    output: Path
    root: Path

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.output / "replay.json").read_text())

    def count_requests(self) -> Counter[tuple[str, str, int, int]]:
        """By the replay's trace, with the names of the original."""
        return count_requests(self.output, json.loads((self.output / "replayed_files.json").read_text()))

    def at(self, path: str | Path) -> Path:
        """Where a file of the trace is."""
        return self.root / str(path).lstrip("/")


def replay(
    run: Path, output: Path, *words: object, prefix: tuple[object, ...] = (), **variables: str
) -> Replayed:
    """prefix: the words of a command before, such as mpiexec's. variables: of the environment."""
    named = "--root" in words
    root = Path(str(words[words.index("--root") + 1])) if named else output / "files"
    if not prefix and not variables:
        played = run_command("replay", run, "--output_dir", output, *words)
        return Replayed(played.code, played.out, played.err, output, root)
    command = [*prefix, sys.executable, "-m", "dlrm.replay", run, "--output_dir", output, *words]
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, **variables},
    )  # fmt: skip
    return Replayed(done.returncode, done.stdout, done.stderr, output, root)


def count_requests(run: Path, names: dict[str, str] | None = None) -> Counter[tuple[str, str, int, int]]:
    """(file, call, offset, bytes) of calls that say their offset. names: file of the trace -> its name."""
    events = read_events(run)
    hashes = {e["args"]["value"]: e["args"]["name"] for e in events if e["name"] == "FH"}
    found: Counter[tuple[str, str, int, int]] = Counter()
    for event in events:
        args = event.get("args", {})
        if event.get("cat") == "POSIX" and "offset" in args and "ret" in args:
            path = hashes[args["fhash"]]
            found[names[path] if names else path, event["name"], args["offset"], args["ret"]] += 1
    return found
