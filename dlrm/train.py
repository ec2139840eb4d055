"""Train a DLRM, evaluate it exactly, write a run folder.

Every command line of MLCommons' torchrec dlrm_main.py runs unchanged. Start it with launcher.sh or
torchrun, or alone for one rank. Without a dataset it trains on random data.
"""

import sys

from dlrm.config.options import Config, parse_options
from dlrm.config.presets import PRESETS
from dlrm.cpu import startup
from dlrm.runtime import entry, stop, trace
from dlrm.runtime.ranks import Ranks


def main(here: Ranks) -> None:
    stop.listen_for_signals()
    cfg = parse_options(Config, sys.argv[1:], "python -m dlrm.train", __doc__ or "", PRESETS)
    if cfg.run.trace and cfg.run.output_dir:
        trace.start_tracing(cfg.run.output_dir, here, "train", cfg.run.trace_flush_ms)
    # after the trace has begun: reading torch is I/O too
    with trace.span("startup", "imports"), startup.importing():
        from dlrm.trainer.trainer import train
    train(cfg, here)


if __name__ == "__main__":
    entry.run_entry(main)
