"""What an admin remembers: uses of invitations, and every certificate it has issued. SQLite: durable and atomic."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .certificates import Member
from .invites import Invite, InviteError

_TABLES = """
CREATE TABLE IF NOT EXISTS redeemed (invite TEXT, name TEXT, PRIMARY KEY (invite, name));
CREATE TABLE IF NOT EXISTS issued (serial TEXT PRIMARY KEY, name TEXT, role TEXT, labels TEXT, not_after REAL);
CREATE TABLE IF NOT EXISTS revoked (name TEXT PRIMARY KEY);
"""


@dataclass(frozen=True)
class Issue:
    """One certificate. `revoked`: its owner gets no other."""

    name: str
    role: str
    labels: Mapping[str, str]
    serial: int
    not_after: float
    revoked: bool


class Ledger:
    """One file; several programs may use it at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch(mode=0o600)  # sqlite would let everybody read it
        with self._transaction() as database:
            with suppress(sqlite3.OperationalError):  # there is no such table but in files of the first version
                database.execute("ALTER TABLE barred RENAME TO revoked")
            for table in _TABLES.strip().splitlines():
                database.execute(table)

    def redeem(self, invite: Invite, name: str) -> None:
        """Count a use of an invitation by this key; the same key may come again. Raises InviteError."""
        with self._transaction() as database:
            if self._is_revoked(database, name):
                raise InviteError("this key was revoked; make a new one and ask for a new invitation")
            names = [row[0] for row in database.execute("SELECT name FROM redeemed WHERE invite = ?", (invite.id,))]
            if name in names:
                return
            if len(names) >= invite.uses:
                raise InviteError("this invitation is used up; ask for a new one")
            database.execute("INSERT INTO redeemed VALUES (?, ?)", (invite.id, name))

    def record(self, member: Member) -> None:
        """Remember a certificate, so that it can be revoked."""
        labels, not_after = json.dumps(dict(member.labels)), member.not_after.timestamp()
        self._record(f"{member.serials[0]:x}", member.name, member.role, labels, not_after)

    def record_admin(self, name: str, serial: int, not_after: float) -> None:
        """Remember an admin's certificate, which the root has signed."""
        self._record(f"{serial:x}", name, "admin", "{}", not_after)

    def _record(self, *row: str | float) -> None:
        with self._transaction() as database:
            database.execute("INSERT INTO issued VALUES (?, ?, ?, ?, ?)", row)

    def revoke(self, name: str) -> None:
        """Issue nothing to this key any more."""
        with self._transaction() as database:
            database.execute("INSERT OR IGNORE INTO revoked VALUES (?)", (name,))

    def revoked(self, name: str) -> bool:
        with self._transaction() as database:
            return self._is_revoked(database, name)

    def issues(self) -> list[Issue]:
        """Certificates that have not expired, the newest last."""
        query = "SELECT name, role, labels, serial, not_after FROM issued WHERE not_after > ? ORDER BY not_after"
        with self._transaction() as database:
            rows = database.execute(query, (time.time(),)).fetchall()
            revoked = {row[0] for row in database.execute("SELECT name FROM revoked")}
        return [
            Issue(name, role, json.loads(labels), int(serial, 16), not_after, name in revoked)
            for name, role, labels, serial, not_after in rows
        ]

    @staticmethod
    def _is_revoked(database: sqlite3.Connection, name: str) -> bool:
        return database.execute("SELECT 1 FROM revoked WHERE name = ?", (name,)).fetchone() is not None

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Others wait; everything or nothing is on disk afterwards."""
        with closing(sqlite3.connect(self._path, timeout=30, isolation_level=None)) as database:
            database.execute("PRAGMA synchronous = FULL")
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
            except BaseException:
                database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")
