from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PeerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PEER_STATE_UNSPECIFIED: _ClassVar[PeerState]
    JOINING: _ClassVar[PeerState]
    ONLINE: _ClassVar[PeerState]
    DRAINING: _ClassVar[PeerState]
    LEFT: _ClassVar[PeerState]

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CODEC_UNSPECIFIED: _ClassVar[Codec]
    FLOAT32: _ClassVar[Codec]
    BF16: _ClassVar[Codec]
    INT8: _ClassVar[Codec]

class Op(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FORWARD: _ClassVar[Op]
    BACKWARD: _ClassVar[Op]
PEER_STATE_UNSPECIFIED: PeerState
JOINING: PeerState
ONLINE: PeerState
DRAINING: PeerState
LEFT: PeerState
CODEC_UNSPECIFIED: Codec
FLOAT32: Codec
BF16: Codec
INT8: Codec
FORWARD: Op
BACKWARD: Op

class PeerRecord(_message.Message):
    __slots__ = ("peer_id", "model", "model_digest", "n_blocks", "start", "end", "addresses", "multiaddrs", "dtype", "quantization", "numerics", "protocol_min", "protocol_max", "state", "context_length", "cache_tokens", "cache_tokens_free", "max_sessions", "sessions", "max_rows", "throughput", "block_digests", "embedding_digest", "norm_digest", "head_digest", "version", "expires_at", "vocab_size", "hidden_size", "features", "certificates", "hello_nonce")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    N_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    MULTIADDRS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MIN_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MAX_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    CACHE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHE_TOKENS_FREE_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    THROUGHPUT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NORM_DIGEST_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATES_FIELD_NUMBER: _ClassVar[int]
    HELLO_NONCE_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    model: str
    model_digest: bytes
    n_blocks: int
    start: int
    end: int
    addresses: _containers.RepeatedScalarFieldContainer[str]
    multiaddrs: _containers.RepeatedScalarFieldContainer[str]
    dtype: str
    quantization: str
    numerics: str
    protocol_min: int
    protocol_max: int
    state: PeerState
    context_length: int
    cache_tokens: int
    cache_tokens_free: int
    max_sessions: int
    sessions: int
    max_rows: int
    throughput: float
    block_digests: _containers.RepeatedScalarFieldContainer[bytes]
    embedding_digest: bytes
    norm_digest: bytes
    head_digest: bytes
    version: int
    expires_at: float
    vocab_size: int
    hidden_size: int
    features: _containers.RepeatedScalarFieldContainer[str]
    certificates: _containers.RepeatedScalarFieldContainer[bytes]
    hello_nonce: bytes
    def __init__(self, peer_id: _Optional[str] = ..., model: _Optional[str] = ..., model_digest: _Optional[bytes] = ..., n_blocks: _Optional[int] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., addresses: _Optional[_Iterable[str]] = ..., multiaddrs: _Optional[_Iterable[str]] = ..., dtype: _Optional[str] = ..., quantization: _Optional[str] = ..., numerics: _Optional[str] = ..., protocol_min: _Optional[int] = ..., protocol_max: _Optional[int] = ..., state: _Optional[_Union[PeerState, str]] = ..., context_length: _Optional[int] = ..., cache_tokens: _Optional[int] = ..., cache_tokens_free: _Optional[int] = ..., max_sessions: _Optional[int] = ..., sessions: _Optional[int] = ..., max_rows: _Optional[int] = ..., throughput: _Optional[float] = ..., block_digests: _Optional[_Iterable[bytes]] = ..., embedding_digest: _Optional[bytes] = ..., norm_digest: _Optional[bytes] = ..., head_digest: _Optional[bytes] = ..., version: _Optional[int] = ..., expires_at: _Optional[float] = ..., vocab_size: _Optional[int] = ..., hidden_size: _Optional[int] = ..., features: _Optional[_Iterable[str]] = ..., certificates: _Optional[_Iterable[bytes]] = ..., hello_nonce: _Optional[bytes] = ...) -> None: ...

class SignedRecord(_message.Message):
    __slots__ = ("record", "public_key", "signature")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    record: bytes
    public_key: bytes
    signature: bytes
    def __init__(self, record: _Optional[bytes] = ..., public_key: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class RevocationList(_message.Message):
    __slots__ = ("crl", "issuer")
    CRL_FIELD_NUMBER: _ClassVar[int]
    ISSUER_FIELD_NUMBER: _ClassVar[int]
    crl: bytes
    issuer: bytes
    def __init__(self, crl: _Optional[bytes] = ..., issuer: _Optional[bytes] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("model", "records", "revocations")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    REVOCATIONS_FIELD_NUMBER: _ClassVar[int]
    model: str
    records: _containers.RepeatedCompositeFieldContainer[SignedRecord]
    revocations: _containers.RepeatedCompositeFieldContainer[RevocationList]
    def __init__(self, model: _Optional[str] = ..., records: _Optional[_Iterable[_Union[SignedRecord, _Mapping]]] = ..., revocations: _Optional[_Iterable[_Union[RevocationList, _Mapping]]] = ...) -> None: ...

class ListReply(_message.Message):
    __slots__ = ("records", "bootstrap", "revocations")
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    BOOTSTRAP_FIELD_NUMBER: _ClassVar[int]
    REVOCATIONS_FIELD_NUMBER: _ClassVar[int]
    records: _containers.RepeatedCompositeFieldContainer[SignedRecord]
    bootstrap: _containers.RepeatedScalarFieldContainer[str]
    revocations: _containers.RepeatedCompositeFieldContainer[RevocationList]
    def __init__(self, records: _Optional[_Iterable[_Union[SignedRecord, _Mapping]]] = ..., bootstrap: _Optional[_Iterable[str]] = ..., revocations: _Optional[_Iterable[_Union[RevocationList, _Mapping]]] = ...) -> None: ...

class PingRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PingReply(_message.Message):
    __slots__ = ("peer_id", "state")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    state: PeerState
    def __init__(self, peer_id: _Optional[str] = ..., state: _Optional[_Union[PeerState, str]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "sequence", "logit_bias", "grammar_mask")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_MASK_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    sequence: int
    logit_bias: _containers.ScalarMap[int, float]
    grammar_mask: bytes
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., sequence: _Optional[int] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., grammar_mask: _Optional[bytes] = ...) -> None: ...

class History(_message.Message):
    __slots__ = ("ids", "prompt_length")
    IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    prompt_length: int
    def __init__(self, ids: _Optional[_Iterable[int]] = ..., prompt_length: _Optional[int] = ...) -> None: ...

class Want(_message.Message):
    __slots__ = ("top_logprobs", "logits", "hidden")
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    top_logprobs: int
    logits: bool
    hidden: bool
    def __init__(self, top_logprobs: _Optional[int] = ..., logits: bool = ..., hidden: bool = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("session_id", "client_id", "protocol", "required_features", "model_digest", "start", "end", "reserve_tokens", "codec", "route_epoch", "fork_of", "adapter_id", "priority", "trace_id", "block_prompts", "resume", "hello", "revocations", "grammar")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_FEATURES_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    RESERVE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    ROUTE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    FORK_OF_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TRACE_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_PROMPTS_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    REVOCATIONS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    client_id: bytes
    protocol: int
    required_features: _containers.RepeatedScalarFieldContainer[str]
    model_digest: bytes
    start: int
    end: int
    reserve_tokens: int
    codec: Codec
    route_epoch: int
    fork_of: bytes
    adapter_id: str
    priority: int
    trace_id: bytes
    block_prompts: bytes
    resume: Resume
    hello: Hello
    revocations: _containers.RepeatedCompositeFieldContainer[RevocationList]
    grammar: str
    def __init__(self, session_id: _Optional[bytes] = ..., client_id: _Optional[bytes] = ..., protocol: _Optional[int] = ..., required_features: _Optional[_Iterable[str]] = ..., model_digest: _Optional[bytes] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., reserve_tokens: _Optional[int] = ..., codec: _Optional[_Union[Codec, str]] = ..., route_epoch: _Optional[int] = ..., fork_of: _Optional[bytes] = ..., adapter_id: _Optional[str] = ..., priority: _Optional[int] = ..., trace_id: _Optional[bytes] = ..., block_prompts: _Optional[bytes] = ..., resume: _Optional[_Union[Resume, _Mapping]] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., revocations: _Optional[_Iterable[_Union[RevocationList, _Mapping]]] = ..., grammar: _Optional[str] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("public_key", "signature")
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    public_key: bytes
    signature: bytes
    def __init__(self, public_key: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Resume(_message.Message):
    __slots__ = ("route_epoch", "step", "length", "commit", "replayed", "replay", "extent")
    ROUTE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    REPLAY_FIELD_NUMBER: _ClassVar[int]
    EXTENT_FIELD_NUMBER: _ClassVar[int]
    route_epoch: int
    step: int
    length: int
    commit: _containers.RepeatedScalarFieldContainer[int]
    replayed: bool
    replay: bool
    extent: int
    def __init__(self, route_epoch: _Optional[int] = ..., step: _Optional[int] = ..., length: _Optional[int] = ..., commit: _Optional[_Iterable[int]] = ..., replayed: bool = ..., replay: bool = ..., extent: _Optional[int] = ...) -> None: ...

class Resumed(_message.Message):
    __slots__ = ("route_epoch", "link_token", "log_lost")
    ROUTE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    LINK_TOKEN_FIELD_NUMBER: _ClassVar[int]
    LOG_LOST_FIELD_NUMBER: _ClassVar[int]
    route_epoch: int
    link_token: bytes
    log_lost: bool
    def __init__(self, route_epoch: _Optional[int] = ..., link_token: _Optional[bytes] = ..., log_lost: bool = ...) -> None: ...

class Draining(_message.Message):
    __slots__ = ("grace_ms",)
    GRACE_MS_FIELD_NUMBER: _ClassVar[int]
    grace_ms: int
    def __init__(self, grace_ms: _Optional[int] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("link_token", "window_bytes", "max_rows", "protocol", "features", "revocations", "max_nodes", "rope_borders")
    LINK_TOKEN_FIELD_NUMBER: _ClassVar[int]
    WINDOW_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    REVOCATIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_NODES_FIELD_NUMBER: _ClassVar[int]
    ROPE_BORDERS_FIELD_NUMBER: _ClassVar[int]
    link_token: bytes
    window_bytes: int
    max_rows: int
    protocol: int
    features: _containers.RepeatedScalarFieldContainer[str]
    revocations: _containers.RepeatedCompositeFieldContainer[RevocationList]
    max_nodes: int
    rope_borders: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, link_token: _Optional[bytes] = ..., window_bytes: _Optional[int] = ..., max_rows: _Optional[int] = ..., protocol: _Optional[int] = ..., features: _Optional[_Iterable[str]] = ..., revocations: _Optional[_Iterable[_Union[RevocationList, _Mapping]]] = ..., max_nodes: _Optional[int] = ..., rope_borders: _Optional[_Iterable[int]] = ...) -> None: ...

class LinkTo(_message.Message):
    __slots__ = ("peer_id", "token", "route_epoch")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    ROUTE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    token: bytes
    route_epoch: int
    def __init__(self, peer_id: _Optional[str] = ..., token: _Optional[bytes] = ..., route_epoch: _Optional[int] = ...) -> None: ...

class Linked(_message.Message):
    __slots__ = ("route_epoch", "window_bytes")
    ROUTE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    WINDOW_BYTES_FIELD_NUMBER: _ClassVar[int]
    route_epoch: int
    window_bytes: int
    def __init__(self, route_epoch: _Optional[int] = ..., window_bytes: _Optional[int] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("step", "route_epoch", "base", "commit", "rewind", "ids", "parents", "prefill", "sample", "want", "sampling", "history", "op", "embeddings", "trace", "deadline_ms", "replay", "extent")
    STEP_FIELD_NUMBER: _ClassVar[int]
    ROUTE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    REWIND_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    WANT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    OP_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    REPLAY_FIELD_NUMBER: _ClassVar[int]
    EXTENT_FIELD_NUMBER: _ClassVar[int]
    step: int
    route_epoch: int
    base: int
    commit: _containers.RepeatedScalarFieldContainer[int]
    rewind: int
    ids: _containers.RepeatedScalarFieldContainer[int]
    parents: _containers.RepeatedScalarFieldContainer[int]
    prefill: bool
    sample: bool
    want: Want
    sampling: Sampling
    history: History
    op: Op
    embeddings: bytes
    trace: bool
    deadline_ms: int
    replay: bool
    extent: int
    def __init__(self, step: _Optional[int] = ..., route_epoch: _Optional[int] = ..., base: _Optional[int] = ..., commit: _Optional[_Iterable[int]] = ..., rewind: _Optional[int] = ..., ids: _Optional[_Iterable[int]] = ..., parents: _Optional[_Iterable[int]] = ..., prefill: bool = ..., sample: bool = ..., want: _Optional[_Union[Want, _Mapping]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., history: _Optional[_Union[History, _Mapping]] = ..., op: _Optional[_Union[Op, str]] = ..., embeddings: _Optional[bytes] = ..., trace: bool = ..., deadline_ms: _Optional[int] = ..., replay: bool = ..., extent: _Optional[int] = ...) -> None: ...

class ClientFrame(_message.Message):
    __slots__ = ("open", "link_to", "step", "resume")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    LINK_TO_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    open: Open
    link_to: LinkTo
    step: Step
    resume: Resume
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., link_to: _Optional[_Union[LinkTo, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., resume: _Optional[_Union[Resume, _Mapping]] = ...) -> None: ...

class Hop(_message.Message):
    __slots__ = ("peer_id", "received_ns", "start_ns", "end_ns", "queue_ns")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_NS_FIELD_NUMBER: _ClassVar[int]
    START_NS_FIELD_NUMBER: _ClassVar[int]
    END_NS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    received_ns: int
    start_ns: int
    end_ns: int
    queue_ns: int
    def __init__(self, peer_id: _Optional[str] = ..., received_ns: _Optional[int] = ..., start_ns: _Optional[int] = ..., end_ns: _Optional[int] = ..., queue_ns: _Optional[int] = ...) -> None: ...

class Logprob(_message.Message):
    __slots__ = ("id", "logprob")
    ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    id: int
    logprob: float
    def __init__(self, id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class RowLogprobs(_message.Message):
    __slots__ = ("chosen", "top")
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    chosen: float
    top: _containers.RepeatedCompositeFieldContainer[Logprob]
    def __init__(self, chosen: _Optional[float] = ..., top: _Optional[_Iterable[_Union[Logprob, _Mapping]]] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("step", "accepted", "next_token", "sampled", "logprobs", "logits", "hidden", "hops", "last_part")
    STEP_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    NEXT_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    HOPS_FIELD_NUMBER: _ClassVar[int]
    LAST_PART_FIELD_NUMBER: _ClassVar[int]
    step: int
    accepted: _containers.RepeatedScalarFieldContainer[int]
    next_token: int
    sampled: bool
    logprobs: _containers.RepeatedCompositeFieldContainer[RowLogprobs]
    logits: bytes
    hidden: bytes
    hops: _containers.RepeatedCompositeFieldContainer[Hop]
    last_part: bool
    def __init__(self, step: _Optional[int] = ..., accepted: _Optional[_Iterable[int]] = ..., next_token: _Optional[int] = ..., sampled: bool = ..., logprobs: _Optional[_Iterable[_Union[RowLogprobs, _Mapping]]] = ..., logits: _Optional[bytes] = ..., hidden: _Optional[bytes] = ..., hops: _Optional[_Iterable[_Union[Hop, _Mapping]]] = ..., last_part: bool = ...) -> None: ...

class Fault(_message.Message):
    __slots__ = ("peer_id", "reason", "route_epoch")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ROUTE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    reason: str
    route_epoch: int
    def __init__(self, peer_id: _Optional[str] = ..., reason: _Optional[str] = ..., route_epoch: _Optional[int] = ...) -> None: ...

class Credit(_message.Message):
    __slots__ = ("bytes",)
    BYTES_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    def __init__(self, bytes: _Optional[int] = ...) -> None: ...

class PeerFrame(_message.Message):
    __slots__ = ("opened", "linked", "result", "credit", "fault", "resumed", "draining")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    LINKED_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    opened: Opened
    linked: Linked
    result: Result
    credit: Credit
    fault: Fault
    resumed: Resumed
    draining: Draining
    def __init__(self, opened: _Optional[_Union[Opened, _Mapping]] = ..., linked: _Optional[_Union[Linked, _Mapping]] = ..., result: _Optional[_Union[Result, _Mapping]] = ..., credit: _Optional[_Union[Credit, _Mapping]] = ..., fault: _Optional[_Union[Fault, _Mapping]] = ..., resumed: _Optional[_Union[Resumed, _Mapping]] = ..., draining: _Optional[_Union[Draining, _Mapping]] = ...) -> None: ...

class LinkHello(_message.Message):
    __slots__ = ("session_id", "token", "route_epoch", "hello", "revocations")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    ROUTE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    REVOCATIONS_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    token: bytes
    route_epoch: int
    hello: Hello
    revocations: _containers.RepeatedCompositeFieldContainer[RevocationList]
    def __init__(self, session_id: _Optional[bytes] = ..., token: _Optional[bytes] = ..., route_epoch: _Optional[int] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., revocations: _Optional[_Iterable[_Union[RevocationList, _Mapping]]] = ...) -> None: ...

class Activations(_message.Message):
    __slots__ = ("step", "route_epoch", "base", "commit", "rewind", "parents", "rows", "prefill", "sample", "want", "hidden", "total_bytes", "trace", "hops", "deadline_ms", "replay", "extent")
    STEP_FIELD_NUMBER: _ClassVar[int]
    ROUTE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    REWIND_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    WANT_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    HOPS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    REPLAY_FIELD_NUMBER: _ClassVar[int]
    EXTENT_FIELD_NUMBER: _ClassVar[int]
    step: int
    route_epoch: int
    base: int
    commit: _containers.RepeatedScalarFieldContainer[int]
    rewind: int
    parents: _containers.RepeatedScalarFieldContainer[int]
    rows: int
    prefill: bool
    sample: bool
    want: Want
    hidden: bytes
    total_bytes: int
    trace: bool
    hops: _containers.RepeatedCompositeFieldContainer[Hop]
    deadline_ms: int
    replay: bool
    extent: int
    def __init__(self, step: _Optional[int] = ..., route_epoch: _Optional[int] = ..., base: _Optional[int] = ..., commit: _Optional[_Iterable[int]] = ..., rewind: _Optional[int] = ..., parents: _Optional[_Iterable[int]] = ..., rows: _Optional[int] = ..., prefill: bool = ..., sample: bool = ..., want: _Optional[_Union[Want, _Mapping]] = ..., hidden: _Optional[bytes] = ..., total_bytes: _Optional[int] = ..., trace: bool = ..., hops: _Optional[_Iterable[_Union[Hop, _Mapping]]] = ..., deadline_ms: _Optional[int] = ..., replay: bool = ..., extent: _Optional[int] = ...) -> None: ...

class LinkFrame(_message.Message):
    __slots__ = ("hello", "activations")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    hello: LinkHello
    activations: Activations
    def __init__(self, hello: _Optional[_Union[LinkHello, _Mapping]] = ..., activations: _Optional[_Union[Activations, _Mapping]] = ...) -> None: ...

class LinkReply(_message.Message):
    __slots__ = ("linked", "credit")
    LINKED_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    linked: Linked
    credit: Credit
    def __init__(self, linked: _Optional[_Union[Linked, _Mapping]] = ..., credit: _Optional[_Union[Credit, _Mapping]] = ...) -> None: ...

class CertificateRequest(_message.Message):
    __slots__ = ("csr", "identity", "identity_signature")
    CSR_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    csr: bytes
    identity: bytes
    identity_signature: bytes
    def __init__(self, csr: _Optional[bytes] = ..., identity: _Optional[bytes] = ..., identity_signature: _Optional[bytes] = ...) -> None: ...

class RedeemRequest(_message.Message):
    __slots__ = ("token", "request")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    token: str
    request: CertificateRequest
    def __init__(self, token: _Optional[str] = ..., request: _Optional[_Union[CertificateRequest, _Mapping]] = ...) -> None: ...

class Issued(_message.Message):
    __slots__ = ("certificates", "root", "addresses", "revocations", "admin")
    CERTIFICATES_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    REVOCATIONS_FIELD_NUMBER: _ClassVar[int]
    ADMIN_FIELD_NUMBER: _ClassVar[int]
    certificates: _containers.RepeatedScalarFieldContainer[bytes]
    root: bytes
    addresses: _containers.RepeatedScalarFieldContainer[str]
    revocations: _containers.RepeatedCompositeFieldContainer[RevocationList]
    admin: str
    def __init__(self, certificates: _Optional[_Iterable[bytes]] = ..., root: _Optional[bytes] = ..., addresses: _Optional[_Iterable[str]] = ..., revocations: _Optional[_Iterable[_Union[RevocationList, _Mapping]]] = ..., admin: _Optional[str] = ...) -> None: ...
