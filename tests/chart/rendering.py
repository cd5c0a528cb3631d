"""The chart as Helm renders it, and the way around in its objects."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import yaml

from tests.chart.helm import RELEASES, ROOT, Release, helm

CHART = ROOT / "helm" / "baton"

Object = dict[str, Any]


def values_of(variant: str) -> list[str]:
    return (
        [] if variant == "default" else ["--values", str(CHART / "ci" / f"{variant}-values.yaml")]
    )


def template(release: Release, *args: str, name: str = "demo") -> str:
    done = helm(release, "template", name, str(CHART), "--api-versions", "ray.io/v1", *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def rendered(variant: str, release: Release = RELEASES[0]) -> list[Object]:
    return load(template(release, *values_of(variant)))


def load(text: str) -> list[Object]:
    return [document for document in yaml.safe_load_all(text) if document]


def find(objects: list[Object], kind: str, suffix: str = "") -> Object:
    (found,) = (o for o in objects if o["kind"] == kind and o["metadata"]["name"].endswith(suffix))
    return found


def pod_templates(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Every pod that the objects lead to, with a name for messages."""
    for o in objects:
        name = f"{o['kind']} {o['metadata']['name']}"
        match o["kind"]:
            case "Pod":
                yield name, o
            case "Deployment" | "StatefulSet":
                yield name, o["spec"]["template"]
            case "RayCluster":
                yield f"{name} head", o["spec"]["headGroupSpec"]["template"]
                for group in o["spec"]["workerGroupSpecs"]:
                    yield f"{name} {group['groupName']}", group["template"]


def containers(objects: list[Object]) -> Iterator[tuple[str, Object, Object]]:
    """Name, pod spec and container of every container."""
    for name, pod in pod_templates(objects):
        spec = pod["spec"]
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            yield f"{name} {container['name']}", spec, container


def environment_of(container: Object) -> dict[str, Any]:
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in container["env"]}


def router_of(objects: list[Object]) -> Object:
    router: Object = find(objects, "Deployment", "-router")["spec"]["template"]["spec"]
    container: Object = router["containers"][0]
    return container
