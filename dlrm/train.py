"""python -m dlrm.train [--model NAME] OPTIONS: train a model, evaluate it exactly, write a run folder.

The options are those of the model's spec (default: dlrm, with the flags of MLCommons' dlrm_main.py). What
happens afterwards, from the ranks to results.json, is `dlrm.trainer.trainer.train`.
"""

import sys
from collections.abc import Sequence

from dlrm.config.parser import parse_options, take_model_name
from dlrm.models.registry import find_model, name_program
from dlrm.runtime import entry, imports, stop, trace
from dlrm.runtime.device_io import list_folders
from dlrm.runtime.ranks import Ranks


def main(here: Ranks, argv: Sequence[str] | None = None, default: str = "dlrm") -> None:
    """Run this rank's part of a training. `default`: the model where `argv` has no --model."""
    # first of all: from here on SIGTERM, SIGUSR1 and SIGINT stop the training cleanly
    stop.listen_for_signals()

    # options: the spec is cheap to load, so --help and wrong options do not wait for torch
    name, words = take_model_name(sys.argv[1:] if argv is None else argv, default)
    spec = find_model(name)
    options = parse_options(spec.options, words, name_program(name), spec.description, spec.presets)

    # trace: before torch is imported, because reading its files is I/O too
    if options.run.trace and options.run.output_dir:
        folders = list_folders(options)
        trace.start_tracing(options.run.output_dir, here, "train", options.run.trace_flush_ms, folders)

    with trace.span("startup", "imports"), imports.import_quickly(options.run.cpu_fast_path):
        if spec.load_program:
            train = spec.load_program()
        else:
            from dlrm.trainer.trainer import train

            spec.load_parts()

    # ranks, data, model, sharding, optimizer, pipeline, loop, evaluation, run folder
    train(spec, options, here)


if __name__ == "__main__":
    entry.run_entry(main)
