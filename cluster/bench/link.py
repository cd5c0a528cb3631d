"""A network link of a given rate and delay between two network namespaces of this machine.

    python -m cluster.bench.link SETTINGS_JSON

makes both, tells of them in one line of JSON, and is the link until it is ended; then both are
gone. The link is two TUN devices and this process between them, because `tc netem` is a module that
not every kernel has. Packets are as large as TCP hands them down (segmentation offload), and are
charged for the segments and headers that they would be on an Ethernet.

Between each namespace and this machine's own there is a second, fast way: a worker is controlled
over it, and only what goes from worker to worker takes the link.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from cluster.bench.report import BenchFailed

TUN = Path("/dev/net/tun")
PATH_OF_TOOLS = "/usr/local/sbin:/usr/sbin:/sbin"
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4 = 0x01, 0x02
VNET_HEADER = struct.Struct("=BBHHHH")
"""Flags, kind of segmentation, bytes of headers, payload bytes a segment, and two for checksums."""
PACKET_BYTES_MAX = 65_536 + VNET_HEADER.size
ETHERNET_BYTES = 38
"""Around each segment: preamble, header, check sequence and gap."""
QUEUE_S = 0.02
"""Packets wait for the link this long at most; behind is the device's own queue, which drops."""
DEVICE_QUEUE_PACKETS = 50
DEVICE = "wire"


@dataclass(frozen=True, slots=True)
class LinkSettings:
    rate_bits_s: float
    delay_s: float
    """In each direction."""


@dataclass(frozen=True, slots=True)
class End:
    namespace: str
    address: str
    """Of this end. The other end reaches it over the link, this machine over the fast way."""
    machine_address: str
    """Of this machine, seen from this end."""

    def command(self, command: list[str]) -> list[str]:
        """One that runs there."""
        return [_ip(), "netns", "exec", self.namespace, *command]


class Direction:
    """What goes from one device to the other."""

    def __init__(self, source: int, target: int, settings: LinkSettings) -> None:
        self.source = source
        self._target = target
        self._settings = settings
        self._free_at_s = 0.0
        self._travelling: deque[tuple[float, bytes]] = deque()
        """With the time of arrival. Bounded, for nothing is taken while `has_room` is False."""

    def has_room(self, now_s: float) -> bool:
        return self._free_at_s - now_s < QUEUE_S

    def take(self, now_s: float) -> None:
        packet = os.read(self.source, PACKET_BYTES_MAX)
        sending_s = ethernet_bytes(packet) * 8 / self._settings.rate_bits_s
        self._free_at_s = max(now_s, self._free_at_s) + sending_s
        self._travelling.append((self._free_at_s + self._settings.delay_s, packet))

    def deliver(self, now_s: float) -> None:
        while self._travelling and self._travelling[0][0] <= now_s:
            # A device that is full or gone loses it, as a network does.
            with contextlib.suppress(OSError):
                os.write(self._target, self._travelling.popleft()[1])

    def due_in_s(self, now_s: float) -> float:
        """Until something is to be done here, unless a packet comes."""
        waits = [QUEUE_S] if self.has_room(now_s) else [self._free_at_s - QUEUE_S - now_s]
        waits += [at_s - now_s for at_s, _ in list(self._travelling)[:1]]
        return max(0.0, min(waits))


def ethernet_bytes(packet: bytes) -> int:
    """What a packet takes on the wire, cut into segments with a header each."""
    fields: tuple[int, ...] = VNET_HEADER.unpack_from(packet)
    _, segmented, header_bytes, segment_bytes, *_ = fields
    size = len(packet) - VNET_HEADER.size
    if not segmented:
        return size + ETHERNET_BYTES
    payload = size - header_bytes
    return payload + math.ceil(payload / segment_bytes) * (header_bytes + ETHERNET_BYTES)


def check_link_possible() -> None:
    """
    Raises:
        BenchFailed: namespaces or devices cannot be made here.
    """
    if os.geteuid() != 0:
        raise BenchFailed("a link needs network namespaces, and those need root: run it as root")
    _ip()
    if not os.access(TUN, os.R_OK | os.W_OK):
        raise BenchFailed(f"a link needs {TUN}, which is not there: modprobe tun, or leave it out")


def _ip() -> str:
    ip = shutil.which("ip", path=f"{os.environ.get('PATH', '')}:{PATH_OF_TOOLS}")
    if ip is None:
        raise BenchFailed("a link needs the command ip, which is not found (apt install iproute2)")
    return ip


def make_ends(name: str) -> tuple[End, End]:
    """Namespaces that can reach this machine, and not yet one another."""
    # Addresses of 198.18.0.0/15 are set aside for benchmarks.
    net = f"198.18.{int(name[:2], 16)}"
    ends = (
        End(f"baton-{name}-a", f"{net}.2", f"{net}.1"),
        End(f"baton-{name}-b", f"{net}.6", f"{net}.5"),
    )
    for index, end in enumerate(ends):
        outside = f"bt{name}{index}"
        inside = ["-n", end.namespace]
        run_ip("netns", "add", end.namespace)
        run_ip("link", "add", outside, "type", "veth", "peer", "name", "machine", *_netns(end))
        run_ip("address", "add", f"{end.machine_address}/30", "dev", outside)
        run_ip("link", "set", outside, "up")
        run_ip(*inside, "address", "add", f"{end.address}/30", "dev", "machine")
        run_ip(*inside, "link", "set", "machine", "up")
        run_ip(*inside, "link", "set", "lo", "up")
        run_ip(*inside, "route", "add", "default", "via", end.machine_address)
    return ends


def open_devices(ends: tuple[End, End]) -> list[int]:
    """A TUN device in each namespace, on the way to the other."""
    devices = []
    for end, other in (ends, ends[::-1]):
        device = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
        name = f"bt{end.namespace[6:]}"
        flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        fcntl.ioctl(device, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)
        inside = ["-n", end.namespace]
        run_ip("link", "set", name, "name", DEVICE, *_netns(end))
        queue = ["txqueuelen", str(DEVICE_QUEUE_PACKETS)]
        run_ip(*inside, "link", "set", "dev", DEVICE, "up", *queue)
        run_ip(*inside, "route", "add", other.address, "dev", DEVICE, "src", end.address)
        devices.append(device)
    return devices


def relay(devices: list[int], settings: LinkSettings) -> None:
    """Be the link, without end."""
    a, b = devices
    directions = (Direction(a, b, settings), Direction(b, a, settings))
    while True:
        now_s = time.monotonic()
        for direction in directions:
            direction.deliver(now_s)
        sources = {d.source: d for d in directions if d.has_room(now_s)}
        wait_s = min(direction.due_in_s(now_s) for direction in directions)
        readable, _, _ = select.select(list(sources), [], [], wait_s)
        now_s = time.monotonic()
        for source in readable:
            with contextlib.suppress(BlockingIOError):
                sources[source].take(now_s)


def _netns(end: End) -> list[str]:
    return ["netns", end.namespace]


def run_ip(*arguments: str) -> None:
    command = [_ip(), *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise BenchFailed(f"{' '.join(command)}: {done.stderr.strip()}")


def remove_ends(name: str) -> None:
    """The devices go with their namespaces."""
    for end in "ab":
        with contextlib.suppress(BenchFailed):
            run_ip("netns", "delete", f"baton-{name}-{end}")


def _end(signum: int, frame: object) -> None:
    signal.signal(signum, signal.SIG_IGN)
    sys.exit(0)


def main() -> None:
    settings = json.loads(sys.argv[1])
    name = settings.pop("name")
    signal.signal(signal.SIGTERM, _end)
    try:
        check_link_possible()
        ends = make_ends(name)
        devices = open_devices(ends)
        print(json.dumps([dataclasses.asdict(end) for end in ends]), flush=True)
        relay(devices, LinkSettings(**settings))
    except BenchFailed as error:
        sys.exit(str(error))
    finally:
        remove_ends(name)


if __name__ == "__main__":
    main()
