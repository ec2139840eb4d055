"""The words before SCRIPT, which are this program's; all after it are the script's own."""

from collections.abc import Sequence
from dataclasses import dataclass

from common.command_line import CommandLineParser
from common.errors import UserError

PROGRAM = "python -m dlrm.traced"
USAGE = (
    f"{PROGRAM} [--output_dir RUN] [--directory FOLDER] [--title TEXT] [--profile_steps A-B] "
    "SCRIPT | -m MODULE  [ARG...]"
)


@dataclass(frozen=True)
class Chosen:
    output_dir: str | None
    directory: str | None
    title: str | None
    profile_steps: tuple[int, int] | None
    is_module: bool
    target: str  # the script, or the module's name
    words: tuple[str, ...]  # the script's own


def make_parser() -> CommandLineParser:
    parser = CommandLineParser(
        prog=PROGRAM, usage=USAGE,
        description="Run a PyTorch training script, as `python SCRIPT ARG...` would, with what it reads and "
        "writes, its steps, its data loaders, collectives and checkpoints in a trace.",
    )  # fmt: skip
    parser.add_argument(
        "--output_dir",
        metavar="RUN",
        help="the run folder [one of its own in results/, for a single process]",
    )
    parser.add_argument(
        "--directory", metavar="FOLDER", help="run the script in this folder [the current one]"
    )
    parser.add_argument("--title", metavar="TEXT", help="what reports call the run [the script's name]")
    parser.add_argument(
        "--profile_steps",
        metavar="A-B",
        help="torch.profiler on these steps, on every rank, for Perfetto and the report",
    )
    return parser


def parse_words(words: Sequence[str]) -> Chosen:
    """UserError where no script is named, or an option before it is not known."""
    parser = make_parser()
    count = _count_own_words(words)
    found = parser.parse_args(words[:count])
    rest = list(words[count:])
    is_module = rest[:1] == ["-m"]
    if is_module:
        rest.pop(0)
    if not rest:
        what = "-m needs the name of a module" if is_module else "no script is named"
        error = UserError(f"{what}: {USAGE}")
        error.shared = True  # every rank has the same words
        raise error
    return Chosen(
        found.output_dir, found.directory, found.title, _read_steps(found.profile_steps), is_module, rest[0],
        tuple(rest[1:]),
    )  # fmt: skip


def _read_steps(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    from dlrm.runtime.step_profiler import parse_steps

    try:
        return parse_steps(text)
    except UserError as error:
        error.shared = True
        raise


def _count_own_words(words: Sequence[str]) -> int:
    """How many words come before SCRIPT or -m."""
    at = 0
    while at < len(words) and words[at].startswith("-") and words[at] not in ("-m", "-"):
        if words[at] == "--":
            return at
        at += 1 if "=" in words[at] or words[at] in ("-h", "--help") else 2
    return min(at, len(words))
