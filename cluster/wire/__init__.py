"""Modules generated from proto/baton/v1 (`make proto`), and the options every channel shares."""

from __future__ import annotations

GRPC_OPTIONS: list[tuple[str, int]] = [
    # A frame or a step's outputs may be large; both ends are ours and bound what they send.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # KV fills the link: a window of several frames, and not found out step by step.
    ("grpc.http2.lookahead_bytes", 8 << 20),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.max_frame_size", (1 << 24) - 1),
    # Find out that a peer is gone although nothing is being sent.
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    # Without it, a frozen peer is found after a minute only.
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    # Reconnect soon: a restarted worker has a new port, so a long back-off only delays failures.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]
