"""Train BERT4Rec, rank items exactly over all users, write a run folder.

Every command line of torchrec's examples/bert4rec runs unchanged. Start it with launcher.sh, torchrun or
torchx, or alone for one rank. --dataset_name random or markov needs no files.
"""

import sys

from dlrm.config.options import parse_options
from dlrm.cpu import startup
from dlrm.models.bert4rec.options import PRESETS, BertConfig
from dlrm.runtime import entry, stop, trace
from dlrm.runtime.ranks import Ranks


def main(here: Ranks) -> None:
    stop.listen_for_signals()
    cfg = parse_options(BertConfig, sys.argv[1:], "python -m dlrm.bert4rec", __doc__ or "", PRESETS)
    if cfg.run.trace and cfg.run.output_dir:
        trace.start_tracing(cfg.run.output_dir, here, "train", cfg.run.trace_flush_ms)
    # after the trace has begun: reading torch is I/O too
    with trace.span("startup", "imports"), startup.importing():
        from dlrm.models.bert4rec.trainer import train
    train(cfg, here)


if __name__ == "__main__":
    entry.run_entry(main)
