"""Why KV did not arrive whole, in a word: workers say it, and routers count by it."""

from __future__ import annotations

import enum


class HandoffFailure(enum.StrEnum):
    NO_ROOM = "no_room"
    """The receiver's inbox was full for too long, or is too small."""
    LATE = "late"
    """It was not whole when its decode leg would wait no longer."""
    SENDER = "sender"
    """The sender gave up or did not send all, or it or the way to it was lost."""
    WRONG = "wrong"
    """It was damaged, of another prompt, or not from or for whom it should be."""
    DROPPED = "dropped"
    """It was given up where it came."""
