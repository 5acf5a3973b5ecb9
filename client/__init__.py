"""Generate with a swarm: `from petal.client import SwarmModel`."""

from .chat import AsyncChat, Chat
from .config import GenerationConfig
from .drafting.drafter import Drafter
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
    "NoRoute",
    "OutputChunk",
    "PeerError",
    "SwarmModel",
]
