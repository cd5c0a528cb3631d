"""`baton bench handoff --link-gbit-s`: the link's arithmetic, and the report of what it hides."""

from __future__ import annotations

import json
import os
import socket
from typing import Any

import pytest
from click.testing import CliRunner

from cluster.bench.client import Stream
from cluster.bench.link import (
    ETHERNET_BYTES,
    QUEUE_S,
    VNET_HEADER,
    Direction,
    LinkSettings,
    check_link_possible,
    ethernet_bytes,
)
from cluster.bench.linked import Transfer, goals_of, summary, transfer_of
from cluster.bench.report import BenchFailed
from cluster.bench.sides import CompareSettings
from cluster.cli.bench import bench

GBIT = LinkSettings(rate_bits_s=1e9, delay_s=0.002)


def packet(size: int, header_bytes: int = 0, segment_bytes: int = 0) -> bytes:
    segmented = 1 if segment_bytes else 0
    return VNET_HEADER.pack(0, segmented, header_bytes, segment_bytes, 0, 0) + bytes(size)


def test_a_packet_is_charged_for_the_segments_it_would_be() -> None:
    assert ethernet_bytes(packet(1500)) == 1500 + ETHERNET_BYTES
    # 52 bytes of headers, and payload for two segments and a byte.
    assert ethernet_bytes(packet(52 + 2897, 52, 1448)) == 2897 + 3 * (52 + ETHERNET_BYTES)


def test_packets_arrive_one_after_the_other_at_the_links_rate_and_after_its_delay() -> None:
    (inside, source), (target, outside) = (
        socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2)
    )
    with inside, source, target, outside:
        outside.setblocking(False)
        # A microsecond a packet.
        sent = packet(125 - ETHERNET_BYTES)
        direction = Direction(source.fileno(), target.fileno(), LinkSettings(1e9, 0.002))
        for _ in range(2):
            inside.send(sent)
            direction.take(5.0)
        assert direction.due_in_s(5.0) == pytest.approx(0.002001)
        direction.deliver(5.0020009)
        with pytest.raises(BlockingIOError):
            outside.recv(2000)
        direction.deliver(5.0020015)
        assert outside.recv(2000) == sent
        with pytest.raises(BlockingIOError):
            outside.recv(2000)
        direction.deliver(5.0020021)
        assert outside.recv(2000) == sent


def test_a_full_queue_takes_no_more_until_it_has_sent() -> None:
    (inside, source) = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with inside, source, open(os.devnull, "wb") as nowhere:  # noqa: PTH123
        direction = Direction(source.fileno(), nowhere.fileno(), LinkSettings(1e4, 0.0))
        inside.send(packet(100 - ETHERNET_BYTES))
        direction.take(5.0)
        # 100 bytes take 80 ms.
        assert not direction.has_room(5.0)
        assert direction.has_room(5.0801 - QUEUE_S)
        assert direction.due_in_s(5.0) == pytest.approx(0.08 - QUEUE_S)


def transfer(exposed_s: float, size: int = 75_000_000) -> Transfer:
    return Transfer(size, wire_s=0.7, exposed_s=exposed_s, ttft_s=1.0, second_token_s=0.1)


def report(transfers: dict[int, list[Transfer]]) -> dict[str, Any]:
    settings = CompareSettings(prompt_tokens=tuple(transfers))
    return json.loads(json.dumps(summary({}, {}, settings, GBIT, transfers)))


def test_hidden_is_what_prefill_covers_of_the_bytes_time_on_the_link() -> None:
    made = report({1024: [transfer(0.06), transfer(0.12), transfer(0.03)]})
    assert made["results"]["1024"] == {
        "requests": 3,
        "kv_bytes": 75_000_000,
        "ttft_ms": 1000.0,
        "second_token_ms": 100.0,
        "transfer_ms": 600.0,
        "wire_ms": 700.0,
        "exposed_ms": 60.0,
        "hidden": 0.9,
    }
    assert made["settings"]["link"] == {"rate_bits_s": 1e9, "delay_s": 0.002}


@pytest.mark.parametrize(("exposed_s", "met"), [(0.09, True), (0.091, False)])
def test_the_goal_is_for_long_prompts(exposed_s: float, met: bool) -> None:
    made = report({256: [transfer(0.5)], 1024: [transfer(exposed_s)]})
    assert [(goal.name, goal.met) for goal in goals_of(made["results"])] == [("hidden_1024", met)]


STATE = {
    "recent_handoffs": [
        {
            "request_id": "cmpl-1-0-ab",
            "result": "handed over",
            "bytes": 10,
            "wire_s": 0.5,
            "exposed_s": 0.04,
        }
    ],
    "recent_first_tokens": [
        {
            "request_id": "cmpl-1-0-ab",
            "step_ended_monotonic_s": 7.0,
            "forwarded_monotonic_s": 7.01,
        }
    ],
}


def test_the_routers_own_time_is_not_hidden_either() -> None:
    stream = Stream(6.0, "cmpl-1", [7.02, 7.1])
    made = transfer_of(stream, STATE)
    assert (made.bytes, made.wire_s) == (10, 0.5)
    assert made.exposed_s == pytest.approx(0.05)
    assert (made.ttft_s, made.second_token_s) == (pytest.approx(1.02), pytest.approx(0.08))


def test_a_prompt_that_was_computed_twice_is_no_measurement() -> None:
    row = {**STATE["recent_handoffs"][0], "result": "deadline passed"}
    with pytest.raises(BenchFailed, match="deadline passed"):
        transfer_of(Stream(6.0, "cmpl-1", [7.0, 7.1]), {**STATE, "recent_handoffs": [row]})
    with pytest.raises(BenchFailed, match="nothing"):
        transfer_of(Stream(6.0, "cmpl-2", [7.0, 7.1]), STATE)


def test_who_is_not_root_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    result = CliRunner().invoke(bench, ["handoff", "--link-gbit-s", "1"])
    assert result.exit_code == 1
    assert "run it as root" in result.output


def test_without_the_ip_command_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(BenchFailed, match="apt install iproute2"):
        check_link_possible()
