"""What is to be placed, and what there is: nodes, workers and their needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cluster.accelerators import CPU
from cluster.roofline import MEMORY_UTILIZATION, ModelShape, Workload

Role = Literal["prefill", "decode"]


class NotEnoughCapacity(RuntimeError):
    """The nodes have no room for the workers; the message says what to change."""


@dataclass(frozen=True)
class Node:
    """What one node has free."""

    id: str
    accelerator: str | None
    """Accelerator type as Ray names it; None on a node without one."""
    accelerators_free: float
    cpus_free: float
    memory_bytes_free: int
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_accelerator(self) -> bool:
        return self.accelerator is not None and self.accelerator.casefold() != CPU.casefold()


@dataclass(frozen=True)
class WorkerNeeds:
    """What one worker takes from its node."""

    tensor_parallel: int = 1
    accelerators: float | None = None
    """Accelerators reserved; None means `tensor_parallel`. None are taken where there are none."""
    cpus: float = 1.0
    memory_bytes: int = 0
    memory_share: float = MEMORY_UTILIZATION
    """Of an accelerator's memory, for weights and KV."""

    def __post_init__(self) -> None:
        if self.tensor_parallel < 1:
            raise ValueError("tensor_parallel must be at least 1")
        if min(self.accelerators or 0.0, self.cpus, self.memory_bytes) < 0:
            raise ValueError("a worker cannot need less than nothing")

    def on(self, node: Node) -> tuple[float, float, float]:
        """Accelerators, CPUs and bytes of memory taken from this node."""
        wanted = self.tensor_parallel if self.accelerators is None else self.accelerators
        return (wanted if node.has_accelerator else 0.0, self.cpus, self.memory_bytes)


@dataclass(frozen=True)
class PlacementRequest:
    """The workers wanted, and for which model and load."""

    prefill_workers: int
    decode_workers: int
    model: ModelShape | None
    """None: its shape is not known, and hardware counts by its own figures."""
    workload: Workload = field(default_factory=Workload)
    prefill: WorkerNeeds = field(default_factory=WorkerNeeds)
    decode: WorkerNeeds = field(default_factory=WorkerNeeds)
    prefill_accelerator: str | None = None
    """Only this accelerator prefills; `CPU` stands for nodes without one."""
    decode_accelerator: str | None = None
    model_note: str = ""
    """Why its shape is not known, or what of its arguments the shape leaves out."""

    def __post_init__(self) -> None:
        if min(self.prefill_workers, self.decode_workers) < 0:
            raise ValueError("the number of workers cannot be negative")

    def workers(self, role: Role) -> int:
        return self.prefill_workers if role == "prefill" else self.decode_workers

    def needs(self, role: Role) -> WorkerNeeds:
        return self.prefill if role == "prefill" else self.decode

    def pin(self, role: Role) -> str | None:
        return self.prefill_accelerator if role == "prefill" else self.decode_accelerator


@dataclass(frozen=True)
class WorkerPlacement:
    """One worker's node, and why."""

    role: Role
    node_id: str
    accelerator: str | None
    """As the node names it."""
    reason: str
