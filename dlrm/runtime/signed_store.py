"""The key-value store that the ranks of a job share, with a signature on each value.

The store's port accepts connections from anybody who can reach it. A value that no rank of this job signed
counts as not there, whatever it is, so another program cannot make a rank exit, stop or crash with one. (It
can still delete values, or fill the memory of rank 0: that ends the job, and never with success.)
"""

import hashlib
import hmac
import os
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

TOKEN = "DLRM_JOB_TOKEN"  # launcher.sh makes it
MAX_VALUE_BYTES = 1 << 26
DIGEST_BYTES = 32  # of SHA-256; in front of a value, as hexadecimal digits
POLL_SECONDS = 0.01


def read_job_key(environ: Mapping[str, str] = os.environ) -> bytes:
    """The key that signs this job's values: 32 bytes.

    With launcher.sh's random token it keeps other programs out. Without one it is made of the port and
    torchrun's job id: that only keeps apart two jobs that use one port by mistake.
    """
    token = environ.get(TOKEN)
    secret = token or f"{environ.get('MASTER_PORT')} {environ.get('TORCHELASTIC_RUN_ID', '')}"
    return hashlib.sha256(b"dlrm-io job " + secret.encode("utf-8", "surrogateescape")).digest()


class SignedStore:
    """A torch.distributed store that shows only the values of this job.

    A signature covers the key too: a value that is copied under another key does not count. All methods raise
    RuntimeError when the store is gone.
    """

    def __init__(self, store: Any, key: bytes, seconds: float) -> None:
        """`key`: of the job, see `read_job_key`. `seconds`: how long a call waits for a value."""
        self.store, self._key, self._seconds = store, key, seconds
        store.set_timeout(timedelta(seconds=seconds))

    def clone(self) -> "SignedStore":
        """Another connection, for another thread: a call that waits does not block those of this one."""
        store = self.store.clone() if hasattr(self.store, "clone") else self.store
        return SignedStore(store, self._key, self._seconds)

    def name_group(self, name: str) -> str:
        """A prefix for the keys that torch's process group writes. They are not signed, so they are made hard
        to guess.
        """
        return f"{name}-{self._compute_digest(name, b'prefix').hex()}"

    def set(self, name: str, value: str) -> None:
        self.store.set(name, self._sign_value(name, value))

    def set_first(self, name: str, value: str) -> None:
        """Set it, unless a rank of this job has set it; another program's value is replaced."""
        signed = self._sign_value(name, value)
        found = self.store.compare_set(name, "", signed)
        while found != signed and self._verify_value(name, found) is None:
            before, found = found, self.store.compare_set(name, found, signed)
            if found == before:  # the swap did not work: torch cannot compare with an empty value
                self.store.set(name, signed)
                return

    def compare_set(self, name: str, expected: str, value: str) -> bytes:
        """As torch's stores have it, for an `expected` of "" alone."""
        if expected:
            raise ValueError("only a first value can be set this way")
        self.set_first(name, value)
        return self.get(name)

    def find_value(self, name: str) -> bytes | None:
        """The value, or None where this job has set none; returns at once."""
        return self._verify_value(name, self.store.get(name)) if self.store.check([name]) else None

    def check(self, names: Sequence[str]) -> bool:
        return all(self.find_value(name) is not None for name in names)

    def get(self, name: str) -> bytes:
        """Wait for the value."""
        deadline = time.monotonic() + self._seconds
        while (found := self.find_value(name)) is None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"timed out: no rank of this job has set {name} in {self._seconds:g} s")
            time.sleep(POLL_SECONDS)
        return found

    def multi_get(self, names: Sequence[str]) -> list[bytes | None]:
        """Several values in one call, None for those of other programs. Waits until all keys exist."""
        found = self.store.multi_get(list(names)) if names else []
        return [self._verify_value(name, value) for name, value in zip(names, found, strict=True)]

    def wait(self, names: Sequence[str]) -> None:
        for name in names:
            self.get(name)

    def _compute_digest(self, name: str, value: bytes) -> bytes:
        return hmac.digest(self._key, len(name).to_bytes(8, "big") + name.encode() + value, "sha256")

    def _sign_value(self, name: str, value: str) -> Any:
        data = value.encode()
        return self._compute_digest(name, data).hex().encode() + data

    def _verify_value(self, name: str, signed: bytes) -> bytes | None:
        digest, data = bytes(signed[: 2 * DIGEST_BYTES]), bytes(signed[2 * DIGEST_BYTES :])
        if len(signed) > MAX_VALUE_BYTES or not hmac.compare_digest(
            digest, self._compute_digest(name, data).hex().encode()
        ):
            return None
        return data
