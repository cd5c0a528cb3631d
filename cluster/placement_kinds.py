"""The accelerator types among the nodes, and what each is worth in either role."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from cluster.accelerators import CPU, Accelerator, Catalogue
from cluster.placement_request import Node, PlacementRequest, Role
from cluster.roofline import efficiency, rank

UNFIT_SHARE: Final = 1e-3
"""What a type that the model should not fit counts, of the slowest that it fits."""

Frontier = list[int]
"""Index: prefill workers placed. Value: decode workers that still fit, or -1."""
Split = tuple[int, ...]
"""Workers of one role for each kind, in the kinds' order."""


@dataclass(frozen=True)
class Kind:
    """The nodes of one accelerator type, and one worker's throughput on it (0: not eligible)."""

    name: str
    known: Accelerator | None
    nodes: tuple[Node, ...]
    rate: Mapping[Role, float]
    refused: Mapping[Role, str]
    unfit: Mapping[Role, str]
    """Why the model should not fit: an estimate, so it is used where there is nothing else."""


def kinds_of(nodes: Sequence[Node], request: PlacementRequest, catalogue: Catalogue) -> list[Kind]:
    """The accelerator types among the nodes, by name, with what each is worth in either role."""
    by_name: dict[str, list[Node]] = {}
    for node in nodes:
        by_name.setdefault(_kind_name(node.accelerator, catalogue), []).append(node)
    only_cpu = set(by_name) <= {CPU}
    roles: tuple[Role, Role] = ("prefill", "decode")
    worth = {role: _rates(role, by_name, only_cpu, request, catalogue) for role in roles}
    return [
        Kind(
            name=name,
            known=catalogue.get(name),
            nodes=tuple(members),
            rate={role: worth[role].rates.get(name, 0.0) for role in roles},
            refused={role: worth[role].refused.get(name, "") for role in roles},
            unfit={role: worth[role].unfit.get(name, "") for role in roles},
        )
        for name, members in sorted(by_name.items())
    ]


def _kind_name(accelerator: str | None, catalogue: Catalogue) -> str:
    if accelerator is None:
        return CPU
    known = catalogue.get(accelerator)
    return known.name if known else accelerator


@dataclass(frozen=True)
class _Worth:
    """By accelerator type."""

    rates: dict[str, float]
    refused: dict[str, str]
    unfit: dict[str, str]


def _rates(
    role: Role,
    names: Iterable[str],
    only_cpu: bool,
    request: PlacementRequest,
    catalogue: Catalogue,
) -> _Worth:
    """Tokens a second of one worker on each eligible type, and why the others are refused.

    A type the catalogue lacks counts as the slowest of the others: it is used last, but for those
    that the model should not fit.
    """
    pin = request.pin(role)
    wanted = None if pin is None else _kind_name(pin, catalogue)
    rates: dict[str, float] = {}
    refused: dict[str, str] = {}
    unfit: dict[str, tuple[float, str]] = {}
    unknown: list[str] = []
    for name in names:
        known = catalogue.get(name)
        if wanted is not None and name != wanted:
            refused[name] = f"{role}_accelerator is pinned to {pin}"
        elif wanted is None and name == CPU and not only_cpu:
            refused[name] = "has no accelerator, and other nodes have"
        elif name == CPU:
            rates[name] = 1.0
        elif known is None:
            unknown.append(name)
        elif request.model is None:
            rates[name] = figure(role, known)
        else:
            needs = request.needs(role)
            (ranking,) = rank(
                role,
                [known],
                request.model,
                request.workload,
                needs.tensor_parallel,
                needs.memory_share,
            )
            if ranking.batch:
                rates[name] = ranking.tokens_per_s
            else:
                unfit[name] = figure(role, known), ranking.reason
    slowest = min(rates.values(), default=1.0)
    rates |= dict.fromkeys(unknown, slowest)
    best = max((own for own, _ in unfit.values()), default=1.0)
    rates |= {name: slowest * UNFIT_SHARE * own / best for name, (own, _) in unfit.items()}
    return _Worth(rates, refused, {name: reason for name, (_, reason) in unfit.items()})


def figure(role: Role, accelerator: Accelerator) -> float:
    """What bounds this role: TFLOP/s, or GB/s."""
    if role == "prefill":
        return accelerator.fp16_tflops * efficiency(accelerator)
    return accelerator.bandwidth_gb_s
