"""The files in deploy/: they parse, and what they name exists."""

from __future__ import annotations

import re
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile.*"))
YAML_FILES = sorted([*DEPLOY.glob("*.yaml"), *DEPLOY.glob("*.yml")])


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def instructions(path: Path) -> list[tuple[str, list[str]]]:
    """A Dockerfile's instructions and their words, comments gone and continued lines joined."""
    kept = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(kept).replace("\\\n", " ")
    return [(line.split()[0], line.split()[1:]) for line in joined.splitlines() if line.strip()]


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_yaml_parses(path: Path) -> None:
    assert isinstance(load(path), dict)


def test_both_dockerfiles_are_there() -> None:
    assert [path.name for path in DOCKERFILES] == ["Dockerfile.cpu", "Dockerfile.gpu"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_copies_what_exists(path: Path) -> None:
    sources = [
        source
        for name, words in instructions(path)
        if name == "COPY" and not words[0].startswith("--from=")
        for source in words[:-1]
    ]
    allowed = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert {"cluster/", "workers/", "router/", "proto/"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), f"{source} is not in the repository"
        assert source.rstrip("/") in allowed, f".dockerignore keeps {source} from the builder"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_image_has_every_transport(path: Path) -> None:
    """`make setup-nixl` is for an environment: nobody can run it in an image."""
    build = path.suffix.removeprefix(".")
    files = [f"requirements-{build}.txt", "requirements-nixl.txt"]
    steps = instructions(path)
    (copied,) = (words for name, words in steps if name == "COPY" and files[0] in words)
    assert copied == [*files, "/tmp/"]
    installed = [
        file
        for name, words in steps
        if name == "RUN" and words[:2] == ["pip", "install"]
        for flag, file in pairwise(words)
        if flag == "-r"
    ]
    assert installed == [f"/tmp/{file}" for file in files]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_is_pinned_and_not_root(path: Path) -> None:
    steps = instructions(path)
    for name, words in steps:
        if name == "FROM":
            assert re.fullmatch(r"[^:]+:(?!latest)[\w.-]+", words[0]), words[0]
    users = [words[0] for name, words in steps if name == "USER"]
    values = load(ROOT / "helm" / "baton" / "values.yaml")
    context = values["podSecurityContext"]
    assert users == [f"{context['runAsUser']}:{context['runAsGroup']}"]
    assert steps[-1] == ("ENTRYPOINT", ['["baton"]'])


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_commands_are_shell(path: Path) -> None:
    for name, words in instructions(path):
        if name == "RUN":
            subprocess.run(["sh", "-n", "-c", " ".join(words)], check=True)


def test_ray_accepts_the_cluster_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(load(DEPLOY / "ray-cluster.yaml"))
    validate_config(config)
    assert config["max_workers"] == len(config["provider"]["worker_ips"])


# Importing Ray's command line meets Pydantic deprecations in Ray Serve.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ray_start_takes_the_cluster_files_flags() -> None:
    from ray.scripts.scripts import start

    options = {option for parameter in start.params for option in parameter.opts}
    config = load(DEPLOY / "ray-cluster.yaml")
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    commands.append(" ".join(load(DEPLOY / "compose.yaml")["services"]["ray"]["entrypoint"]))
    flags = {flag for command in commands for flag in re.findall(r"--[a-z-]+", command)}
    assert "--num-cpus" in flags
    assert flags <= options


def test_worker_resources_default_to_none() -> None:
    command = load(DEPLOY / "ray-cluster.yaml")["worker_start_ray_commands"][-1]
    argument = command.partition("--resources=")[2]
    for environment, expected in (
        ({}, "{}"),
        ({"BATON_RAY_RESOURCES": '{"accelerator_type:H100": 1}'}, '{"accelerator_type:H100": 1}'),
    ):
        done = subprocess.run(
            ["bash", "-c", f"printf %s {argument}"],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        assert done.stdout == expected


def test_compose_names_what_exists() -> None:
    services = load(DEPLOY / "compose.yaml")["services"]
    for name, service in services.items():
        assert re.fullmatch(r"[^:]+:(?!latest)[\w.-]+", service["image"]), name
        for needed in service.get("depends_on", {}):
            assert "healthcheck" in services[needed], f"{name} waits for {needed}'s health"
        if build := service.get("build"):
            assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
    settings = services["router"]["environment"]
    assert settings["BATON_RAY_ADDRESS"].split("/")[2].split(":")[0] in services
    assert settings["BATON_REDIS_URL"].split("/")[2].split(":")[0] in services


def test_prometheus_scrapes_services_of_compose() -> None:
    services = load(DEPLOY / "compose.yaml")["services"]
    targets = [
        target
        for job in load(DEPLOY / "prometheus.yml")["scrape_configs"]
        for group in job["static_configs"]
        for target in group["targets"]
    ]
    assert targets
    assert {target.split(":")[0] for target in targets} <= services.keys()
