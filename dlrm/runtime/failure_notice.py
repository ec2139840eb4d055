"""Why all ranks of a job end: one notice in the store, which the first rank that notices the failure leaves.

Every rank looks for it about once a second, prints its reason and exits with its code.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from dlrm.runtime.peers import RankProcess
from dlrm.runtime.signed_store import SignedStore

KEY = "dlrm/failure"


@dataclass(frozen=True)
class FailureNotice:
    """What failed, and how the ranks end. Only the first notice of a job counts."""

    reason: str
    lost: Sequence[int] = ()  # ranks whose processes are killed: they may be alive, but do not answer
    code: int = 1  # what all ranks exit with
    # The only rank that prints the reason; None: every rank prints it. One line is enough where the rank that
    # failed has printed its own error.
    reporter_rank: int | None = None

    @classmethod
    def from_json(cls, data: bytes) -> "FailureNotice":
        """ValueError, KeyError or TypeError for anything else than a notice. The code is never 0: whatever is
        in the store, it does not make a job succeed.
        """
        values = json.loads(data)
        reason, lost, code, reporter = (values[name] for name in ("reason", "lost", "code", "reporter_rank"))
        if not isinstance(reason, str) or not all(type(n) is int for n in [*lost, code, reporter or 0]):
            raise ValueError("not a failure notice")
        return cls(" ".join(reason.split())[:1000], lost, min(max(code, 1), 255), reporter)


def read_notice(store: SignedStore) -> FailureNotice | None:
    found = store.find_value(KEY)
    try:
        return FailureNotice.from_json(found) if found else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return FailureNotice("a rank failed")


def post_notice(store: SignedStore, notice: FailureNotice) -> None:
    """Leave the notice, unless another rank has left one. RuntimeError where the store is gone."""
    store.set_first(KEY, json.dumps(asdict(notice)))


def try_post_notice(store: SignedStore, notice: FailureNotice) -> None:
    """The same where the store may be gone already: then the other ranks notice that themselves."""
    with contextlib.suppress(RuntimeError):
        post_notice(store, notice)


def name_ranks(ranks: set[int], hosts: Sequence[str] = ()) -> str:
    """ "ranks 1 on n01, 3 on n02 and 7 more"; without `hosts` (by rank) only the numbers."""
    some = sorted(ranks)[:8]
    named = [f"{rank} on {hosts[rank]}" if hosts else str(rank) for rank in some]
    more = f" and {len(ranks) - len(some)} more" if len(ranks) > len(some) else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(named)}{more}"


def describe_end(rank: int, cause: str, processes: Mapping[int, RankProcess]) -> str:
    """ "rank 1 on n01 was killed by signal 9". `cause` is from `LocalPeers.wait`."""
    named = f"rank {rank} on {processes[rank].host}" if rank in processes else f"rank {rank}"
    return f"{named} {cause.replace('killed', 'was killed') or 'is gone'}"
