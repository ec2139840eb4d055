"""The session of all ranks: what it leaves behind when it ends."""

import os
import subprocess
import sys

from support.ranks import ROOT, free_port

CODE = """
import os, threading
from dlrm.runtime import ranks, session

before = dict(os.environ)
with session.open_session(ranks.find_ranks(), 30):
    pass
assert threading.active_count() == 1, threading.enumerate()  # one in C++ at exit would abort the process
assert dict(os.environ) == before
"""


def test_a_session_leaves_no_thread_and_no_names() -> None:
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", CODE], cwd=ROOT, env=os.environ | common | {"RANK": str(rank)},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    output = [rank.communicate(timeout=180)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], output
