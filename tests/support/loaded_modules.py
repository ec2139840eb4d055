"""For test_optional_packages.py: dlrm.train, then on stdout's last line the optional modules it loaded."""

import json
import sys

from dlrm import train
from dlrm.runtime import entry
from dlrm.runtime.ranks import Ranks

OPTIONAL = ("dlrm.cpu", "dlrm.embeddings.ssd")


def main(here: Ranks) -> None:
    train.main(here)
    print(json.dumps(sorted(name for name in sys.modules if name.startswith(OPTIONAL))))


if __name__ == "__main__":
    entry.run_entry(main)
