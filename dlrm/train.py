"""python -m dlrm.train [--model NAME] OPTIONS: train a model, evaluate it exactly, write a run folder.

Options come from the model's spec (default: dlrm, with the flags of MLCommons' dlrm_main.py).
"""

import sys
from collections.abc import Sequence

from dlrm.config.parser import parse_options, take_model_name
from dlrm.models.registry import find_model
from dlrm.runtime import entry, imports, stop, trace
from dlrm.runtime.ranks import Ranks


def main(here: Ranks, argv: Sequence[str] | None = None, default: str = "dlrm") -> None:
    stop.listen_for_signals()
    name, words = take_model_name(sys.argv[1:] if argv is None else argv, default)
    spec = find_model(name)
    program = {"dlrm": "python -m dlrm.train", "bert4rec": "python -m dlrm.bert4rec"}.get(
        name, f"python -m dlrm.train --model {name}"
    )
    options = parse_options(spec.options, words, program, spec.description, spec.presets)

    if options.run.trace and options.run.output_dir:
        trace.start_tracing(options.run.output_dir, here, "train", options.run.trace_flush_ms)
    # after the trace has begun: reading torch is I/O too
    with trace.span("startup", "imports"), imports.import_quickly(options.run.cpu_fast_path):
        from dlrm.trainer.trainer import train

        spec.load_parts()
    train(spec, options, here)


if __name__ == "__main__":
    entry.run_entry(main)
