"""Wrong words on the command lines of all programs: one line that names what was meant."""

import re
from collections.abc import Callable
from dataclasses import fields

import pytest
from support.ranks import python

from analysis.__main__ import make_parser as make_analysis_parser
from common.command_line import find_similar
from common.errors import UserError
from dlrm.bench import BenchConfig
from dlrm.config.parser import list_flags, parse_options
from dlrm.models.bert4rec.options import BertConfig
from dlrm.models.dlrm.options import Config
from dlrm.models.dlrm.other_names import OTHER_NAMES
from dlrm.models.dlrm.presets import PRESETS
from dlrm.prep.__main__ import make_parser as make_prep_parser

PROGRAMS: dict[str, Callable[[list[str]], object]] = {
    "analysis": lambda words: make_analysis_parser().parse_args(words),
    "prep": lambda words: make_prep_parser()[0].parse_args(words),
    "train": lambda words: parse_options(Config, words, "python -m dlrm.train", "", PRESETS),
    "bert4rec": lambda words: parse_options(BertConfig, words, "python -m dlrm.bert4rec", ""),
    "bench": lambda words: parse_options(BenchConfig, words, "python -m dlrm.bench", ""),
}


@pytest.mark.parametrize(
    ("program", "words", "meant"),
    [
        ("analysis", "raport RUN", "'raport'.*did you mean report"),
        ("analysis", "perfetto RUN --possix", "did you mean --posix instead of --possix"),
        ("analysis", "perfetto RUN --format pbtrace", "did you mean pftrace"),
        ("prep", "rum --input_dir a", "'rum'.*did you mean run"),
        ("prep", "run --input-dir a --output_dir b", "did you mean --input_dir instead of --input-dir"),
        ("prep", "run --input_dir a --output_dir b --worker=2", "did you mean --workers instead of --worker"),
        ("train", "--batch-size 5", "did you mean --batch_size instead of --batch-size"),
        ("train", "--preset kagle", "did you mean kaggle"),
        ("train", "--lr=28", "did you mean --learning_rate instead of --lr"),  # NVIDIA's
        (
            "train",
            "--train_batch_size 8",
            "did you mean --batch_size instead of --train_batch_size",
        ),  # OneFlow's
        ("bert4rec", "--Output_Dir x", "did you mean --output_dir instead of --Output_Dir"),
        ("bench", "--batch_size 5", "did you mean --batch_sizes instead of --batch_size"),
    ],
)
def test_what_was_meant(program: str, words: str, meant: str) -> None:
    with pytest.raises(UserError, match=meant) as error:
        PROGRAMS[program](words.split())
    assert str(error.value).count("\n") == 0
    assert re.search(r"\(python -m \S+.* --help lists the options\)$", str(error.value))


def test_nothing_is_suggested_for_a_word_like_none() -> None:
    assert find_similar("--zzz", ["--batch_size", "--epochs"]) == ""
    for word in ("--zzz_9", "--qx"):
        with pytest.raises(UserError) as error:
            PROGRAMS["train"]([word])
        assert "did you mean" not in str(error.value)


def test_names_of_other_programs_mean_options_of_this_one() -> None:
    known = {f"--{flag.name}" for group in fields(Config) for flag in list_flags(group.default_factory)}
    assert {meant.split()[0] for meant in OTHER_NAMES.values()} <= known and not known & set(OTHER_NAMES)


@pytest.mark.parametrize("program", ["analysis", "dlrm.prep"])
def test_a_program_alone_prints_its_help(program: str) -> None:
    done = python("-m", program)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"usage: python -m {program}") and "\n    check " in done.stderr


@pytest.mark.parametrize("program", ["requirements/audit.py", "requirements/lock.py", "patches/check.py"])
def test_tools_have_a_help(program: str) -> None:
    done = python(program, "--help")
    assert done.returncode == 0 and f"python {program}" in done.stdout and done.stderr == ""
