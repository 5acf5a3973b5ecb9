"""Numbers that both ends of a connection hold each other to."""

from __future__ import annotations

PROTOCOL = 1
PROTOCOL_MIN = 1

# One gRPC message; larger activations and answers travel in parts, so that a decode step never waits behind a prompt.
FRAME_BYTES = 1 << 20
# Part of a frame left for everything but the payload.
FRAME_MARGIN = 64 << 10
PART_BYTES = FRAME_BYTES - FRAME_MARGIN
# Steps of one session that may be outstanding at a peer, in bytes.
WINDOW_BYTES = 16 << 20
# An answer with logits or hidden states; and answers that a client or the next peer may leave unread.
ANSWER_BYTES = 128 << 20
UNREAD_BYTES = 144 << 20
# Answers that are in the making or unread, of all sessions of a peer.
ALL_ANSWER_BYTES = 512 << 20
# Rows of one step.
MAX_ROWS = 2048
TOP_LOGPROBS = 64

# A peer that is silent for so long is gone: a ping goes out before, and its answer has the rest of the time.
KEEPALIVE_S = 5.0
PING_EVERY_S = 2.5

# Of one call's headers.
HEADER_BYTES = 16 << 10
# Who opens a stream says what for within so long, and reads what is sent within so long.
SILENT_S = 10.0
# A connection without a stream is closed after so long, and carries so many streams at a time.
IDLE_CONNECTION_S = 60.0
MAX_STREAMS = 512
UNREAD_S = 60.0

_KEEPALIVE = [
    ("grpc.keepalive_time_ms", int(PING_EVERY_S * 1000)),
    ("grpc.keepalive_timeout_ms", int((KEEPALIVE_S - PING_EVERY_S) * 1000)),
    # Newer versions wait for a ping's answer by this one, a minute unless told otherwise.
    ("grpc.http2.ping_timeout_ms", int((KEEPALIVE_S - PING_EVERY_S) * 1000)),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
_SIZES = [
    ("grpc.max_receive_message_length", FRAME_BYTES),
    ("grpc.max_send_message_length", FRAME_BYTES),
    ("grpc.http2.max_frame_size", 256 << 10),
    # The window opens at once: a growing one would cost several round trips a prompt on a long link.
    ("grpc.http2.lookahead_bytes", 8 << 20),
]
# Peers are dialed themselves, whatever http_proxy says: a proxy of the web would not let gRPC through.
_DIRECT = ("grpc.enable_http_proxy", 0)
# Of whoever asks for the directory.
DIRECTORY_OPTIONS = [_DIRECT, ("grpc.max_receive_message_length", 16 << 20), ("grpc.use_local_subchannel_pool", 1)]
CHANNEL_OPTIONS = [
    _DIRECT,
    *_KEEPALIVE,
    *_SIZES,
    ("grpc.use_local_subchannel_pool", 1),
    # A peer that comes back is dialed within seconds, not minutes.
    ("grpc.initial_reconnect_backoff_ms", 250),
    ("grpc.max_reconnect_backoff_ms", 2000),
]
SERVER_OPTIONS = [
    *_KEEPALIVE,
    *_SIZES,
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.max_concurrent_streams", MAX_STREAMS),
    # No table of headers: a stranger's entry of 4 kB could be named 8,000 times in a few bytes each.
    ("grpc.http2.hpack_table_size.decoder", 0),
    # Who holds a connection without a call on it; a channel dials anew where it is needed again.
    ("grpc.max_connection_idle_ms", int(IDLE_CONNECTION_S * 1000)),
    # Between the two gRPC would refuse at random.
    ("grpc.max_metadata_size", HEADER_BYTES),
    ("grpc.absolute_max_metadata_size", HEADER_BYTES),
    # Who connects and says nothing.
    ("grpc.server_handshake_timeout_ms", int(SILENT_S * 1000)),
    # Two peers must never share a port by accident.
    ("grpc.so_reuseport", 0),
]
