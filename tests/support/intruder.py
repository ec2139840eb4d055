"""Another program at a job's rendezvous: it sets or deletes the values that ranks have there for each other.

    RankServer.start("support.intruder", [PORT, HOW], ...)

HOW     set, delete: keys that a job uses; all: keys that it finds; finished: for ever, what ended ranks say
"""

import json
import sys
import time
from datetime import timedelta

import torch.distributed as dist

from dlrm.runtime.ranks import Ranks

NOTE = json.dumps({"reason": "nothing", "lost": [0, 1], "code": 0, "reporter_rank": None})
GARBAGE = [
    NOTE,
    "",
    "0",
    "{" * 5000,
    "\udcff".encode("utf-8", "surrogateescape"),
    "x" * 1000000,
    "0" * 64 + NOTE,
]
NAMES = [
    "dlrm/failure", "dlrm/processes", "dlrm/stop/0", "dlrm/stop/0/last", "dlrm/checkpoint/0/begin",
    *(f"dlrm/{each}/{r}" for r in (0, 1) for each in ("process", "heartbeat", "finished", "left", "stop/0")),
    *(f"group/{each}{r}" for r in (0, 1) for each in ("", "host", "file", "opened")),
]  # fmt: skip
TURNS = 60


def main(_: Ranks) -> None:
    port, how = int(sys.argv[1]), sys.argv[2]
    store = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=5), wait_for_workers=False)
    while how == "finished":
        for rank in range(2):
            store.delete_key(f"dlrm/finished/{rank}")
            store.delete_key(f"dlrm/left/{rank}")
    names = NAMES
    for turn in range(TURNS):
        if how == "all":
            names = sorted({*names, *store.list_keys()})
        for number, name in enumerate(names):
            if how == "delete":
                store.delete_key(name)
            else:
                store.set(name, GARBAGE[(turn + number) % len(GARBAGE)])
        time.sleep(0.05)
