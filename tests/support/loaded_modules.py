"""Run by test_doors.py: dlrm.train, then as the last line of stdout the optional modules that it loaded."""

import json
import sys

from dlrm import train
from dlrm.runtime import entry
from dlrm.runtime.ranks import Ranks

SHEDS = ("dlrm.cpu", "dlrm.embeddings.ssd")


def main(here: Ranks) -> None:
    train.main(here)
    print(json.dumps(sorted(name for name in sys.modules if name.startswith(SHEDS))))


if __name__ == "__main__":
    entry.run_entry(main)
