"""Where workers go: examples an operator would expect, and properties of every placement."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import node_placement
from cluster.accelerators import CPU, Catalogue
from cluster.node_placement import fitting, place
from cluster.placement_request import (
    Node,
    NotEnoughCapacity,
    PlacementRequest,
    Role,
    WorkerNeeds,
    WorkerPlacement,
)
from cluster.roofline import ModelShape, Workload, rank

CATALOGUE = Catalogue.load()
LLAMA_8B = ModelShape(8.03e9, layers=32, hidden=4096, kv_heads=8, head_dim=128)
LLAMA_70B = ModelShape(69e9, layers=80, hidden=8192, kv_heads=8, head_dim=128)


def node(
    name: str,
    accelerator: str | None = None,
    accelerators: float = 1,
    cpus: float = 8,
    memory: int = 64_000_000_000,
) -> Node:
    return Node(name, accelerator, accelerators if accelerator else 0, cpus, memory)


def request(
    prefill: int,
    decode: int,
    *,
    model: ModelShape = LLAMA_8B,
    workload: Workload | None = None,
    needs: WorkerNeeds | None = None,
    prefill_accelerator: str | None = None,
    decode_accelerator: str | None = None,
) -> PlacementRequest:
    each = needs or WorkerNeeds()
    return PlacementRequest(
        prefill,
        decode,
        model,
        workload or Workload(),
        prefill=each,
        decode=each,
        prefill_accelerator=prefill_accelerator,
        decode_accelerator=decode_accelerator,
    )


def where(placements: list[WorkerPlacement]) -> list[tuple[Role, str]]:
    return [(one.role, one.node_id) for one in placements]


def test_h100_prefills_and_h20_decodes() -> None:
    placements = place([node("a", "H20"), node("b", "H100")], request(1, 1), CATALOGUE)
    assert where(placements) == [("prefill", "b"), ("decode", "a")]
    assert [one.accelerator for one in placements] == ["H100", "H20"]
    prefill, decode = (one.reason for one in placements)
    assert prefill == "H100 prefills 28,589 tokens/s, 4.6x the next (H20, 6,267)"
    assert decode == (
        "H20 decodes 4,758 tokens/s to H100's 10,326, but H100 is worth more in prefill: "
        "4.6x H20 there, 2.2x here"
    )


def test_h200_decodes_beside_h100() -> None:
    placements = place([node("a", "H200"), node("b", "H100")], request(1, 1), CATALOGUE)
    assert where(placements) == [("prefill", "b"), ("decode", "a")]
    assert placements[0].reason == (
        "H100 prefills 28,589 tokens/s, as fast as any other (H200, 28,589)"
    )
    assert placements[1].reason == "H200 decodes 12,538 tokens/s, 1.2x the next (H100, 10,326)"


def test_the_relative_advantage_decides_not_the_absolute_one() -> None:
    """An H100 beats an L20 at both, by 7.9x in prefill and 5.2x in decode: it prefills."""
    nodes = [node("big", "H100"), node("small", "L20")]
    assert where(place(nodes, request(1, 1), CATALOGUE)) == [
        ("prefill", "big"),
        ("decode", "small"),
    ]
    # An H200 is ahead of an A100 by 2.2x in either; of an L40S by more in decode: it decodes.
    nodes = [node("big", "H200"), node("small", "L40S")]
    assert where(place(nodes, request(1, 1), CATALOGUE)) == [
        ("prefill", "small"),
        ("decode", "big"),
    ]


def test_a_role_alone_takes_the_best() -> None:
    nodes = [node("a", "L4"), node("b", "H20"), node("c", "H100")]
    assert where(place(nodes, request(1, 0), CATALOGUE)) == [("prefill", "c")]
    assert where(place(nodes, request(0, 1), CATALOGUE)) == [("decode", "c")]
    assert where(place(nodes, request(1, 1), CATALOGUE)) == [("prefill", "c"), ("decode", "b")]


def test_homogeneous_nodes_are_spread_over() -> None:
    nodes = [node(name, "A100", 4) for name in "abc"]
    placements = place(nodes, request(3, 3), CATALOGUE)
    for role in ("prefill", "decode"):
        assert [one.node_id for one in placements if one.role == role] == ["a", "b", "c"]
    assert placements[0].reason == (
        "A100-80G prefills 13,034 tokens/s; the only accelerator here, spread over 3 nodes"
    )
    alone = place([node(name, "A100", 1) for name in "abcd"], request(2, 2), CATALOGUE)
    assert sorted(one.node_id for one in alone) == ["a", "b", "c", "d"]


def test_spreading_leaves_room_for_a_worker_that_needs_a_whole_node() -> None:
    wanted = PlacementRequest(
        2, 1, LLAMA_70B, prefill=WorkerNeeds(2), decode=WorkerNeeds(4, cpus=1)
    )
    placements = place([node("a", "H100", 4), node("b", "H100", 4)], wanted, CATALOGUE)
    assert Counter(one.node_id for one in placements if one.role == "prefill") in (
        {"a": 2},
        {"b": 2},
    )


def test_one_node_takes_all() -> None:
    placements = place([node("only", "H100", 4)], request(1, 3), CATALOGUE)
    assert {one.node_id for one in placements} == {"only"}
    assert "the only accelerator here, on one node" in placements[0].reason


def test_cpu_nodes_are_equal() -> None:
    placements = place([node("a"), node("b")], request(1, 1), CATALOGUE)
    assert sorted(one.node_id for one in placements) == ["a", "b"]
    assert {one.accelerator for one in placements} == {None}
    assert placements[0].reason == "nodes without accelerators count as equal for prefill"


def test_cpu_nodes_stay_out_of_an_accelerated_cluster_unless_pinned() -> None:
    nodes = [node("cpu"), node("gpu", "L4", 2)]
    assert {one.node_id for one in place(nodes, request(1, 1), CATALOGUE)} == {"gpu"}
    pinned = place(nodes, request(1, 1, decode_accelerator="cpu"), CATALOGUE)
    assert where(pinned) == [("prefill", "gpu"), ("decode", "cpu")]
    with pytest.raises(NotEnoughCapacity, match="CPU not for prefill: has no accelerator"):
        place(nodes, request(2, 1), CATALOGUE)


def test_pins_win_over_the_ranking() -> None:
    nodes = [node("a", "H20"), node("b", "H100")]
    swapped = request(1, 1, prefill_accelerator="h20", decode_accelerator="accelerator_type:H100")
    placements = place(nodes, swapped, CATALOGUE)
    assert where(placements) == [("prefill", "a"), ("decode", "b")]
    assert placements[0].reason.endswith("; pinned by prefill_accelerator='h20'")


def test_a_type_the_model_should_not_fit_comes_last() -> None:
    nodes = [node("a", "T4", 2), node("b", "H100", 2), node("c", "Mystery 9")]
    placements = place(nodes[:2], request(1, 1), CATALOGUE)
    assert {one.node_id for one in placements} == {"b"}
    assert "the only one here that can be used" in placements[0].reason
    # It is an estimate: who has nothing else is not refused.
    more = place(nodes, request(1, 3), CATALOGUE)
    assert Counter(one.node_id for one in more) == {"a": 1, "b": 2, "c": 1}
    (doubtful,) = [one.reason for one in more if one.node_id == "a"]
    assert doubtful == (
        "it may not fit: T4 has 14 GB to use, too little for 16 GB of weights and one request's KV "
        "at tensor_parallel 1, taking 90% of the memory, 2 bytes a weight and 2 a KV value; a "
        "larger tensor_parallel would help"
    )
    pinned = place(nodes, request(0, 1, decode_accelerator="T4"), CATALOGUE)
    assert pinned[0].reason == f"{doubtful}; pinned by decode_accelerator='T4'"


def test_of_those_that_it_should_not_fit_the_fastest_is_taken() -> None:
    nodes = [node("a", "T4"), node("b", "H100"), node("c", "L4")]
    assert where(place(nodes, request(1, 0, model=LLAMA_70B), CATALOGUE)) == [("prefill", "b")]
    # With all of its memory, and fp8 weights, it fits.
    small = replace(LLAMA_70B, weight_bytes=1, kv_bytes=1)
    wanted = request(1, 0, model=small, needs=WorkerNeeds(memory_share=0.98))
    assert place(nodes, wanted, CATALOGUE)[0].reason.startswith("H100 prefills ")


def test_a_model_of_unknown_shape_goes_by_the_hardwares_own_figures() -> None:
    wanted = replace(request(1, 1), model=None, model_note="the model's shape is not known: why")
    prefill, decode = place([node("a", "H20"), node("b", "H100")], wanted, CATALOGUE)
    assert (prefill.node_id, decode.node_id) == ("b", "a")
    assert decode.reason == (
        "H20 counts by its 4,000 GB/s alone, for the model's shape is not known: why"
    )
    assert "TFLOP/s" in prefill.reason
    cpus = place([node("a"), node("b")], wanted, CATALOGUE)
    assert cpus[0].reason == "nodes without accelerators count as equal for prefill"


def test_a_type_the_catalogue_lacks_comes_last() -> None:
    nodes = [node("a", "Mystery 9"), node("b", "L4")]
    assert where(place(nodes, request(1, 0), CATALOGUE)) == [("prefill", "b")]
    both = place(nodes, request(1, 1), CATALOGUE)
    assert {one.node_id for one in both} == {"a", "b"}
    lost = next(one for one in both if one.node_id == "a")
    assert lost.reason == "Mystery 9 is not in the catalogue and counts as the slowest here"
    alone = place([node("a", "Mystery 9", 2)], request(1, 1), CATALOGUE)
    assert {one.node_id for one in alone} == {"a"}


def test_a_worker_may_reserve_no_accelerator() -> None:
    """As with CPU-only workers on nodes that are labelled as if they had accelerators."""
    nodes = [node("a", "H20", 0, cpus=1), node("b", "H100", 0, cpus=1)]
    placements = place(nodes, request(1, 1, needs=WorkerNeeds(accelerators=0)), CATALOGUE)
    assert where(placements) == [("prefill", "b"), ("decode", "a")]


def test_tensor_parallel_stays_within_a_node() -> None:
    pair = request(1, 0, model=LLAMA_70B, needs=WorkerNeeds(2))
    assert where(place([node("a", "H100", 1), node("b", "H100", 2)], pair, CATALOGUE)) == [
        ("prefill", "b")
    ]
    with pytest.raises(NotEnoughCapacity):
        place([node("a", "H100", 1), node("b", "H100", 1)], pair, CATALOGUE)


def test_not_enough_capacity_says_what_to_change() -> None:
    nodes = [node("a", "H100", 2, cpus=4), node("b", "L4", 1)]
    wanted = request(2, 2, prefill_accelerator="H100")
    with pytest.raises(NotEnoughCapacity) as error:
        place(nodes, wanted, CATALOGUE)
    assert str(error.value) == (
        "Asked for 2 prefill workers (1 accelerators, 1 CPUs, 0 GB each) and 2 decode workers "
        "(1 accelerators, 1 CPUs, 0 GB each); there is room for at most 2 prefill or 2 decode "
        "workers, or 1 + 2 together. Nodes: a (2 H100, 4 CPUs, 64.0 GB free), "
        "b (1 L4, 8 CPUs, 64.0 GB free). L4 not for prefill: prefill_accelerator is pinned to "
        "H100. Change: fewer workers, fewer resources for each, more nodes or another "
        "prefill_accelerator than 'H100'."
    )
    with pytest.raises(NotEnoughCapacity, match="Nodes: none"):
        place([], request(1, 1), CATALOGUE)


def test_refuses_two_nodes_of_one_name() -> None:
    with pytest.raises(ValueError, match="same id"):
        place([node("a"), node("a")], request(1, 0), CATALOGUE)
    with pytest.raises(ValueError, match="negative"):
        request(-1, 0)


# --- properties

NAMES = ["H100", "H200", "H20", "A100", "L40S", "L4", "Mystery 9", None]


@st.composite
def clusters(draw: st.DrawFn, nodes_max: int = 6) -> list[Node]:
    count = draw(st.integers(1, nodes_max))
    return [
        node(
            f"n{index}",
            draw(st.sampled_from(NAMES)),
            draw(st.sampled_from([0, 0.5, 1, 2, 4, 8])),
            draw(st.sampled_from([0, 1, 2.5, 8])),
            draw(st.sampled_from([0, 4, 64])) * 1_000_000_000,
        )
        for index in range(count)
    ]


needs = st.builds(
    WorkerNeeds,
    tensor_parallel=st.sampled_from([1, 2, 4]),
    accelerators=st.sampled_from([None, None, 0.0, 0.5]),
    cpus=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    memory_bytes=st.sampled_from([0, 3_000_000_000]),
)
pins = st.sampled_from([None, None, None, "H100", "A100-80G", "cpu", "Mystery 9"])
requests = st.builds(
    PlacementRequest,
    prefill_workers=st.integers(0, 5),
    decode_workers=st.integers(0, 5),
    model=st.sampled_from([LLAMA_8B, LLAMA_70B, None]),
    workload=st.builds(Workload, st.integers(1, 5000), st.integers(1, 1000)),
    prefill=needs,
    decode=needs,
    prefill_accelerator=pins,
    decode_accelerator=pins,
)


def attempt(nodes: list[Node], wanted: PlacementRequest) -> list[WorkerPlacement] | None:
    try:
        return place(nodes, wanted, CATALOGUE)
    except NotEnoughCapacity:
        return None


def kind(one: Node | str) -> str:
    name = (one.accelerator or CPU) if isinstance(one, Node) else one
    known = CATALOGUE.get(name)
    return known.name if known else name


@settings(max_examples=300, deadline=None)
@given(clusters(), requests, st.randoms(use_true_random=False))
def test_every_placement_holds(
    nodes: list[Node], wanted: PlacementRequest, shuffle: random.Random
) -> None:
    reordered = list(nodes)
    shuffle.shuffle(reordered)
    try:
        placements = place(nodes, wanted, CATALOGUE)
    except NotEnoughCapacity as error:
        with pytest.raises(NotEnoughCapacity) as again:
            place(reordered, wanted, CATALOGUE)
        assert str(again.value) == str(error)
        return
    assert place(reordered, wanted, CATALOGUE) == placements
    counts = Counter(one.role for one in placements)
    assert (counts["prefill"], counts["decode"]) == (wanted.prefill_workers, wanted.decode_workers)
    by_id = {one.id: one for one in nodes}
    taken: dict[str, list[float]] = {one.id: [0.0, 0.0, 0.0] for one in nodes}
    for placement in placements:
        on = by_id[placement.node_id]
        assert placement.accelerator == on.accelerator
        assert placement.reason
        pin = wanted.pin(placement.role)
        assert pin is None or kind(pin) == kind(on)
        for index, amount in enumerate(wanted.needs(placement.role).on(on)):
            taken[on.id][index] += amount
    for one in nodes:
        accelerators, cpus, memory = taken[one.id]
        assert accelerators <= one.accelerators_free + 1e-6
        assert cpus <= one.cpus_free + 1e-6
        assert memory <= one.memory_bytes_free


def test_what_fits_goes_to_the_smaller_pool() -> None:
    def split(running: tuple[int, int]) -> tuple[int, int]:
        fits = fitting([node("a", "H100", 2)], request(2, 2), running, CATALOGUE)
        return fits.prefill_workers, fits.decode_workers

    assert split((0, 0)) == split((1, 1)) == (1, 1)
    assert (split((0, 3)), split((3, 0))) == ((2, 0), (0, 2))


@settings(max_examples=300, deadline=None)
@given(clusters(), requests)
def test_what_fits_is_placed_and_no_more_does(nodes: list[Node], wanted: PlacementRequest) -> None:
    most = fitting(nodes, wanted, catalogue=CATALOGUE)
    prefill, decode = most.prefill_workers, most.decode_workers
    assert prefill <= wanted.prefill_workers and decode <= wanted.decode_workers
    assert len(place(nodes, most, CATALOGUE)) == prefill + decode
    for p, d in product(range(wanted.prefill_workers + 1), range(wanted.decode_workers + 1)):
        if p + d > prefill + decode:
            more = replace(wanted, prefill_workers=p, decode_workers=d)
            assert attempt(nodes, more) is None


def rate(one: Node, role: Role, wanted: PlacementRequest) -> float:
    known = CATALOGUE.get(one.accelerator or CPU)
    assert known is not None and wanted.model is not None
    needs = wanted.needs(role)
    return rank(role, [known], wanted.model, wanted.workload, needs.tensor_parallel)[0].tokens_per_s


def brute_force(nodes: list[Node], wanted: PlacementRequest) -> float | None:
    """The best product of the two throughputs over every way to put the workers on the nodes."""
    prefill: list[Role] = ["prefill"] * wanted.prefill_workers
    decode: list[Role] = ["decode"] * wanted.decode_workers
    roles = prefill + decode
    best: float | None = None
    for choice in product(nodes, repeat=len(roles)):
        totals = {"prefill": 0.0, "decode": 0.0}
        taken: Counter[str] = Counter()
        for role, on in zip(roles, choice, strict=True):
            totals[role] += rate(on, role, wanted)
            taken[on.id] += wanted.needs(role).tensor_parallel
        if all(taken[one.id] <= one.accelerators_free for one in nodes):
            best = max(best or 0.0, totals["prefill"] * totals["decode"])
    return best


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["H100", "H200", "H20", "L40S", "L4"]), st.integers(0, 4)),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 2),
    st.integers(1, 2),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2]),
)
def test_no_other_placement_is_faster(
    types: list[tuple[str, int]], prefill: int, decode: int, prefill_tp: int, decode_tp: int
) -> None:
    nodes = [node(f"n{i}", name, count) for i, (name, count) in enumerate(types)]
    wanted = PlacementRequest(
        prefill, decode, LLAMA_8B, prefill=WorkerNeeds(prefill_tp), decode=WorkerNeeds(decode_tp)
    )
    best = brute_force(nodes, wanted)
    placements = attempt(nodes, wanted)
    assert (placements is None) == (best is None)
    if placements is None or best is None:
        return
    by_id = {one.id: one for one in nodes}
    mine = math.prod(
        sum(rate(by_id[one.node_id], role, wanted) for one in placements if one.role == role)
        for role in ("prefill", "decode")
    )
    assert mine == pytest.approx(best, rel=1e-6)


def test_a_large_cluster_is_placed_by_climbing(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        node(f"{name}-{i:02}", name, 8, cpus=64)
        for name in ("H100", "H200", "H20", "L40S", "A100")
        for i in range(4)
    ]
    wanted = request(12, 40)
    exact = place(nodes, wanted, CATALOGUE)
    monkeypatch.setattr(node_placement, "EXACT_SPLITS_MAX", 0)
    climbed = place(nodes, wanted, CATALOGUE)

    def split(placements: list[WorkerPlacement]) -> Counter[tuple[Role, str | None]]:
        return Counter((one.role, one.accelerator) for one in placements)

    assert split(climbed) == split(exact)
