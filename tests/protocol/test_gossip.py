"""Gossip outlives whatever ails one beat."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest
from petal.protocol.private import gossip
from petal.protocol.private.gossip import GossipDirectory
from petal.protocol.private.membership import Membership


async def test_a_failed_beat_is_not_the_last(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    beats = 0
    again = asyncio.Event()

    def reload() -> None:
        nonlocal beats
        beats += 1
        if beats == 1:
            raise OSError("no space left on device")
        again.set()

    monkeypatch.setattr(gossip, "BEAT_S", 0.01)
    membership = SimpleNamespace(reload=reload, admin=None, addresses=[], remember=lambda addresses: None)
    directory = GossipDirectory(cast("Membership", membership), "127.0.0.1:1")
    await directory.join()
    await asyncio.wait_for(again.wait(), 10)
    await directory.close()
    assert "no space left" in caplog.text
