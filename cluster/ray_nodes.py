"""The nodes of the Ray cluster that this process is in."""

from __future__ import annotations

import ray

from cluster.placement_request import Node


def live_nodes() -> tuple[list[Node], dict[str, str]]:
    """Ray's nodes with what they have free, and their addresses by id."""
    available = ray._private.state.available_resources_per_node()
    nodes, addresses = [], {}
    for info in ray.nodes():
        if not info["Alive"]:
            continue
        node_id, free = info["NodeID"], available.get(info["NodeID"], {})
        types = [
            name.removeprefix("accelerator_type:")
            for name in info["Resources"]
            if name.startswith("accelerator_type:")
        ]
        nodes.append(
            Node(
                id=node_id,
                accelerator=types[0] if types else None,
                accelerators_free=free.get("GPU", 0.0),
                cpus_free=free.get("CPU", 0.0),
                memory_bytes_free=int(free.get("memory", 0)),
            )
        )
        addresses[node_id] = info["NodeManagerAddress"]
    return nodes, addresses
