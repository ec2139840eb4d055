"""Values that the ranks of a job share by name, without torch: what its store is to `session`.

In: a `RankGroup`. Out: an object with set, check and get. Rank 0 keeps the values; the others ask it over
TCP, with the job's key. Any thread may use it.
"""

import multiprocessing
import os
import threading
from multiprocessing.managers import BaseManager
from typing import Any

from dlrm.runtime.mpi import RankGroup
from dlrm.runtime.signed_store import read_job_key


class SharedValues:
    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def set(self, name: str, value: str) -> None:
        self._values[name] = value.encode()

    def check(self, names: list[str]) -> bool:
        return all(name in self._values for name in names)

    def get(self, name: str) -> bytes:
        return self._values[name]


class _Manager(BaseManager):
    pass


def open_shared_values(group: RankGroup) -> Any:
    """The same values on all ranks. A collective."""
    values = SharedValues()
    if group.here.world_size == 1:
        return values
    key = read_job_key()
    multiprocessing.current_process().authkey = key
    port = 0
    if group.here.first:
        _Manager.register("values", callable=lambda: values)
        server = _Manager(("", 0), authkey=key).get_server()
        # the library lets 16 wait for a connection: of more ranks that come at once some would hang
        server.listener._listener._socket.listen(4096)  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, name="shared-values", daemon=True).start()
        port = int(server.address[1])  # type: ignore[index, arg-type]
    # the launcher may know rank 0's node by a better name than its own: of a network that all nodes are in
    host = os.environ.get("MASTER_ADDR") or group.here.host
    host, first_host, port = group.broadcast_from_first((host, group.here.host, port))
    if group.here.first:
        return values
    _Manager.register("values")
    manager = _Manager(("127.0.0.1" if first_host == group.here.host else host, port), authkey=key)
    manager.connect()
    return manager.values()  # type: ignore[attr-defined]
