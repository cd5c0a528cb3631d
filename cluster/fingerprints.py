"""What must be equal at the two ends of a hand-off, and what is said where it is not."""

from __future__ import annotations

from cluster.wire import worker_pb2


def fingerprint_mismatch(mine: worker_pb2.Fingerprint, theirs: worker_pb2.Fingerprint) -> str:
    """What differs, with both values; empty when KV of one is right on the other."""
    differences = [
        f"{field.name} is {getattr(theirs, field.name)!r} at the sender and "
        f"{getattr(mine, field.name)!r} at the receiver"
        for field in mine.DESCRIPTOR.fields
        if getattr(mine, field.name) != getattr(theirs, field.name)
    ]
    return "; ".join(differences)


def why_not_joined(
    sender_id: str,
    sender: worker_pb2.Fingerprint,
    receiver_id: str,
    receiver: worker_pb2.Fingerprint,
) -> str:
    """Empty when one can hand over to the other."""
    mismatch = fingerprint_mismatch(receiver, sender)
    return mismatch and f"KV of {sender_id} would be wrong on {receiver_id}: {mismatch}"
