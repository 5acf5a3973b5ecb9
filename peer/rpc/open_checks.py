"""What a peer serves, and whether an open frame asks for that. Every refusal is a SessionFailed."""

from __future__ import annotations

import hmac
from dataclasses import dataclass

import grpc

from ...protocol import petal_pb2 as pb
from ...protocol.grammar.checker import GrammarChecker
from ...protocol.grammar.grammar import GrammarError, GrammarMatcher
from ...protocol.wire.limits import MAX_ROWS, PROTOCOL, PROTOCOL_MIN
from ..limits.quotas import Quota
from ..session.session import PeerSession
from ..session.spec import SessionFailed, SessionSpec, invalid

FEATURES = frozenset(
    {"tree", "fork", "rewind", "resume", "logits", "hidden", "top_logprobs", "embeddings", "logit_bias"}
)
# Tokens that a session may reserve beyond the context: trees in flight need room, too.
SPARE_TOKENS = 4096
Status = grpc.StatusCode


@dataclass(frozen=True)
class ServiceInfo:
    """What this peer serves."""

    peer_id: str
    model: str
    model_digest: bytes
    start: int
    end: int
    n_blocks: int
    hidden_size: int
    vocab_size: int
    context_length: int
    features: frozenset[str] = FEATURES
    idle_s: float = 600.0
    replay_bytes: int = 1 << 30


def check_open(info: ServiceInfo, message: pb.Open) -> None:
    """Whether this peer can serve such a session at all."""
    if not PROTOCOL_MIN <= message.protocol <= PROTOCOL:
        raise SessionFailed(
            Status.FAILED_PRECONDITION,
            f"protocol {message.protocol} is not spoken here; {PROTOCOL_MIN} to {PROTOCOL} are",
        )
    if unknown := sorted(set(message.required_features) - info.features):
        raise SessionFailed(Status.UNIMPLEMENTED, f"this peer does not know the required feature {unknown[0]!r}")
    if message.model_digest != info.model_digest:
        raise SessionFailed(
            Status.NOT_FOUND, f"this peer serves {info.model} ({info.model_digest.hex()[:16]}), not that model"
        )
    if not info.start <= message.start < message.end <= info.end:
        raise SessionFailed(
            Status.NOT_FOUND,
            f"this peer hosts blocks {info.start}:{info.end}, not {message.start}:{message.end}",
        )
    _check_fields(info, message)


def _check_fields(info: ServiceInfo, message: pb.Open) -> None:
    if len(message.session_id) != 16 or len(message.client_id) != 16:
        raise invalid("session_id and client_id are 16 bytes each")
    if message.fork_of and message.HasField("resume"):
        raise invalid("a session forks or resumes, not both")
    if message.codec not in (pb.FLOAT32, pb.BF16, pb.INT8):
        raise invalid("codec is none of float32, bf16, int8")
    if not 0 < message.reserve_tokens <= info.context_length + SPARE_TOKENS:
        raise invalid(f"reserve_tokens is {message.reserve_tokens}; the context is {info.context_length}")
    for name in ("adapter_id", "block_prompts"):
        if getattr(message, name):
            raise SessionFailed(Status.UNIMPLEMENTED, f"this peer does not serve {name} yet")


async def grammar_of(info: ServiceInfo, message: pb.Open, grammars: GrammarChecker | None) -> GrammarMatcher | None:
    """What a session's text shall follow, tried in a process that may be killed; None where it is free."""
    if not message.grammar:
        return None
    check_open(info, message)
    if message.end != info.n_blocks:
        raise invalid("a grammar goes to the last stage alone")
    if grammars is None:
        raise SessionFailed(Status.UNIMPLEMENTED, "this peer does not serve grammars")
    try:
        return await grammars.matcher(message.grammar)
    except GrammarError as error:
        raise invalid(str(error)) from None


def check_former(message: pb.Open, former: PeerSession | None) -> None:
    """A client may open its own session anew: its stream broke, which this peer may not have noticed yet."""
    if former is None:
        return
    if not hmac.compare_digest(former.spec.client_id, message.client_id) or message.route_epoch <= former.epoch:
        raise SessionFailed(Status.ALREADY_EXISTS, "that session id is taken; choose 16 random bytes")


def check_parent(message: pb.Open, parent: PeerSession | None) -> PeerSession:
    """The session that is to be forked."""
    # One answer for an unknown session and for another client's: ids cannot be probed.
    if parent is None or not hmac.compare_digest(parent.spec.client_id, message.client_id):
        raise SessionFailed(Status.NOT_FOUND, "there is no session of yours to fork by that id")
    if (parent.spec.codec, parent.spec.blocks) != (message.codec, range(message.start, message.end)):
        raise invalid("a fork keeps its parent's codec and blocks")
    if message.reserve_tokens < parent.spec.reserve_tokens:
        raise invalid(f"a fork reserves at least what its parent did, {parent.spec.reserve_tokens} tokens")
    return parent


def spec_of(info: ServiceInfo, message: pb.Open, quota: Quota) -> SessionSpec:
    """What a checked open frame agrees on."""
    return SessionSpec(
        session_id=message.session_id,
        client_id=message.client_id,
        codec=message.codec,
        reserve_tokens=message.reserve_tokens,
        context_length=info.context_length,
        hidden_size=info.hidden_size,
        vocab_size=info.vocab_size,
        blocks=range(message.start, message.end),
        n_blocks=info.n_blocks,
        peer_id=info.peer_id,
        max_nodes=MAX_ROWS - 1 if quota.tree_nodes is None else quota.tree_nodes,
    )
