"""Petal: large language models that many machines run together.

>>> from petal import SwarmModel
>>> model = SwarmModel.connect("demo", initial_peers=["192.168.1.7:45123"])

Names are loaded when they are first used; all of Petal's errors are PetalErrors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from petal.client import (
        AsyncChat,
        AsyncSwarmModel,
        Chat,
        ConnectError,
        Drafter,
        GenerationConfig,
        ModelClosed,
        NoRoute,
        OutputChunk,
        PeerError,
        PetalError,
        SettingsError,
        SwarmModel,
    )

    __version__: str

__all__ = [
    "AsyncChat",
    "AsyncSwarmModel",
    "Chat",
    "ConnectError",
    "Drafter",
    "GenerationConfig",
    "ModelClosed",
    "NoRoute",
    "OutputChunk",
    "PeerError",
    "PetalError",
    "SettingsError",
    "SwarmModel",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("petal-swarm")
    if name in __all__:
        from petal import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
