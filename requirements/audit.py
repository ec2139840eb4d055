"""Ask whether security advisories are known for any pinned version; exit code 1 if there are.

usage: source env.sh; python requirements/audit.py

pip-audit does the asking. It is installed once into .cache/audit, with verified hashes. Where it cannot be
installed, or the database of advisories cannot be reached, one line says so, and the exit code is 0.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pip._vendor.packaging.requirements import Requirement

HERE = Path(__file__).parent
TOOL = HERE.parent / ".cache" / "audit"
LOCK = HERE / "locked" / "audit.txt"
PYTHONS = ("3.10", "3.13")  # enough for all pins: their markers distinguish only older and newer than 3.11
SERVICES = ("pypi", "osv")  # of pip-audit, the second where the first knows nothing
SECONDS = 300


class Skipped(Exception):
    """Nothing could be found out; the text says why."""


def run(*words: object) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(
            [str(word) for word in words], capture_output=True, text=True, stdin=subprocess.DEVNULL,
            timeout=SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Skipped(f"{words[0]}: {error}") from None


def install_tool() -> Path:
    """pip-audit in an environment of its own, made again when its pins have changed."""
    stamp, wanted = TOOL / "installed", LOCK.read_text()
    program = TOOL / "bin" / "pip-audit"
    if program.exists() and stamp.exists() and stamp.read_text() == wanted:
        return program
    try:
        TOOL.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise Skipped(f"{TOOL}: {error.strerror}") from None
    pip = [TOOL / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--no-input", "-q"]
    for words in (
        [sys.executable, "-m", "venv", TOOL],
        [*pip, "install", "--require-hashes", "--no-deps", "-r", LOCK],
    ):
        if run(*words).returncode:
            raise Skipped("pip-audit cannot be installed here")
    stamp.write_text(wanted)
    return program


def read_pins(python: str) -> set[str]:
    """NAME==VERSION of all files of requirements/ that this version of Python would get."""
    pins = set()
    for path in HERE.glob("*.txt"):
        for line in path.read_text().splitlines():
            if line.strip() and not line.startswith("#"):
                pin = Requirement(line)
                if not pin.marker or pin.marker.evaluate({"python_version": python}):
                    pins.add(f"{pin.name}{str(pin.specifier).partition('+')[0]}")
    return pins


def ask(program: Path, pins: Iterable[str], service: str) -> list[dict[str, Any]]:
    """What pip-audit knows about each pin."""
    asked: dict[str, list[str]] = {}  # name -> its versions; pip-audit takes one of each name at a time
    for pin in sorted(pins):
        asked.setdefault(pin.partition("==")[0], []).append(pin)
    found: list[dict[str, Any]] = []
    for turn in range(max(map(len, asked.values()))):
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write(
                "\n".join(versions[turn] for versions in asked.values() if len(versions) > turn) + "\n"
            )
            file.flush()
            words = ("--no-deps", "--disable-pip", "--progress-spinner", "off", "-f", "json", "-s", service)
            done = run(program, *words, "-r", file.name)
        try:
            found += json.loads(done.stdout)["dependencies"]
        except (ValueError, KeyError, TypeError):
            raise Skipped("the database of advisories cannot be reached from here") from None
    return found


def main() -> int:
    argparse.ArgumentParser(usage=(__doc__ or "").split("usage: ")[1]).parse_args()
    try:
        program = install_tool()
        pins = set[str]().union(*map(read_pins, PYTHONS))
        for service in SERVICES:
            found = ask(program, pins, service)
            known = [each for each in found if "skip_reason" not in each]
            if known:
                break
        else:
            raise Skipped("the database of advisories knows none of the packages")
    except Skipped as reason:
        print(f"audit.py: skipped: {reason}")
        return 0
    count = 0
    for each in known:
        for advisory in each["vulns"]:
            count += 1
            fixed = ", ".join(advisory.get("fix_versions", ())) or "no version yet"
            print(f"audit.py: {each['name']} {each['version']}: {advisory['id']}, fixed in {fixed}")
    unknown = f", {len(found) - len(known)} could not be looked up" if len(found) > len(known) else ""
    print(f"audit.py: {count} advisories for {len(known)} pinned versions{unknown}")
    return 1 if count else 0


if __name__ == "__main__":
    os.environ["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    sys.exit(main())
