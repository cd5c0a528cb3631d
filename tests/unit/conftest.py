"""What tests of hand-offs share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from tests.unit.ends import Loop, Receiver

R = TypeVar("R", bound=Receiver)


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def start() -> Iterator[Callable[[R], R]]:
    started: list[Receiver] = []

    def start_one(receiver: R) -> R:
        receiver.start()
        started.append(receiver)
        return receiver

    yield start_one
    for receiver in started:
        receiver.stop()
