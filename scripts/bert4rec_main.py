#!/usr/bin/env python3
"""Takes the command lines of torchrec's examples/bert4rec/bert4rec_main.py, under torchrun, torchx or alone.

It is `python -m dlrm.bert4rec` under the name that the example's launch commands look for:
    torchx run -s local_cwd dist.ddp -j 1x2 --script scripts/bert4rec_main.py -- --dataset_name random
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # called from any folder

from dlrm import bert4rec  # noqa: E402
from dlrm.runtime import entry  # noqa: E402

if __name__ == "__main__":
    entry.run_entry(bert4rec.main)
