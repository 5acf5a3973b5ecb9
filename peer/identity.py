"""The identity that a peer runs as: a file that no other process of this machine uses meanwhile."""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..protocol.paths import data_dir
from ..protocol.trust.identity import Identity

log = logging.getLogger(__name__)

_MOST = 100


class IdentityInUse(RuntimeError):
    """Another peer of this machine runs as this identity."""


class Claim:
    """An identity, locked until `release`. `ports`: where its peer listened last, so that saved lines stay true."""

    def __init__(self, path: Path) -> None:
        """Raises IdentityInUse, OSError, ValueError."""
        self.path = path
        self._lock = _lock(path)
        self._passing: Path | None = None
        try:
            self.identity = Identity.load_or_create(path)
        except BaseException:
            self.release()
            raise

    @classmethod
    def named(cls, path: Path | None) -> Claim:
        """Of the file at `path`; of this user's first that is free where there is none. Raises as the constructor."""
        if path is not None:
            return cls(path)
        try:
            return cls._first_free()
        except OSError as error:
            return cls._of_one_run(str(error))

    @classmethod
    def _first_free(cls) -> Claim:
        for path in itertools.islice(_names(data_dir()), _MOST):
            try:
                return cls(path)
            except IdentityInUse:
                continue
        raise IdentityInUse(f"{_MOST} peers run on this machine; name a file for another with --identity")

    @classmethod
    def _of_one_run(cls, reason: str) -> Claim:
        folder = Path(tempfile.mkdtemp(prefix="petal-identity-"))
        log.warning("this peer's identity ends with it, as there is no place to keep one (%s); name --identity", reason)
        claim = cls(folder / "identity")
        claim._passing = folder
        return claim

    @property
    def memberships(self) -> Path:
        """The folder of what this identity is a member of."""
        return self.path.with_name(f"{self.path.name}.members")

    def port(self, name: str) -> int:
        """Where the identity's peer listened last; 0 where that is not known."""
        found = self._ports().get(name)
        return found if isinstance(found, int) and 0 < found <= 65535 else 0

    def remember_port(self, name: str, port: int) -> None:
        ports = self._ports()
        if ports.get(name) != port:
            try:
                self._ports_file.write_text(json.dumps({**ports, name: port}))
            except OSError as error:
                log.warning("the port is another at the next start (%s)", error)

    def peers(self) -> list[str]:
        """Addresses at which the identity's peer has met others, and those that led it there."""
        try:
            found = json.loads(self._peers_file.read_text())
        except (OSError, ValueError):
            return []
        return [address for address in found if isinstance(address, str)] if isinstance(found, list) else []

    def remember_peers(self, addresses: Sequence[str]) -> None:
        try:
            self._peers_file.write_text(json.dumps(addresses))
        except OSError as error:
            log.debug("the peers that were met are not remembered (%s)", error)

    def release(self) -> None:
        """Others may run as it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if self._passing is not None:
            shutil.rmtree(self._passing, ignore_errors=True)

    @property
    def _peers_file(self) -> Path:
        return self.path.with_name(f"{self.path.name}.peers")

    @property
    def _ports_file(self) -> Path:
        return self.path.with_name(f"{self.path.name}.ports")

    def _ports(self) -> dict[str, object]:
        try:
            found = json.loads(self._ports_file.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def _names(folder: Path) -> Iterator[Path]:
    yield folder / "identity"
    yield from (folder / f"identity-{number}" for number in itertools.count(2))


def _lock(path: Path) -> int | None:
    """The kernel lets go of it when the process ends, however it ends. None where nothing can be written.

    An identity on a read-only disk cannot be locked, nor can two peers of it be told apart: whoever does that knows.
    """
    beside = path.with_name(f"{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(beside, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        if path.exists():
            return None
        raise
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise IdentityInUse(
            f"another peer of this machine runs as {path}; leave --identity out, or name a file of its own"
        ) from None
    return handle
