"""Frozen dataclasses of options -> command-line flags -> a checked config; and its JSON for the run folder.

In: a dataclass whose fields are groups of options, argv, presets. Out: an instance of it. A wrong option is a
UserError of one line, the same on all ranks.
"""

import argparse
import itertools
import json
import math
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, field, fields
from typing import Any, TypeVar

from common.command_line import RELATIVE_TO_HELP, CommandLineParser, path_text
from dlrm.runtime.environment import mask_secrets
from dlrm.runtime.errors import UserError

C = TypeVar("C")
LARGEST = (1 << 63) - 1
METAVARS = {int: "N", float: "X", str: "S", path_text: "PATH"}


def option(default: Any, help: str, choices: Sequence[str] | None = None, bare: str | None = None) -> Any:
    """A field that becomes the flag --NAME. bare: the value of the flag when it is given without one."""
    return field(default=default, metadata={"help": help, "choices": choices, "bare": bare})


def path_option(
    help: str, default_path: Callable[[Mapping[str, Any]], str | None] | None = None, flag: str | None = None
) -> Any:
    """A field that becomes a flag for a file or a folder: `str | None`, absolute with --relative_to.

    default_path: all options -> where the file is sought without the flag, for --relative_to.
    flag: its name, where it is not the field's.
    """
    metadata = {"help": help, "choices": None, "bare": None, "path": True, "default_path": default_path}
    metadata["flag"] = flag
    return field(default=None, metadata=metadata)


def parsed_field(default: Any) -> Any:
    """A field that is not a flag: `parse_options` fills it."""
    return field(default=default, init=False)


def check_at_least(low: float, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not low <= value < math.inf:
            raise UserError(f"--{name} {value}: must be a number of at least {low:g}")


def check_at_most(high: float, config: object, *names: str) -> None:
    """For what a longer number would break: an allocation, a clock, numbers of 32 or 64 bits."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value <= high:
            raise UserError(f"--{name} {value}: must be a number of at most {high:,}")


def list_flags(kind: Any) -> list[Any]:
    """The fields that a command line can set."""
    return [each for each in fields(kind) if each.init]


def parse_numbers(text: str) -> tuple[int, ...]:
    """A list option: 1,2,3."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"not integers separated by commas: {text!r}") from None


def _add_flag(group: Any, name: str, kind: Any, default: Any, metadata: Mapping[str, Any]) -> None:
    """Add the option --`name` for a field of a dataclass.

    kind      the field's type; of `X | None` it is X that is parsed
    default   the field's default; None and False are not shown in --help
    metadata  as `option` and `path_option` make it: help, choices, bare, path
    """
    of = [arm for arm in typing.get_args(kind) if arm is not type(None)]
    bare = of[0] if isinstance(kind, types.UnionType) else kind
    listed = typing.get_origin(bare) is tuple
    shown = ",".join(map(str, default)) if listed and default else default
    text = metadata["help"] + ("" if default in (None, False) else f" [{shown}]")
    text = text.replace("%", "%%")
    if bare is bool:
        group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=default, help=text)
        return
    parse = path_text if metadata.get("path") else parse_numbers if listed else bare
    alone = {"nargs": "?", "const": metadata["bare"]} if metadata["bare"] else {}
    group.add_argument(
        f"--{metadata.get('flag') or name}", dest=name, type=parse, default=default, help=text,
        choices=metadata["choices"],
        metavar=None if metadata["choices"] else METAVARS.get(parse, "N,N,.."),
        **alone,
    )  # fmt: skip


def take_model_name(argv: Sequence[str], default: str) -> tuple[str, list[str]]:
    """(NAME of `--model NAME`, argv without it). It comes first of all: the other options are the model's."""
    words = list(argv)
    for at, word in enumerate(words):
        if word == "--model" and at + 1 < len(words):
            return words[at + 1], words[:at] + words[at + 2 :]
        if word.startswith("--model="):
            return word.removeprefix("--model="), words[:at] + words[at + 1 :]
    return default, words


def parse_options(
    kind: type[C],
    argv: Sequence[str],
    program: str,
    description: str,
    presets: Mapping[str, Callable[[], Mapping[str, Any]]] | None = None,
    *,
    ends: bool = True,
) -> C:
    """Flags -> a config of nested dataclasses. A preset gives defaults, flags on the line win.

    ends: --validate_only checks the inputs, too, and ends the program.
    """
    try:
        config, validate_only = _parse_options(kind, argv, program, description, presets or {})
        if validate_only and ends:
            check_inputs(config)
            sys.exit()
        return config
    except UserError as error:
        error.shared = True  # every rank has the same command line
        raise


def _parse_options(
    kind: type[C],
    argv: Sequence[str],
    program: str,
    description: str,
    presets: Mapping[str, Callable[[], Mapping[str, Any]]],
) -> tuple[C, bool]:
    """(the config, whether --validate_only was given)."""
    groups = {f.name: f.default_factory for f in fields(kind)}  # type: ignore[arg-type, misc]
    parser = _make_parser(kind, groups, program, description, presets)
    from_preset: Mapping[str, Any] = {}
    if presets:
        chooser = CommandLineParser(prog=program, add_help=False)
        chooser.add_argument("--preset", choices=list(presets))
        if chosen := chooser.parse_known_args(argv)[0].preset:
            from_preset = presets[chosen]()
            parser.set_defaults(**from_preset)
    if hasattr(kind, "read_defaults"):
        parser.set_defaults(**kind.read_defaults(_find_source_run(program, argv)))  # type: ignore[attr-defined]
    values = _read_values(parser, argv, groups)
    made = {
        title: group_kind(**{f.name: values[f.name] for f in list_flags(group_kind)})  # type: ignore[operator, misc]
        for title, group_kind in groups.items()
    }
    if values["check_options"]:
        print("dlrm: --check_options is now --validate_only; this release accepts both", file=sys.stderr)
    parsed = {
        "preset": values.get("preset"),
        "given_options": tuple(sorted({*from_preset, *_list_given(parser, argv, values)})),
    }
    for group in made.values():
        for each in fields(group):
            if not each.init and each.name in parsed:
                object.__setattr__(group, each.name, parsed[each.name])  # frozen for everyone else
    return kind(**made), values["validate_only"] or values["check_options"]


def _make_parser(
    kind: type, groups: Mapping[str, Any], program: str, description: str, presets: Mapping[str, Any]
) -> CommandLineParser:
    """A flag for each field of the groups (name -> dataclass), and the flags that every program has."""
    parser = CommandLineParser(
        prog=program, description=description, epilog=describe_presets(presets),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.other_names = getattr(kind, "other_names", {})
    parser.add_argument("--validate_only", action="store_true", help="check the options, then exit")
    parser.add_argument("--check_options", action="store_true", help=argparse.SUPPRESS)  # its old name
    parser.add_argument("--relative_to", metavar="FOLDER", help=RELATIVE_TO_HELP)
    if presets:
        parser.add_argument(
            "--preset", choices=list(presets), metavar="NAME",
            help="published settings as defaults: one of the presets below",
        )  # fmt: skip
    for title, group_kind in groups.items():
        group = parser.add_argument_group(title)
        hints = typing.get_type_hints(group_kind)
        for each in list_flags(group_kind):
            _add_flag(group, each.name, hints[each.name], each.default, each.metadata)
    return parser


def _read_values(parser: CommandLineParser, argv: Sequence[str], groups: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> value of each flag; relative paths are those that --relative_to means."""
    found = parser.parse_args(argv)
    values = vars(found)
    if found.relative_to:
        for each in itertools.chain.from_iterable(map(list_flags, groups.values())):
            if values[each.name] is None and (find := each.metadata.get("default_path")):
                values[each.name] = find(values)
    parser.resolve_paths(found, found.relative_to)
    for name, value in values.items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and not -LARGEST <= number <= LARGEST:
                raise UserError(f"--{name} {number:.3g}: must be a 64-bit number")
    return values


def _find_source_run(program: str, argv: Sequence[str]) -> str | None:
    """The run folder of --from, whose options are defaults."""
    chooser = CommandLineParser(prog=program, add_help=False)
    chooser.add_argument("--from", dest="source_run", type=path_text)
    chooser.add_argument("--relative_to")
    found, _ = chooser.parse_known_args(argv)
    chooser.resolve_paths(found, found.relative_to)
    return found.source_run


def check_inputs(config: Any) -> None:
    """UserError where files that the options name are not there, for a model whose options can tell."""
    if hasattr(config, "check_inputs"):
        config.check_inputs()


def _list_given(parser: argparse.ArgumentParser, argv: Sequence[str], values: Mapping[str, Any]) -> set[str]:
    """The options that stand on the command line: those whose value is not the one put there before."""
    before = object()
    found = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(values, before))))
    return {name for name, value in found.items() if value is not before} - {"preset", "relative_to"}


def describe_presets(presets: Mapping[str, Callable[[], Mapping[str, Any]]]) -> str:
    """The end of --help: each preset with the first line of its function's text."""
    if not presets:
        return ""
    width = max(map(len, presets))
    lines = [
        f"  {name:{width}}  {(make.__doc__ or '').strip().partition(chr(10))[0]}".rstrip()
        for name, make in presets.items()
    ]
    return "\n".join(["presets:", *lines])


def as_json(config: Any, launch: Mapping[str, Any]) -> str:
    """config.json's text: every option as resolved, and where the run was started; secrets are masked."""
    return json.dumps(_mask_secrets({**asdict(config), "launch": dict(launch)}), indent=1) + "\n"


def _mask_secrets(value: Any) -> Any:
    """The same, with what looks like a password or a key replaced by a mask."""
    if isinstance(value, str):
        return mask_secrets(value)
    if isinstance(value, dict):
        return {name: _mask_secrets(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_mask_secrets(each) for each in value]
    return value
