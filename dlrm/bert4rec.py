"""python -m dlrm.bert4rec OPTIONS: train BERT4Rec with the flags of torchrec's examples/bert4rec."""

from dlrm import train
from dlrm.runtime import entry
from dlrm.runtime.ranks import Ranks


def main(here: Ranks) -> None:
    train.main(here, default="bert4rec")


if __name__ == "__main__":
    entry.run_entry(main)
