"""The network between the processes: what is cut off from what, and streams.

A stream is ordered, and loses what is on its way when it breaks. Two nodes that are cut off from
each other don't notice at first: what they send comes when they are not cut off any more, if the
stream is still there.
"""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cluster.arrivals import Arrivals, MessageLost
from tests.simulation.faults import Faults
from tests.simulation.timeline import Event, Node, Timeline

if TYPE_CHECKING:
    from tests.simulation.router import SimRouter
    from tests.simulation.worker import SimWorker

DELAY_S = (0.001, 0.1)
SLOW_S = (0.3, 2.0)
NOTICE_S = (0.0, 1.0)
"""Until an end sees that the other has closed the stream, or that it broke."""
KEEPALIVE_S = (3.0, 8.0)
"""Until an end gives up another that does not answer."""


class End(enum.Enum):
    """The other end has closed the stream, as its last message."""

    END = "end"


Pair = frozenset[str]


class Network:
    def __init__(self, timeline: Timeline, faults: Faults) -> None:
        self.timeline = timeline
        self.faults = faults
        self.streams: dict[Stream, None] = {}
        """In the order in which they were opened."""
        self._cuts: dict[Pair, float] = {}
        self._healed_at_s: dict[Pair, float] = defaultdict(float)
        self._held: dict[Pair, list[tuple[Node, Event]]] = defaultdict(list)

    def reaches(self, a: Node, b: Node) -> bool:
        return b.runs and not self.is_cut(a, b)

    def is_cut(self, a: Node, b: Node) -> bool:
        return bool(self._cuts) and frozenset((a.name, b.name)) in self._cuts

    def calm_s(self, *nodes: Node) -> float:
        """How long all of them have run without trouble between them."""
        if not all(node.runs for node in nodes):
            return 0.0
        now_s = self.timeline.now_s
        pairs = [(a, b) for i, a in enumerate(nodes) for b in nodes[:i]]
        return min(
            *(now_s - node.changed_at_s for node in nodes),
            *(self.pair_calm_s(a, b) for a, b in pairs),
            now_s,
        )

    def pair_calm_s(self, a: Node, b: Node) -> float:
        """The network between them, whatever they do themselves."""
        if self.is_cut(a, b):
            return 0.0
        return self.timeline.now_s - self._healed_at_s[frozenset((a.name, b.name))]

    def trouble(self, a: Node, b: Node) -> None:
        """Their calm ends here."""
        self._healed_at_s[frozenset((a.name, b.name))] = self.timeline.now_s

    def cut(self, a: Node, b: Node) -> None:
        pair = frozenset((a.name, b.name))
        if pair in self._cuts:
            return
        self._cuts[pair] = self.timeline.now_s
        for stream in list(self.streams):
            if pair == {stream.router.name, stream.worker.name}:
                stream.watch_silence()

    def heal(self, a: Node, b: Node) -> None:
        pair = frozenset((a.name, b.name))
        if self._cuts.pop(pair, None) is None:
            return
        self._healed_at_s[pair] = self.timeline.now_s
        for receiver, event in self._held.pop(pair, []):
            receiver.run(event)

    def heal_all(self) -> None:
        for pair in list(self._cuts):
            del self._cuts[pair]
            self._healed_at_s[pair] = self.timeline.now_s
            for receiver, event in self._held.pop(pair, []):
                receiver.run(event)

    def delay_s(self) -> float:
        low_s, high_s = SLOW_S if self.timeline.chance(self.faults.slow_messages) else DELAY_S
        return low_s + (high_s - low_s) * self.timeline.random.random()

    def carry(self, sender: Node, receiver: Node, at_s: float, event: Event) -> None:
        """A message, to come then, or when the two are not cut off from each other any more."""
        pair = frozenset((sender.name, receiver.name))

        def arrive() -> None:
            if pair in self._cuts:
                self._held[pair].append((receiver, event))
            else:
                receiver.run(event)

        self.timeline.at(at_s, arrive)


class Channel:
    """One direction of a stream."""

    def __init__(
        self,
        network: Network,
        sender: Node,
        receiver: Node,
        deliver: Callable[[Any], None],
        lose: Callable[[str], None],
    ) -> None:
        self._network = network
        self._sender = sender
        self._receiver = receiver
        self._deliver = deliver
        self._lose = lose
        self._sent = 0
        self._arrivals = Arrivals()
        self._last_at_s = 0.0
        self._breaks_at_s = float("inf")

    def send(self, message: object, within_s: tuple[float, float] | None = None) -> None:
        network, timeline = self._network, self._network.timeline
        self._sent += 1
        low_s, high_s = within_s or (0.0, 0.0)
        wait_s = timeline.random.uniform(low_s, high_s) if within_s else network.delay_s()
        at_s = max(self._last_at_s, timeline.now_s + wait_s)
        if within_s is None and timeline.chance(network.faults.garbled_messages):
            self._garble(self._sent, message, at_s)
            return
        self._last_at_s = at_s
        self._put(self._sent, message, at_s)

    def break_off(self) -> None:
        """What is on its way is lost, or some of it."""
        timeline = self._network.timeline
        self._breaks_at_s = timeline.now_s + timeline.random.uniform(0.0, DELAY_S[1])

    def _garble(self, number: int, message: object, at_s: float) -> None:
        timeline = self._network.timeline
        how = timeline.random.choice(("lost", "repeated", "overtaken"))
        timeline.note(f"message {how}", message)
        self._network.trouble(self._sender, self._receiver)
        if how == "lost":
            # Where nothing comes after it, only the end of the connection tells.
            timeline.after(0.5, 3.0, lambda: self._lose("it broke"))
            return
        if how == "repeated":
            self._last_at_s = at_s
            self._put(number, message, at_s)
        self._put(number, message, at_s + timeline.random.uniform(0.0, 1.0))

    def _put(self, number: int, message: object, at_s: float) -> None:
        def arrive() -> None:
            if self._network.timeline.now_s >= self._breaks_at_s:
                return
            try:
                if self._arrivals.is_new(number):
                    self._deliver(message)
                else:
                    self._network.timeline.note("ignored twin", message)
            except MessageLost as error:
                self._network.timeline.note("gap", error)
                self._lose(str(error))

        self._network.carry(self._sender, self._receiver, at_s, arrive)


class Stream:
    """A router's stream to a worker. Each end has its own idea of whether it is open."""

    def __init__(self, network: Network, router: SimRouter, worker: SimWorker) -> None:
        self._network = network
        self.router = router
        self.worker = worker
        self.open_at_router = self.open_at_worker = True
        self.opened_at_s = network.timeline.now_s
        self.down = Channel(network, router, worker, self._at_worker, self._lost_at_worker)
        self.up = Channel(network, worker, router, self._at_router, self._lost_at_router)
        network.streams[self] = None
        if not worker.alive and not worker.silent_end:
            self.close_at_worker()
        elif not worker.runs or network.is_cut(router, worker):
            self.watch_silence()

    def to_worker(self, message: object) -> None:
        if self.open_at_router:
            self.down.send(message)

    def to_router(self, message: object) -> None:
        if self.open_at_worker:
            self.up.send(message)

    def close_at_router(self) -> None:
        """The router gives it up, or has ended."""
        if self.open_at_router:
            self.open_at_router = False
            self.down.send(End.END, NOTICE_S)
            self._forget()

    def close_at_worker(self) -> None:
        if self.open_at_worker:
            self.open_at_worker = False
            self.up.send(End.END, NOTICE_S)
            self._forget()

    def vanish_at_worker(self) -> None:
        """Its machine is gone, and says nothing more."""
        self.open_at_worker = False
        self.watch_silence()

    def break_off(self) -> None:
        """Both ends notice, each in its time."""
        self.down.break_off()
        self.up.break_off()
        self._network.trouble(self.router, self.worker)
        self.router.after(*NOTICE_S, lambda: self._lost_at_router("it broke"))
        self.worker.after(*NOTICE_S, lambda: self._lost_at_worker("it broke"))

    def watch_silence(self) -> None:
        """One end has gone silent: the other gives it up, if it is still so after a while."""

        def check(this: Node, other: Node, lose: Callable[[str], None]) -> None:
            if not self._network.reaches(this, other):
                lose("it does not answer")

        router, worker = self.router, self.worker
        router.after(*KEEPALIVE_S, lambda: check(router, worker, self._lost_at_router))
        worker.after(*KEEPALIVE_S, lambda: check(worker, router, self._lost_at_worker))

    def _at_worker(self, message: object) -> None:
        if message is End.END:
            self._lost_at_worker("it was closed")
        elif self.open_at_worker:
            self.worker.handle(self, message)

    def _at_router(self, message: object) -> None:
        if message is End.END:
            self._lost_at_router("it was closed")
        elif self.open_at_router or self._network.timeline.chance(
            self._network.faults.late_messages
        ):
            self.router.hear(self, message)

    def _lost_at_worker(self, reason: str) -> None:
        if self.open_at_worker and self.worker.alive:
            self.close_at_worker()
            self.worker.end_stream(self)

    def _lost_at_router(self, reason: str) -> None:
        if self.open_at_router and self.router.alive:
            self.router.lose(self, reason)

    def _forget(self) -> None:
        if not (self.open_at_router or self.open_at_worker):
            self._network.streams.pop(self, None)
