"""Write requirements/locked/*.txt: the pins of requirements/*.txt with the hashes of all files that may be
installed for them, on Linux x86-64 under Python 3.10 to 3.13.

usage: source env.sh; python requirements/lock.py [--fresh] [--check] [NAME...]     NAME: base, cpu, ...

Run it after every change of a pin; it asks the package index, through pip and with pip's own settings, and
takes about a minute. A pin that stays keeps the hashes it had (torch has one version and several builds, and
no index serves all of them) unless --fresh is given. --check changes nothing and needs no network: exit
code 1 if a lock does not belong to its pins. No address of an index gets into the files.
"""

import argparse
import hashlib
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

HERE = Path(__file__).parent
LOCKED = HERE / "locked"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
NOT_LOCKED = ("extra", "dfanalyzer")  # which the setup does not install
PLATFORMS = (
    "linux_x86_64", "manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64",
    *(f"manylinux_2_{minor}_x86_64" for minor in range(5, 43)),
)  # fmt: skip


def read_pins(name: str) -> list[Requirement]:
    lines = (HERE / f"{name}.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    for pin in pins:
        if not re.fullmatch(r"==[^*,]+", str(pin.specifier)):
            sys.exit(f"lock.py: {name}.txt: {pin}: wanted one exact version, NAME==VERSION")
    return pins


def read_lock(name: str) -> dict[str, set[str]]:
    """The hashes that each pin has now."""
    path = LOCKED / f"{name}.txt"
    hashes: dict[str, set[str]] = {}
    pin = ""
    for line in path.read_text().splitlines() if path.exists() else ():
        if line and line[0] not in "# ":
            pin = str(Requirement(line.removesuffix(" \\")))
            hashes[pin] = set()
        elif pin:
            hashes[pin].update(re.findall(r"--hash=sha256:([0-9a-f]{64})", line))
    return hashes


def find_stale(names: Iterable[str]) -> list[str]:
    """Those whose lock does not hold exactly their pins, each with a hash."""
    return [
        name for name in names
        if (locked := read_lock(name)).keys() != {str(pin) for pin in read_pins(name)}
        or not all(locked.values())
    ]  # fmt: skip


class Index:
    """pip's view of the index, from a Python version that need not be installed here."""

    def __init__(self) -> None:
        self._finders: dict[str, Any] = {}

    def make_finder(self, python: str) -> Any:
        # pip's own parts, and not its output: only they name all files of a version. Not needed for --check.
        from pip._internal.cli.cmdoptions import make_target_python
        from pip._internal.commands import create_command

        command: Any = create_command("download")
        words = ["--no-deps", "--dest", ".", "--python-version", python, "--implementation", "cp", "pip"]
        words += ["--abi", "cp" + python.replace(".", ""), "--abi", "abi3", "--abi", "none"]
        words += [word for platform in reversed(PLATFORMS) for word in ("--platform", platform)]
        options, _ = command.parse_args(words)
        session = command._build_session(options)
        return command._build_package_finder(options, session, target_python=make_target_python(options))

    def find_files(self, pin: Requirement) -> Iterator[tuple[str, Any]]:
        """(Python version, link) of every wheel that may be installed; source archives only for those
        versions of Python that have no wheel.
        """
        for python in PYTHONS:
            if pin.marker and not pin.marker.evaluate({"python_version": python}):
                continue
            finder = self._finders.get(python) or self._finders.setdefault(python, self.make_finder(python))
            found = [
                each.link for each in finder.find_all_candidates(canonicalize_name(pin.name))
                if pin.specifier.contains(str(each.version), prereleases=True)
            ]  # fmt: skip
            wheels = [link for link in found if link.is_wheel]
            # torch==V+cpu is not on every index, and not for every Python: what is known already stays
            if not found and "+" not in str(pin.specifier):
                sys.exit(f"lock.py: the index has no {pin.name} that fits {pin} for Python {python}")
            yield from ((python, link) for link in wheels or found)


def find_hashes(index: Index, pin: Requirement) -> set[str]:
    hashes = set()
    for _, link in index.find_files(pin):
        parts = urlsplit(link.url)
        if link.hash_name == "sha256":
            hashes.add(link.hash)
        elif parts.scheme == "file":
            with open(unquote(parts.path), "rb") as file:
                hashes.add(hashlib.sha256(file.read()).hexdigest())
        else:
            sys.exit(f"lock.py: the index gives no sha256 of {link.filename}: lock against another index")
    return hashes


def write_lock(name: str, hashes: dict[str, set[str]]) -> None:
    lines = [f"# Written by requirements/lock.py from {name}.txt: change that, and run it again."]
    for pin in sorted(hashes):
        lines += [f"{pin} \\", *(f"    --hash=sha256:{each} \\" for each in sorted(hashes[pin]))]
        lines[-1] = lines[-1].removesuffix(" \\")
    LOCKED.mkdir(exist_ok=True)
    partial = LOCKED / f"{name}.txt.partial"
    partial.write_text("\n".join(lines) + "\n")
    partial.replace(LOCKED / f"{name}.txt")


def main() -> int:
    every = sorted(path.stem for path in HERE.glob("*.txt") if path.stem not in NOT_LOCKED)
    parser = argparse.ArgumentParser(usage=(__doc__ or "").split("usage: ")[1])
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("names", nargs="*", metavar="NAME")
    options = parser.parse_args()
    if unknown := set(options.names) - set(every):
        parser.error(f"no requirements/{sorted(unknown)[0]}.txt")
    names = options.names or every
    if options.check:
        stale = find_stale(names)
        for name in stale:
            print(f"lock.py: locked/{name}.txt is not of {name}.txt: python requirements/lock.py {name}")
        return 1 if stale else 0
    logging.getLogger("pip").setLevel(logging.ERROR)  # an index that lacks a package is nothing to report
    index = Index()
    for name in names:
        before = {} if options.fresh else read_lock(name)
        hashes = {str(pin): find_hashes(index, pin) | before.get(str(pin), set()) for pin in read_pins(name)}
        write_lock(name, hashes)
        print(f"locked/{name}.txt: {len(hashes)} pins, {sum(map(len, hashes.values()))} hashes", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
