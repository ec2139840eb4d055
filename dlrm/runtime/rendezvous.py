"""The store in which the ranks of a job leave values for each other, each signed with the job's token.

The store's port takes connections from anybody who reaches it. Values that were not signed by a rank of this
job count as not there, whatever they are, so they cannot make a rank end, stop or crash.
"""

import hashlib
import hmac
import os
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

TOKEN = "DLRM_JOB_TOKEN"  # launcher.sh makes it
LARGEST = 1 << 26  # bytes of a value
DIGEST = 32  # bytes in front of a value
POLL_SECONDS = 0.01


def job_key(environ: Mapping[str, str] = os.environ) -> bytes:
    """What signs this job's values. Without a token from launcher.sh, a key that keeps jobs apart which meet
    by accident on one port, and does not keep out who knows how it is made.
    """
    token = environ.get(TOKEN)
    secret = token or f"{environ.get('MASTER_PORT')} {environ.get('TORCHELASTIC_RUN_ID', '')}"
    return hashlib.sha256(b"dlrm-io job " + secret.encode("utf-8", "surrogateescape")).digest()


class SignedStore:
    """A torch.distributed store, of which only values of this job are seen."""

    def __init__(self, store: Any, key: bytes, seconds: float) -> None:
        self.store, self._key, self._seconds = store, key, seconds
        store.set_timeout(timedelta(seconds=seconds))

    def clone(self) -> "SignedStore":
        """Another connection: a call that waits does not hold up the others."""
        store = self.store.clone() if hasattr(self.store, "clone") else self.store
        return SignedStore(store, self._key, self._seconds)

    def name_group(self, name: str) -> str:
        """A prefix for keys that torch writes itself and that are not signed: hard to guess."""
        return f"{name}-{self._digest(name, b'prefix').hex()}"

    def set(self, name: str, value: str) -> None:
        self.store.set(name, self._sign(name, value))

    def set_first(self, name: str, value: str) -> None:
        """Set it unless a rank of this job has done so."""
        signed = self._sign(name, value)
        found = self.store.compare_set(name, "", signed)
        while found != signed and self._verify(name, found) is None:
            before, found = found, self.store.compare_set(name, found, signed)
            if found == before:  # a value that cannot be compared, such as an empty one
                self.store.set(name, signed)
                return

    def compare_set(self, name: str, expected: str, value: str) -> bytes:
        if expected:
            raise ValueError("only a first value can be set this way")
        self.set_first(name, value)
        return self.get(name)

    def find(self, name: str) -> bytes | None:
        """The value, if there is one of this job; returns at once."""
        return self._verify(name, self.store.get(name)) if self.store.check([name]) else None

    def check(self, names: Sequence[str]) -> bool:
        return all(self.find(name) is not None for name in names)

    def get(self, name: str) -> bytes:
        """The value, once it is there."""
        given_up = time.monotonic() + self._seconds
        while (found := self.find(name)) is None:
            if time.monotonic() > given_up:
                raise RuntimeError(f"timed out: no rank of this job has set {name} in {self._seconds:g} s")
            time.sleep(POLL_SECONDS)
        return found

    def multi_get(self, names: Sequence[str]) -> list[bytes | None]:
        """Values in one call; None for those of others. Waits for those that are missing."""
        found = self.store.multi_get(list(names)) if names else []
        return [self._verify(name, value) for name, value in zip(names, found, strict=True)]

    def wait(self, names: Sequence[str]) -> None:
        for name in names:
            self.get(name)

    def _digest(self, name: str, value: bytes) -> bytes:
        return hmac.digest(self._key, len(name).to_bytes(8, "big") + name.encode() + value, "sha256")

    def _sign(self, name: str, value: str) -> Any:
        data = value.encode()
        return self._digest(name, data).hex().encode() + data

    def _verify(self, name: str, signed: bytes) -> bytes | None:
        digest, data = bytes(signed[: 2 * DIGEST]), bytes(signed[2 * DIGEST :])
        if len(signed) > LARGEST or not hmac.compare_digest(digest, self._digest(name, data).hex().encode()):
            return None
        return data
