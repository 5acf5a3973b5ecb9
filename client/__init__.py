"""Generate with a swarm: `from petal.client import SwarmModel`."""

from .drafting.drafter import Drafter
from .generation import GenerationConfig, Piece
from .known_peers import ConnectError
from .route import NoRoute
from .stream import PeerError
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
