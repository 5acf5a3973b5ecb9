"""API keys: a file of their digests and limits, and what each has used of the running minute."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ...protocol.errors import PetalError
from ...protocol.trust.private_file import write_private
from .errors import too_many

_PREFIX = "petal-"


class KeyFileError(PetalError, ValueError):
    """What is wrong with a file of keys, in one sentence."""


@dataclass(frozen=True)
class KeyRecord:
    """What is kept of a key: 256 random bits need no salt. None is no limit; a higher priority waits in front.

    `admin`: may also see what is for those who run the gateway.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    label: str
    sha256: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    priority: int = 0
    admin: bool = False


_FILE = TypeAdapter(list[KeyRecord])


class MinuteBudget:
    """So many units a minute; a burst may take a whole minute's."""

    def __init__(self, per_minute: int | None) -> None:
        self._rate = per_minute
        self._left = float(per_minute or 0)
        self._filled_at = time.monotonic()

    def check(self, what: str) -> None:
        """Raises ApiError where nothing is left."""
        if self._rate is None:
            return
        now = time.monotonic()
        self._left = min(float(self._rate), self._left + (now - self._filled_at) * self._rate / 60)
        self._filled_at = now
        if self._left < 1:
            wait_s = (1 - self._left) * 60 / self._rate if self._rate else 60.0
            raise too_many(f"this key has {self._rate} {what} a minute; retry in {wait_s:.0f} s", wait_s)

    def spend(self, units: float) -> None:
        """What is only known afterwards may lead into debt."""
        self._left -= units


@dataclass
class Caller:
    """Who calls, and what is left to them."""

    record: KeyRecord
    requests: MinuteBudget = field(init=False)
    tokens: MinuteBudget = field(init=False)

    def __post_init__(self) -> None:
        self.requests = MinuteBudget(self.record.requests_per_minute)
        self.tokens = MinuteBudget(self.record.tokens_per_minute)

    @property
    def owner(self) -> str:
        """Whose sessions are whose."""
        return self.record.sha256

    def admit(self) -> None:
        """One request more. Raises ApiError."""
        self.requests.check("requests")
        self.tokens.check("tokens")
        self.requests.spend(1)


# Whoever reaches a gateway that asks for no keys.
ANYBODY = KeyRecord("anybody", "")


class KeyRing:
    """Callers by their keys; without keys everybody is the same caller."""

    def __init__(self, records: Iterable[KeyRecord] = ()) -> None:
        self._callers = {record.sha256: Caller(record) for record in records}
        self._anybody = None if self._callers else Caller(ANYBODY)

    @property
    def asks(self) -> bool:
        return self._anybody is None

    def find(self, key: str) -> Caller | None:
        return self._anybody or self._callers.get(digest_of(key))


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read_keys(path: Path) -> list[KeyRecord]:
    """Raises KeyFileError, also where there is no such file or no key in it."""
    try:
        records = _FILE.validate_json(path.read_bytes())
    except OSError as error:
        raise KeyFileError(f"the keys at {path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise KeyFileError(f"{path} holds no keys: {where} {fault['msg']}".replace("\n", " ")) from error
    if not records:
        raise KeyFileError(f"{path} holds no key; `petal keys add LABEL` makes one")
    return records


def add_key(path: Path, record: KeyRecord) -> str:
    """Make a key with this record's label and limits; only its digest is kept. Raises KeyFileError, OSError."""
    records = read_keys(path) if path.exists() else []
    if any(other.label == record.label for other in records):
        raise KeyFileError(f"there is a key {record.label!r} already; take another label, or remove it")
    key = _PREFIX + secrets.token_urlsafe(32)
    _write(path, [*records, replace(record, sha256=digest_of(key))])
    return key


def remove_key(path: Path, label: str) -> None:
    """Raises KeyFileError, OSError."""
    records = read_keys(path)
    kept = [record for record in records if record.label != label]
    if len(kept) == len(records):
        raise KeyFileError(f"there is no key {label!r}")
    _write(path, kept)


def _write(path: Path, records: Iterable[KeyRecord]) -> None:
    write_private(path, json.dumps([asdict(record) for record in records], indent=1).encode())
