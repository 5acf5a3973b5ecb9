"""Generate with a swarm: `from petal.client import SwarmModel`."""

from .drafting.drafter import Drafter
from .generation import GenerationConfig, Piece
from .routing.peers import ConnectError
from .routing.route import NoRoute
from .session.stream import PeerError
from .swarm import AsyncSwarmModel, SwarmModel

__all__ = [
    "AsyncSwarmModel",
    "ConnectError",
    "Drafter",
    "GenerationConfig",
    "NoRoute",
    "PeerError",
    "Piece",
    "SwarmModel",
]
