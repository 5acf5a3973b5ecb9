"""Generate with a swarm: `from petal.client import SwarmModel`."""

from ..protocol.errors import PetalError
from .arguments import SettingsError
from .chat import AsyncChat, Chat
from .config import GenerationConfig
from .drafting.drafter import Drafter
from .event_loop import ModelClosed
from .output import OutputChunk
from .routing.peers import ConnectError
from .routing.route import NoRoute
from .session.peer_error import PeerError
from .swarm import AsyncSwarmModel, SwarmModel

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
]
