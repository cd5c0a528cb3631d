"""What the router knows of the workers' prefix caches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from cluster.scheduler.policies.splitwise import Splitwise
from cluster.scheduler.policy import Ask
from cluster.scheduler.prefixes import PrefixIndex
from cluster.scheduler.scheduler import Scheduler
from cluster.scheduler.view import Pool, WorkerKey, WorkerView

A, B, C = (WorkerKey(name, "i1") for name in "abc")
SIZE = 16


@dataclass
class Prompt:
    """Its blocks are called by these numbers, and a hundred more if they are long."""

    blocks: list[int]
    asked: int = 0

    def hashes(self, block_tokens: int) -> Iterator[int]:
        for block in self.blocks:
            self.asked += 1
            yield block + 100 * (block_tokens > SIZE)


def index(**held: list[int]) -> PrefixIndex:
    made = PrefixIndex()
    for name, blocks in held.items():
        made.add(WorkerKey(name, "i1"), SIZE)
        made.stored(WorkerKey(name, "i1"), blocks)
    return made


def test_each_worker_holds_as_far_as_its_chain_goes() -> None:
    known = index(a=[1, 2, 3], b=[1, 3, 2, 4], c=[2, 3], d=[])
    assert known.held_tokens(Prompt([1, 2, 3, 4])) == {A: 48, B: 64}
    assert known.held_tokens(Prompt([1, 9])) == {A: 16, B: 16}
    assert known.held_tokens(Prompt([])) == {}


def test_no_more_of_the_prompt_is_hashed_than_anyone_holds() -> None:
    prompt = Prompt(list(range(1, 1000)))
    assert index(a=[1, 2], b=[1]).held_tokens(prompt) == {A: 32, B: 16}
    assert prompt.asked == 3
    assert PrefixIndex().held_tokens(prompt) == {} and prompt.asked == 3


def test_what_is_removed_is_not_held() -> None:
    known = index(a=[1, 2, 3], b=[1, 2, 3])
    known.removed(A, [2, 77])
    assert known.held_tokens(Prompt([1, 2, 3])) == {A: 16, B: 48}
    known.reset(B)
    assert known.held_tokens(Prompt([1, 2, 3])) == {A: 16}
    known.stored(B, [1])
    assert known.held_tokens(Prompt([1, 2, 3])) == {A: 16, B: 16}


def test_a_worker_that_left_holds_nothing() -> None:
    known = index(a=[1, 2], b=[1])
    known.remove(A)
    known.stored(A, [1])
    known.remove(C)
    assert known.held_tokens(Prompt([1, 2])) == {B: 16} and len(known) == 1


def test_block_sizes_may_differ() -> None:
    known = index(a=[1, 2])
    known.add(C, 128)
    known.stored(C, [101, 102])
    assert known.held_tokens(Prompt([1, 2, 3])) == {A: 32, C: 256}


def test_the_blocks_used_longest_ago_are_forgotten() -> None:
    known = PrefixIndex(worker_blocks_max=3)
    known.add(A, SIZE)
    known.stored(A, [1, 2, 3])
    known.use(A, Prompt([1]), tokens=SIZE)
    known.stored(A, [4])
    assert known.held_tokens(Prompt([1, 3, 4])) == {A: 48}
    assert known.held_tokens(Prompt([2])) == {}


blocks = st.lists(st.integers(0, 12), max_size=8)
steps = st.lists(
    st.tuples(st.sampled_from([A, B, C]), st.sampled_from(["stored", "removed", "reset"]), blocks),
    max_size=30,
)


@given(steps, blocks, st.integers(1, 8))
def test_it_says_what_was_told_within_its_bounds(
    told: list[tuple[WorkerKey, str, list[int]]], prompt: list[int], most: int
) -> None:
    known, truth = PrefixIndex(blocks_max=3 * most), {A: list[int](), B: [], C: []}
    for key in truth:
        known.add(key, SIZE)
    for key, what, numbers in told:
        held = truth[key]
        match what:
            case "stored":
                known.stored(key, numbers)
                for number in numbers:
                    if number in held:
                        held.remove(number)
                    held.append(number)
                del held[:-most]
            case "removed":
                known.removed(key, numbers)
                truth[key] = [n for n in held if n not in numbers]
            case "reset":
                known.reset(key)
                truth[key] = []
    expected = {}
    for key, held in truth.items():
        chain = next((i for i, n in enumerate(prompt) if n not in held), len(prompt))
        if chain:
            expected[key] = chain * SIZE
    assert known.held_tokens(Prompt(prompt)) == expected
    assert len(known) == sum(map(len, truth.values())) <= 3 * most
    assert set(known._holders) == {n for held in truth.values() for n in held}


def test_a_placement_tells_what_the_decode_worker_holds() -> None:
    scheduler = Scheduler(Splitwise(), new_id=lambda: "x")
    for key, pool in ((A, Pool.PREFILL), (B, Pool.DECODE)):
        view = WorkerView(key, pool, "m", 10_000, kv_tokens=10_000, block_tokens=SIZE)
        scheduler.on_worker_up(view)
    scheduler.prefixes.stored(B, [1, 2])
    scheduler.on_arrival(Ask("r", 100, 5, blocks=Prompt([1, 2, 3, 4, 5, 6])), 0.0)
    placement = scheduler.lives["r"].placement
    assert placement is not None and placement.hands_over
    assert placement.decode_cached_tokens == 32
    # Once more, of one that lost its worker.
    scheduler.on_worker_up(WorkerView(C, Pool.DECODE, "m", 10_000, 10_000, block_tokens=SIZE))
    scheduler.prefixes.stored(C, [1, 2, 3, 4, 5, 6])
    scheduler.on_worker_lost(B, 1.0)
    placement = scheduler.lives["r"].placement
    assert placement is not None and placement.reason == "prefix held"
    assert placement.decode_cached_tokens == 96
