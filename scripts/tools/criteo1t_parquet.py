#!/usr/bin/env python3
"""Takes the command lines of OneFlow's tools/criteo1t_parquet.py. It needs no Spark.

It is `python -m dlrm.prep run --format parquet --mod_idx N`, with OneFlow's 40 million where N is not given:
    python tools/criteo1t_parquet.py --input_dir=TSV --output_dir=DIR --export_dataset_info
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # called from any folder

from common.command_line import CommandLineParser  # noqa: E402
from common.errors import USAGE, UserError  # noqa: E402
from dlrm.prep import __main__ as prep  # noqa: E402


def make_parser() -> CommandLineParser:
    """OneFlow's options."""
    parser = CommandLineParser(prog="criteo1t_parquet.py", description=__doc__,
                               formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--input_dir", required=True, help="folder of day_0, day_1 ...")
    parser.add_argument("--output_dir", required=True, help="folder for train/, val/, test/ and README.md")
    parser.add_argument("--spark_tmp_dir", help="folder for intermediate files [OUTPUT_DIR]")
    parser.add_argument("--spark_driver_memory_gb", type=int, help="not needed: memory is constant")
    parser.add_argument("--mod_idx", type=int, default=40_000_000, help="0 or less: 64-bit hashes [40000000]")
    parser.add_argument("--export_dataset_info", action="store_true", help="not needed: always done")
    return parser


def main() -> int:
    try:
        given = make_parser().parse_args()
    except UserError as error:
        print(f"criteo1t_parquet.py: {error}", file=sys.stderr)
        return USAGE
    words = ["run", "--input_dir", given.input_dir, "--output_dir", given.output_dir]
    words += ["--format", "parquet", f"--mod_idx={given.mod_idx}"]
    words += ["--workers", str(len(os.sched_getaffinity(0)))]
    if given.spark_tmp_dir:
        words += ["--tmp_dir", given.spark_tmp_dir]
    return prep.main(words)


if __name__ == "__main__":
    sys.exit(main())
