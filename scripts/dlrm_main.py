#!/usr/bin/env python3
"""Takes the command lines of TorchRec's and MLCommons' dlrm_main.py, under torchrun, torchx or alone.

It is `python -m dlrm.train --mlcommons_log` under the name that those programs' launch commands look for:
    torchx run -s local_cwd dist.ddp -j 1x2 --script scripts/dlrm_main.py -- --batch_size 4096 ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # called from any folder

from dlrm import train  # noqa: E402
from dlrm.runtime import entry  # noqa: E402
from dlrm.runtime.ranks import Ranks  # noqa: E402


def main(here: Ranks) -> None:
    train.main(here, ["--mlcommons_log", *sys.argv[1:]])


if __name__ == "__main__":
    entry.run_entry(main)
