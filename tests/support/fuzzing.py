"""One hostile input, one forked process: what a command does with it, within 1 GB and 30 s.

`outcome(main, argv)` runs `main(argv)` in a fork of this process, so that a case costs milliseconds and not
the start of an interpreter, and a crash of compiled code ends the fork alone. `check` holds what every
entry point must do with bad input. Import what `main` needs, and compile its loops, before the first case.
"""

import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

MEMORY = 1 << 30  # bytes that a case may ask for beyond what this process has
SECONDS = 30


@dataclass
class Outcome:
    code: int  # exit code; negative: the signal
    out: str
    err: str
    seconds: float


def outcome(
    main: Callable[[list[str]], int | None],
    argv: Iterable[object],
    memory: int | None = MEMORY,
    seconds: float = SECONDS,
) -> Outcome:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        begun = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _run_child(main, [str(word) for word in argv], out.fileno(), err.fileno(), memory, seconds)
        _, status = os.waitpid(pid, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read(1 << 20).decode(errors="replace"))
        code = os.waitstatus_to_exitcode(status)
        return Outcome(code, texts[0], texts[1], time.monotonic() - begun)


def _run_child(
    main: Callable[[list[str]], int | None],
    argv: list[str],
    out: int,
    err: int,
    memory: int | None,
    seconds: float,
) -> None:
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # /dev/stdin as a file is not the server's
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        if memory is not None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * os.sysconf("SC_PAGE_SIZE") + memory
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        code = main(argv) or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:  # noqa: BLE001  # the parent sees the traceback in the text
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def check(found: Outcome, refused: bool = False) -> None:
    """No signal, no traceback, exit code 0, 1 (a check that fails) or 2, and 2 with one line that says why.
    `refused`: this input is known to be bad, nothing but code 2 will do.
    """
    output = f"exit code {found.code} after {found.seconds:.1f} s: {found.err[-2000:]}"
    assert found.code >= 0, f"ended by signal {-found.code}; {output}"
    assert "Traceback" not in found.err, output
    assert found.code in ((2,) if refused else (0, 1, 2)), output
    if found.code == 2:
        assert len(found.err.strip().splitlines()) == 1, output


def mutate(data: bytes, chance: random.Random) -> bytes:
    """A few random edits: bits, bytes, cuts, repeats, extreme numbers; the result may be much longer."""
    made = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        at = chance.randrange(len(made) + 1)
        kind = chance.randrange(7)
        if kind == 0 and made:
            made[at % len(made)] ^= 1 << chance.randrange(8)
        elif kind == 1 and made:
            made[at % len(made)] = chance.randrange(256)
        elif kind == 2:
            del made[at : at + chance.choice((1, 2, 8, 64, 1 << 12))]
        elif kind == 3:
            made[at:at] = made[at : at + chance.choice((1, 8, 64, 512))] * chance.choice((1, 2, 64))
        elif kind == 4:
            made[at:at] = chance.choice(EXTREMES)
        elif kind == 5:
            made[at:at] = bytes(chance.randrange(256) for _ in range(chance.choice((1, 4, 16))))
        else:
            del made[at:]
    return bytes(made)


EXTREMES = (
    b"0", b"-1", b"99999999999999999999", b"-9223372036854775808", b"9223372036854775807", b"4294967296",
    b"1e999", b"-1e308", b"NaN", b"null", b"true", b'""', b"[]", b"{}", b"[" * 400,
    b'{"a":' * 400, b'"', b"\\",
    b"\\ud800", b"\xff\xfe", b"\0", b"\n", b" " * 5000, b"-" * 300, b"1+" * 300, b"\xed\xa0\x80",
)  # fmt: skip
