"""The Helm chart, rendered by real Helm 3 and Helm 4 and checked without a cluster."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from cluster import pod_end
from cluster.config import BatonConfig
from tests.chart.helm import RELEASES, Release, helm, helm_binary
from tests.chart.rendering import (
    CHART,
    Object,
    containers,
    environment_of,
    find,
    load,
    pod_templates,
    rendered,
    router_of,
    template,
    values_of,
)

KUBERNETES_VERSIONS = ("1.31", "1.35")
CUSTOM_KINDS = {"RayCluster", "ServiceMonitor"}
VARIANTS = ("default", "cpu", "mixed", "external")


@pytest.fixture(params=RELEASES, ids=lambda release: f"helm{release.version}")
def release(request: pytest.FixtureRequest) -> Release:
    chosen: Release = request.param
    helm_binary(chosen)
    return chosen


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


def test_lint(release: Release, variant: str) -> None:
    done = helm(release, "lint", "--strict", str(CHART), *values_of(variant))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_helm_renders_the_same(release: Release, variant: str) -> None:
    assert rendered(variant, release) == rendered(variant)


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_objects_are_valid(variant: str, version: str) -> None:
    objects = rendered(variant)
    unknown = set()
    for o in objects:
        try:
            kubernetes_validate.validate(o, version, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            unknown.add(o["kind"])
    assert unknown <= CUSTOM_KINDS
    # The RayCluster's pod templates are Kubernetes' own kind, so they are held to it as well.
    for name, pod in pod_templates(objects):
        metadata = {"name": "pod", **pod["metadata"]}
        as_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod["spec"]}
        try:
            kubernetes_validate.validate(as_pod, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            pytest.fail(f"{name}: {error.message}")


def test_validation_notices_an_unknown_field() -> None:
    deployment = find(rendered("default"), "Deployment")
    broken = {**deployment, "spec": {**deployment["spec"], "replica": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES_VERSIONS[0], strict=True)


@pytest.mark.parametrize(
    "setting",
    [
        "unknown=1",
        "router.unknown=1",
        "prefill.unknown=1",
        "ray.head.unknown=1",
        "redis.image.unknown=1",
        "image.tag=latest",
        "router.replicas=two",
        "redis.externalUrl=localhost:6379",
        "prefill.rayStartParams.resources=x",
    ],
)
def test_values_are_refused(release: Release, setting: str) -> None:
    done = helm(
        release, "template", "demo", str(CHART), "--api-versions", "ray.io/v1", "--set", setting
    )
    assert done.returncode != 0
    assert "values don't meet the specifications of the schema" in done.stderr


def test_schema_is_closed_everywhere() -> None:
    def objects_of(node: Any) -> Iterator[Any]:
        if isinstance(node, dict):
            if isinstance(node.get("properties"), dict):
                yield node
            for child in node.values():
                yield from objects_of(child)

    schema = json.loads((CHART / "values.schema.json").read_text())
    found = list(objects_of(schema))
    assert found
    assert all(o["additionalProperties"] is False for o in found)


def test_ray_needs_its_crd(release: Release) -> None:
    done = helm(release, "template", "demo", str(CHART))
    assert done.returncode != 0
    assert "install the KubeRay operator" in done.stderr
    for setting in ("ray.requireCrd=false", "ray.enabled=false,ray.address=ray://elsewhere:10001"):
        assert helm(release, "template", "demo", str(CHART), "--set", setting).returncode == 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("ray.enabled=false", "ray.address is required"),
        ("redis.enabled=false", "redis.externalUrl or redis.existingSecret is required"),
    ],
)
def test_missing_address_is_told(release: Release, setting: str, message: str) -> None:
    done = helm(
        release, "template", "demo", str(CHART), "--api-versions", "ray.io/v1", "--set", setting
    )
    assert done.returncode != 0
    assert message in done.stderr


def test_labels_are_the_standard_ones(variant: str) -> None:
    wanted = {
        *(f"app.kubernetes.io/{k}" for k in ("name", "instance", "component", "version")),
        *(f"app.kubernetes.io/{k}" for k in ("part-of", "managed-by")),
        "helm.sh/chart",
    }
    for o in rendered(variant):
        assert wanted <= o["metadata"]["labels"].keys(), o["metadata"]["name"]
    for name, pod in pod_templates(rendered(variant)):
        assert wanted <= pod["metadata"]["labels"].keys(), name


def test_selectors_are_minimal(variant: str) -> None:
    """A version in a selector would make every upgrade fail: selectors can't be changed."""
    allowed = {f"app.kubernetes.io/{k}" for k in ("name", "instance", "component")}
    selectors = list(selectors_of(rendered(variant)))
    assert selectors
    for name, selector in selectors:
        assert selector.keys() == allowed, name


def selectors_of(objects: list[Object]) -> Iterator[tuple[str, dict[str, str]]]:
    for o in objects:
        match o["kind"]:
            case "Service":
                yield o["metadata"]["name"], o["spec"]["selector"]
            case "Deployment" | "StatefulSet" | "PodDisruptionBudget" | "ServiceMonitor":
                yield o["metadata"]["name"], o["spec"]["selector"]["matchLabels"]


def test_selectors_pick_one_kind_of_pod(variant: str) -> None:
    objects = rendered(variant)
    pods = [pod["metadata"]["labels"] for _, pod in pod_templates(objects)]
    for o in objects:
        if o["kind"] == "Service":
            selector = o["spec"]["selector"].items()
            assert sum(selector <= labels.items() for labels in pods) == 1, o["metadata"]["name"]


def test_images_are_pinned(variant: str) -> None:
    for name, _, container in containers(rendered(variant)):
        assert re.fullmatch(
            r"[^:@]+(:(?!latest$)[\w.-]+|@sha256:[0-9a-f]{64})", container["image"]
        ), f"{name}: {container['image']}"


def test_an_override_does_not_take_over_a_digest() -> None:
    text = template(
        RELEASES[0], "--set", f"image.digest=sha256:{'0' * 64}", "--set", "router.image.tag=cpu"
    )
    images = {name: c["image"] for name, _, c in containers(load(text))}
    assert images["Deployment demo-baton-router router"] == "baton:cpu"
    assert images["RayCluster demo-baton head ray-head"] == f"baton@sha256:{'0' * 64}"
    assert images["StatefulSet demo-baton-redis redis"] == "redis:7.4-bookworm"


def test_containers_are_restricted(variant: str) -> None:
    seen = list(containers(rendered(variant)))
    assert seen
    for name, pod, container in seen:
        context = container["securityContext"]
        assert context["runAsNonRoot"] is True, name
        assert context["allowPrivilegeEscalation"] is False, name
        assert context["readOnlyRootFilesystem"] is True, name
        assert context["capabilities"] == {"drop": ["ALL"]}, name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] > 0, name
        assert pod["automountServiceAccountToken"] is False, name
        for forbidden in ("hostNetwork", "hostPID", "hostIPC"):
            assert forbidden not in pod, name


@pytest.mark.parametrize("variant", ["default", "cpu", "mixed"])
def test_ray_cluster(variant: str) -> None:
    cluster = find(rendered(variant), "RayCluster")
    assert cluster["apiVersion"] == "ray.io/v1"
    spec = cluster["spec"]
    assert spec.keys() == {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    head = spec["headGroupSpec"]
    assert head.keys() == {"rayStartParams", "template"}
    assert head["rayStartParams"]["num-cpus"] == "0"
    ports = {
        p["name"]: p["containerPort"] for p in head["template"]["spec"]["containers"][0]["ports"]
    }
    assert ports == {"gcs": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}
    assert [group["groupName"] for group in spec["workerGroupSpecs"]] == ["prefill", "decode"]
    for group in spec["workerGroupSpecs"]:
        assert group.keys() == {
            "groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template",
        }  # fmt: skip
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_ray_version_is_the_installed_one() -> None:
    import ray

    assert find(rendered("default"), "RayCluster")["spec"]["rayVersion"] == ray.__version__


# Importing Ray's command line meets Pydantic deprecations in Ray Serve.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ray_start_takes_the_parameters() -> None:
    from ray.scripts.scripts import start

    options = {option for parameter in start.params for option in parameter.opts}
    for variant in ("default", "cpu", "mixed"):
        spec = find(rendered(variant), "RayCluster")["spec"]
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert {f"--{name}" for name in group["rayStartParams"]} <= options


def test_accelerators_reach_ray() -> None:
    groups = find(rendered("mixed"), "RayCluster")["spec"]["workerGroupSpecs"]
    resources = [through_shell(group["rayStartParams"]["resources"]) for group in groups]
    assert resources == [
        {"accelerator_type:H100": 1, "rack-a": 1_000_000},
        {"accelerator_type:H200": 1},
    ]
    # Ray's autoscaler reads the same string with a parser of its own.
    for group, expected in zip(groups, resources, strict=True):
        quoted = group["rayStartParams"]["resources"]
        assert json.loads(quoted[1:-1].replace("\\", "")) == expected
    assert groups[0]["template"]["spec"]["nodeSelector"] == {
        "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"
    }
    assert groups[1]["template"]["spec"]["nodeSelector"] == {
        "nvidia.com/gpu.product": "NVIDIA-H200"
    }


def through_shell(argument: str) -> Any:
    """What a process gets when KubeRay pastes the argument into its shell command."""
    command = f"printf %s --resources={argument}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.removeprefix("--resources="))


def test_gpus_can_be_left_out() -> None:
    for group in find(rendered("cpu"), "RayCluster")["spec"]["workerGroupSpecs"]:
        resources = group["template"]["spec"]["containers"][0]["resources"]
        assert "nvidia.com/gpu" not in resources["limits"] | resources["requests"]


def test_router_settings() -> None:
    router = router_of(rendered("mixed"))
    assert router["args"][:2] == ["up", "meta-llama/Llama-3.1-8B-Instruct"]
    assert router["args"][2:] == ["--shutdown-timeout", "100", "--kv-cache-dtype", "fp8"]
    environment = environment_of(router)
    assert environment["BATON_PREFILL"] == "24"
    assert environment["BATON_KEEP_WORKERS"] == "true"
    assert environment["BATON_DECODE"] == "16"
    assert environment["BATON_PORT"] == str(router["ports"][0]["containerPort"]) == "8000"
    assert environment["BATON_RAY_ADDRESS"] == "ray://demo-baton-head-svc:10001"
    assert environment["BATON_REDIS_URL"] == "redis://:$(REDIS_PASSWORD)@demo-baton-redis:6379/0"
    # Kubernetes expands a variable only if it is defined before.
    names = list(environment)
    assert names.index("REDIS_PASSWORD") < names.index("BATON_REDIS_URL")
    for probe, path in (
        ("startupProbe", "/health"),
        ("livenessProbe", "/health"),
        ("readinessProbe", "/ready"),
    ):
        assert router[probe]["httpGet"] == {"path": path, "port": "http"}


def test_running_answers_end_before_the_pod_is_killed() -> None:
    def timeout_s(grace_s: int) -> int:
        value = f"router.terminationGracePeriodSeconds={grace_s}"
        router = router_of(load(template(RELEASES[0], "--set", value)))
        sleep_s = int(router["lifecycle"]["preStop"]["exec"]["command"][1])
        timeout_s = int(router["args"][router["args"].index("--shutdown-timeout") + 1])
        assert timeout_s + sleep_s < grace_s
        return timeout_s

    assert timeout_s(300) > 250
    assert timeout_s(10) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_workers_drain_before_ray_stops() -> None:
    """`ray stop` leaves a worker a third of its grace period, and then kills it."""

    def drain_s(*args: str) -> int:
        cluster = find(load(template(RELEASES[0], *args)), "RayCluster")["spec"]
        (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
        assert pre_stop_of(head) == "ray stop"
        seconds = set()
        for group in cluster["workerGroupSpecs"]:
            pod = group["template"]["spec"]
            command = pre_stop_of(pod["containers"][0])
            told = re.fullmatch(rf"python -m {pod_end.__name__} (\d+); ray stop", command)
            assert told, command
            seconds.add((int(told[1]), pod["terminationGracePeriodSeconds"]))
        ((drain_s, grace_s),) = seconds
        # Three kinds of processes are killed, one after another.
        needs_s = ray_grace_s() + 3 * 2
        assert drain_s == 0 or drain_s + needs_s < grace_s
        return drain_s

    # What is left of a default drain and of a worker's end, whose engine alone has 10 s.
    notice_s = BatonConfig.model_fields["preemption_notice_s"].default
    assert drain_s() >= notice_s + 15
    both = [f"{pool}.terminationGracePeriodSeconds=" for pool in ("prefill", "decode")]
    assert drain_s("--set", ",".join(f"{each}600" for each in both)) > 500
    assert drain_s("--set", ",".join(f"{each}10" for each in both)) == 0


def pre_stop_of(container: Object) -> str:
    *shell, command = container["lifecycle"]["preStop"]["exec"]["command"]
    assert shell == ["/bin/sh", "-c"]
    subprocess.run(["sh", "-n", "-c", command], check=True)
    return str(command)


def ray_grace_s() -> float:
    from ray.scripts.scripts import stop

    (grace,) = (p for p in stop.params if "--grace-period" in p.opts)
    return float(grace.default)


def test_router_alone() -> None:
    objects = rendered("external")
    assert {o["kind"] for o in objects} == {"Deployment", "NetworkPolicy", "Pod", "Service"}
    environment = environment_of(router_of(objects))
    assert environment["BATON_RAY_ADDRESS"] == "ray://ray-head.ray.svc:10001"
    secret = {"secretKeyRef": {"name": "redis-url", "key": "redis-url"}}
    assert environment["BATON_REDIS_URL"] == secret


def test_names_stay_within_limits() -> None:
    """KubeRay cuts the head Service's name at 50; the router must ask for the name it makes."""
    objects = load(template(RELEASES[0], name="a" * 53))
    cluster = find(objects, "RayCluster")["metadata"]["name"]
    assert len(f"{cluster}-head-svc") <= 50
    address = environment_of(router_of(objects))["BATON_RAY_ADDRESS"]
    assert address == f"ray://{cluster}-head-svc:10001"
    assert all(len(o["metadata"]["name"]) <= 63 for o in objects)


def test_config_restarts_the_router() -> None:
    def checksum_of(*args: str) -> str:
        deployment = find(load(template(RELEASES[0], *args)), "Deployment")
        annotations: dict[str, str] = deployment["spec"]["template"]["metadata"]["annotations"]
        return annotations["checksum/config"]

    assert checksum_of("--set", "config.a=1") != checksum_of("--set", "config.a=2")
    config = find(rendered("mixed"), "ConfigMap")["data"]["baton.yaml"]
    assert yaml.safe_load(config) == {"handoff": {"inbox_bytes": 8 << 30}}
    assert environment_of(router_of(rendered("mixed")))["BATON_CONFIG"] == "/etc/baton/baton.yaml"


def test_config_that_would_do_nothing_is_refused(release: Release) -> None:
    """The environment and arguments come before the file."""
    router = router_of(rendered("default"))
    prefix = "BATON_"
    given = {e.removeprefix(prefix).lower() for e in environment_of(router) if e.startswith(prefix)}
    assert router["args"][0] == "up" and not router["args"][1].startswith("-")
    given.add("model")
    assert {"port", "redis_url"} < given < BatonConfig.model_fields.keys()
    everything = ",".join(f"config.{name}=1" for name in BatonConfig.model_fields.keys() - given)
    template(release, "--set", everything)
    for name in given:
        done = helm(
            release, "template", "demo", str(CHART), "--api-versions", "ray.io/v1",
            "--set", f"config.{name}=false",
        )  # fmt: skip
        assert done.returncode != 0, name
        assert f"config.{name} has no effect, for the chart sets it: " in done.stderr


def test_values_are_documented() -> None:
    lines = (CHART / "values.yaml").read_text().splitlines()
    readme = (CHART / "README.md").read_text()
    schema = json.loads((CHART / "values.schema.json").read_text())
    names = yaml.safe_load("\n".join(lines)).keys()
    assert names == schema["properties"].keys() - {"global"}
    rows = {
        name
        for row in re.findall(r"^\| (`.+?) \|", readme, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    }
    assert rows == names
    for name in names:
        number = next(i for i, line in enumerate(lines) if line.startswith(f"{name}:"))
        comment = number
        while comment and lines[comment - 1].startswith("#"):
            comment -= 1
        assert lines[comment].startswith("# -- "), f"{name} has no comment in values.yaml"


def test_helm_test_asks_the_router() -> None:
    pod = find(rendered("default"), "Pod")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    program, url = pod["spec"]["containers"][0]["args"]
    compile(program, "helm-test", "exec")
    service = find(rendered("default"), "Service", "-router")
    assert url == f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"


def test_notes() -> None:
    # Helm 3 wants a cluster even for a dry run.
    done = helm(
        RELEASES[1], "install", "demo", str(CHART), "--dry-run=client",
        "--set", "ray.requireCrd=false",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    notes = done.stdout.partition("NOTES:")[2]
    assert "port-forward svc/demo-baton-router 8000" in notes
    assert "Redis asks for no password" in notes
