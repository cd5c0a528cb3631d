"""What goes wrong, and how often."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Faults:
    """Events in a virtual second, or shares of what they befall."""

    kills_per_s: float = 0.2
    freezes_per_s: float = 0.12
    """A worker or a router stops, and goes on later as if nothing had been."""
    supersedes_per_s: float = 0.06
    """A worker out of reach is taken for dead and started anew elsewhere, and then goes on."""
    cuts_per_s: float = 0.2
    """A process is cut off from others, Redis among them."""
    breaks_per_s: float = 0.12
    """A stream breaks while both its ends live on."""
    drains_per_s: float = 0.15
    pool_changes_per_s: float = 0.2
    redis_losses_per_s: float = 0.05
    router_ends_per_s: float = 0.06
    """Its clients see their connections end; later a new one starts in its place."""

    client_aborts: float = 0.2
    engine_errors: float = 0.02
    answered_cancels: float = 0.5
    """A cancelled leg still says that it was aborted."""
    late_messages: float = 0.3
    """A message that was on its way when its stream was given up comes nevertheless."""
    slow_messages: float = 0.03
    garbled_messages: float = 0.004
    """Lost, repeated or overtaken on a stream that goes on, against what gRPC promises."""
    kv_lost: float = 0.04
    kv_repeated: float = 0.04
    kv_overtaken: float = 0.04
    full_inboxes: float = 0.2
    """Of all schedules: inboxes have room for little."""
    failed_transfers: float = 0.05
    """The sender gives up."""
    undelivered_transfers: float = 0.05
    """The sender does not get at the receiver, which never hears of it."""

    def drawn(self, rng: random.Random) -> Faults:
        """Some of them, at other rates: where few kinds meet, each goes further."""
        scales = {name: rng.choice((0.0, 0.0, 0.5, 1.0, 2.0)) for name in self.__slots__}
        return dataclasses.replace(
            self, **{name: getattr(self, name) * scale for name, scale in scales.items()}
        )

    def healed(self) -> Faults:
        """Without those that end streams, or hold them up."""
        return dataclasses.replace(self, garbled_messages=0.0, slow_messages=0.0)


NO_FAULTS = Faults(*[0.0] * len(Faults.__slots__))
