"""The collective transport on GPUs. It needs two of them, for NCCL puts no two ranks on one; it has
not been run so far."""

from __future__ import annotations

import queue
from collections.abc import Callable

import pytest
import torch

from tests.unit.ends import FINGERPRINT, LONG_S, SENDER, Loop
from tests.unit.group_peer import GEOMETRY, TOKENS, GroupReceiver, payload_of, push_layer, send_kv
from workers.kv.collective import NAME, Collective
from workers.kv.sender import Identity, Sender
from workers.kv.transfer import Sent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two GPUs"),
]
WAIT_S = 60.0


def test_what_is_delivered_is_what_was_sent(
    loop: Loop, start: Callable[[GroupReceiver], GroupReceiver]
) -> None:
    here, there = (Collective("127.0.0.1", torch.device("cuda", gpu)) for gpu in range(2))
    receiver = start(GroupReceiver(loop, there))
    sent: queue.Queue[Sent] = queue.Queue()
    identity = Identity(*SENDER, FINGERPRINT)
    sender = Sender(identity, 1 << 30, LONG_S, sent.put, [here], NAME)
    try:
        for transfer_id in ("a", "b"):
            claim = receiver.claim(transfer_id)
            transfer = sender.open(send_kv(receiver.port, transfer_id), TOKENS, b"digest")
            for layer in range(GEOMETRY.layers):
                push_layer(transfer, layer)
            transfer.finish()
            result, settled = sent.get(timeout=WAIT_S), claim.get(timeout=WAIT_S)
            assert (result.delivered, result.reason) == (True, "")
            assert (settled.whole, settled.transport) == (True, NAME)
            taken = receiver.inbox.take(transfer_id)
            assert taken is not None
            for layer in range(GEOMETRY.layers):
                assert [frame.payload for frame in taken[layer]] == [payload_of(layer)]
    finally:
        sender.close()
