"""Ranks of which one (sys.argv[1]) is killed while the process group forms."""

import os
import signal
import sys

from dlrm.runtime import gloo, session
from dlrm.runtime.ranks import Ranks


def main(here: Ranks) -> None:
    if here.rank == int(sys.argv[1]):
        gloo.create_gloo = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    with session.open_session(here, 300):
        pass
