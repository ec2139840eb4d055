#!/usr/bin/env python3
"""Takes the command lines of OneFlow's dlrm_train_eval.py, under torchrun or alone.

It is `python -m dlrm.scripts.dlrm_train_eval` under the name that OneFlow's launch command looks for:
    torchrun --nproc_per_node 8 scripts/dlrm_train_eval.py --data_dir DIR --persistent_path STORE ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # called from any folder

from dlrm.runtime import entry  # noqa: E402
from dlrm.scripts import dlrm_train_eval  # noqa: E402

if __name__ == "__main__":
    entry.run_entry(dlrm_train_eval.main)
